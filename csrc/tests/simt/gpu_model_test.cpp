// SPDX-License-Identifier: Apache-2.0
// The formula of model_sm90.h on cases that were worked out by hand, after docs/gpu-model.md.

#include <cmath>

#include "cuda/sparse24/model_sm90.h"
#include "tests/test.h"

using namespace madtp;
using namespace madtp::cuda::model_sm90;

namespace {

bool is_near(double got, double by_hand) { return std::abs(got - by_hand) <= 5e-4 * by_hand; }

constexpr Layer kFirstOfMlp{18464, 3072, 768, Activation::gelu};

}  // namespace

TEST(a_large_layer_whose_epilogue_weighs_as_much_as_its_products) {
  const Clocks c = clocks(kFirstOfMlp, {256, 4}, Gpu{});
  // 12 steps of 128 x 256 x 64 products, 4096 a clock; of 3 x 32768 bytes, 128 a clock.
  EXPECT(c.tensor == 12 * 512 && c.shared == 12 * 768);
  // 128 blocks at a time have 33 bytes a clock each: 12 steps of 32768 / 4 + 9216.
  EXPECT(is_near(c.l2, 12 * 17408 / 33.0));
  // 32768 values of 22 instructions, 96 a clock.
  EXPECT(is_near(c.issue, 7509.3));
  EXPECT(is_near(c.tile, 9216 + 7509.3 + 1000));
  // 73 x 6 tiles on 32 clusters.
  EXPECT(c.rounds == 14);
  // x and y have 142 MB, which L2 does not keep: 1718 bytes a clock.
  EXPECT(is_near(c.hbm, 141803520 / 1717.95));
  EXPECT(is_near(c.total, 14 * 17725.3 + 2106));
}

TEST(few_rows_have_more_of_l2_each_and_a_cold_weight_waits_for_hbm) {
  const Layer warm{64, 768, 3072, Activation::none, true, false},
      cold{64, 768, 3072, Activation::none, true, true};
  const Clocks now = clocks(warm, {64, 1}, Gpu{});
  EXPECT(now.rounds == 1 && now.shared == 48 * 192);
  EXPECT(now.l2 == 48 * (8192 + 9216) / 64.0);  // 6 blocks: 64 bytes a clock each
  EXPECT(is_near(now.tile, 13056 + 64 * 128 * 10.5 / 96.0 + 1000));
  EXPECT(now.hbm == 0);
  const Clocks later = clocks(cold, {64, 4}, Gpu{});  // 48 steps, a load of 800 clocks for 4 of them
  EXPECT(is_near(later.hbm, 768 * 3072 * 1.125 / 1717.95));
  EXPECT(is_near(later.tile, 48 * 200 + 896 + 1000));
}

TEST(in_turn_the_longest_of_what_is_shared_counts) {
  const Clocks c = clocks(kFirstOfMlp, {128, 4}, Gpu{});
  // A tile alone: 12 steps of (4096 + 9216) / 33 clocks of L2, more than the 384 of shared memory, and 22
  // instructions, 64 a clock. Two of them at a time: half of that.
  const double loop = 12 * 13312 / 33.0, alone = loop + 16384 * 22 / 64.0 + 1000;
  EXPECT(is_near(c.tile, loop + 32768 / 33.0));
  EXPECT(c.tile > alone / 2 && c.tile > 12 * 384 + 512);
  EXPECT(c.rounds == 28);  // 145 x 6 tiles on 32 clusters
  EXPECT(is_near(c.total, 27 * c.tile + alone + 2106));
}

TEST(a_tile_of_half_the_output_features_reads_x_once) {
  const Clocks c = clocks({64, 768, 3072, Activation::none, true, true}, {64, 4, 64}, Gpu{});
  // 12 blocks, of 64 bytes of L2 a clock; 8 steps of 800 clocks under way; one warp a scheduler.
  EXPECT(c.shared == 48 * 128 && c.l2 == 48 * (8192 / 4 + 4608) / 64.0);
  EXPECT(is_near(c.tile, 48 * 128 + 4096 * 10.5 / 64 + 1000));
}

TEST(a_tile_of_twice_the_output_features_shares_x_among_four_products) {
  const Clocks c = clocks({18464, 1024, 4096, Activation::none, true, true}, {128, 4, 256}, Gpu{});
  EXPECT(c.tensor == 64 * 512 && c.shared == 64 * 640 && is_near(c.l2, 64 * (4096 + 18432) / 33.0));
  EXPECT(c.rounds == 5);  // 145 tiles on 32 clusters
  EXPECT(is_near(c.tile,
                 64 * 22528 / 33.0 + 32768 * 4 / 33.0 + 1000));  // y and the residual take longer than 10.5
}

TEST(where_each_block_has_a_tile_they_share_it) {
  const Layer few{577, 2304, 768};
  const Clocks c = clocks(few, {128, 2}, Gpu{});  // 5 x 9 tiles for 66 clusters
  EXPECT(c.rounds == 1 && is_near(c.tile, 12 * 384 + 16384 * 8 / 96.0 + 1000));
  EXPECT(!is_in_turn({128, 2}, 66, 66) && is_in_turn({128, 2}, 67, 66) && !is_in_turn({256, 2}, 67, 66));
}

TEST(dense_layers_take_the_best_of_their_tiles) {
  // 192 x 128: 16 x 145 tiles in 18 rounds of 12 steps of 1572864 products, 0.8 x 2048 a clock.
  EXPECT(dense_clocks(kFirstOfMlp, Gpu{}) == 2106 + 18 * 12 * 960 + 1000);
  // 64 x 64, in six parts: 72 tiles of 8 steps, (32 + 64) x 128 bytes each, 4224 / 72 a clock; then 2.4 MB.
  const Layer few{64, 768, 3072};
  EXPECT(is_near(dense_clocks(few, Gpu{}),
                 2106 + 8 * 12288 / (4224 / 72.0) + 1000 + 2106 + 8 * 49152 * 6 / 2112.0));
  // GELU by itself reads and writes 113 MB.
  EXPECT(is_near(separate_clocks(kFirstOfMlp), 2106 + 2 * 113442816 / 1717.95));
}

TEST(the_fastest_is_one_that_is_allowed) {
  const Schedule s = fastest(kFirstOfMlp, Gpu{}, [](const Schedule& one) { return one.tokens == 64; });
  EXPECT(s.tokens == 64 && s.cluster >= 1);
  EXPECT(fastest(kFirstOfMlp, Gpu{}, [](const Schedule&) { return false; }).tokens == 0);
  const Layer narrow{100, 64, 768};  // more blocks than output features need are no use
  EXPECT(fastest(narrow, Gpu{}, [](const Schedule&) { return true; }).cluster == 1);
}
