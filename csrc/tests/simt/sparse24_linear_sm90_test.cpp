// SPDX-License-Identifier: Apache-2.0
#include <utility>
#include <vector>

#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/model_sm90.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

Guarded<std::uint16_t> run(const LinearCase& p, const Sparse24Linear& inputs,
                           const cuda::Sparse24Config& config, int multiprocessors = 5) {
  const std::int64_t stride = p.out_features + p.gap;
  Guarded<std::uint16_t> out(inputs.tokens * stride);
  const int before =
      std::exchange(simt::options.multiprocessors, multiprocessors);  // fewer than tiles, and odd
  EXPECT(cuda::sparse24_linear(inputs, out.data(), stride, nullptr, &config) == Status::ok);
  simt::options.multiprocessors = before;
  for (std::int64_t r = 0; r < inputs.tokens; ++r)
    for (std::int64_t n = p.out_features; n < stride; ++n) EXPECT(out[r * stride + n] == 0xffff);
  return out;
}

template <typename Body>
void for_each_config(Body&& body) {
  for (int tokens : {64, 128, 256})
    for (int cluster : {1, 2, 4})
      for (int features : {64, 128, 256})
        if (cuda::model_sm90::is_tile({tokens, cluster, features}))
          body(cuda::Sparse24Config{90, tokens, features, cluster});
}

}  // namespace

TEST(every_configuration_follows_the_equation) {
  int turn = 0;
  constexpr std::int64_t weights[][2] = {{8, 16}, {136, 80}, {264, 208}};
  for (const auto& weight : weights) {
    for (std::int64_t tokens : {1, 63, 65, 130}) {
      const LinearCase p(turn % 2 ? DType::float16 : DType::bfloat16, tokens, weight[0], weight[1]);
      for_each_config([&](const cuda::Sparse24Config& config) {
        const Sparse24Linear inputs = p.inputs(kActivations[turn++ % 5]);
        EXPECT(within_twice(p, inputs, run(p, inputs, config).data(), p.out_features));
      });
    }
  }
}

TEST(more_steps_than_stages_and_more_tiles_than_clusters) {
  const LinearCase p(DType::bfloat16, 300, 264, 64 * 11 + 16);
  for_each_config([&](const cuda::Sparse24Config& config) {
    if (config.cluster == 2 || config.tile_tokens == 64) {
      const Sparse24Linear inputs = p.inputs(Activation::gelu);
      EXPECT(within_twice(p, inputs, run(p, inputs, config).data(), p.out_features));
    }
  });
}

TEST(warpgroups_take_turns) {
  // On one block nine tiles, on a cluster of 4 three; as many steps as the ring has stages, and more.
  for (std::int64_t in_features : {64 * 12, 64 * 13 + 16}) {
    const LinearCase p(DType::bfloat16, 300, 264, in_features);
    Sparse24Linear inputs = p.inputs(Activation::gelu_tanh);
    for (int cluster : {1, 4}) {
      const Guarded<std::uint16_t> all = run(p, inputs, {90, 128, 128, cluster}, cluster);
      EXPECT(within_twice(p, inputs, all.data(), p.out_features));
      const std::int32_t num_rows = 200;  // the last row of tiles is left out
      inputs.num_rows = &num_rows;
      const std::vector<std::uint16_t> got = run(p, inputs, {90, 128, 128, cluster}, cluster).values();
      EXPECT(std::equal(got.begin(), got.begin() + num_rows * p.out_features, all.data()));
      EXPECT(std::all_of(got.begin() + num_rows * p.out_features, got.end(),
                         [](std::uint16_t x) { return x == 0; }));
      inputs.num_rows = nullptr;
    }
  }
}

TEST(rows_past_num_rows_are_zeros_whatever_they_hold) {
  const LinearCase p(DType::float16, 150, 136, 144);
  for_each_config([&](const cuda::Sparse24Config& config) {
    const std::vector<std::uint16_t> all = run(p, p.inputs(Activation::relu), config).values();
    for (std::int32_t num_rows : {1000, 149, 64, 63, 1, 0, -5}) {
      const std::int64_t real = std::min<std::int64_t>(std::max(num_rows, 0), p.tokens);
      LinearCase spoilt(DType::float16, 150, 136, 144);
      for (std::int64_t i = real * p.in_features; i < p.tokens * p.in_features; ++i)
        spoilt.x[i] = encode(kNaN, p.dtype);
      Sparse24Linear inputs = spoilt.inputs(Activation::relu);
      inputs.num_rows = &num_rows;
      const std::vector<std::uint16_t> got = run(spoilt, inputs, config).values();
      EXPECT(std::equal(all.begin(), all.begin() + real * p.out_features, got.begin()));
      EXPECT(std::all_of(got.begin() + real * p.out_features, got.end(),
                         [](std::uint16_t x) { return x == 0; }));
    }
  });
}

TEST(no_bit_of_a_row_depends_on_the_other_rows_the_tile_or_the_cluster) {
  const LinearCase p(DType::bfloat16, 130, 72, 208);
  const Sparse24Linear inputs = p.inputs(Activation::gelu);
  const std::vector<std::uint16_t> all = run(p, inputs, {90, 64, 128}).values();
  for_each_config(
      [&](const cuda::Sparse24Config& config) { EXPECT(run(p, inputs, config).values() == all); });
  for (std::int64_t tokens : {1, 17, 65}) {
    Sparse24Linear part = inputs;
    part.tokens = tokens;
    part.x = p.x.data() + 11 * p.in_features;
    part.residual = p.residual.data() + 11 * p.out_features;
    const std::vector<std::uint16_t> got = run(p, part, {90, 128, 128, 2}).values();
    EXPECT(std::equal(got.begin(), got.end(), all.begin() + 11 * p.out_features));
  }
}

TEST(rows_may_lie_apart) {
  const LinearCase p(DType::bfloat16, 70, 40, 80, 24, false);
  for_each_config([&](const cuda::Sparse24Config& config) {
    const Sparse24Linear inputs = p.inputs(Activation::quick_gelu);
    EXPECT(within_twice(p, inputs, run(p, inputs, config).data(), p.out_features + p.gap));
  });
}

TEST(parts_of_the_epilogue_may_be_missing) {
  const LinearCase p(DType::bfloat16, 9, 40, 144);
  for (int parts = 0; parts < 8; ++parts) {
    Sparse24Linear inputs = p.inputs(kActivations[parts % 5]);
    if (parts & 1) inputs.bias = nullptr;
    if (parts & 2) inputs.scale = nullptr;
    if (parts & 4) inputs.residual = nullptr;
    EXPECT(within_twice(p, inputs, run(p, inputs, {90, 64, 128}).data(), p.out_features));
  }
}

TEST(the_public_function_runs_it_unasked) {
  const Capability pretended(90);
  const LinearCase p(DType::bfloat16, 5, 8, 64 * 24);
  const Sparse24Linear inputs = p.inputs(Activation::gelu);
  const Guarded<std::uint16_t> out(p.tokens * p.out_features);
  EXPECT(cuda::sparse24_linear(inputs, out.data(), p.out_features, nullptr) == Status::ok);
  EXPECT(out.values() == run(p, inputs, {90, 64, 128}).values());
}

TEST(one_row_has_any_stride_and_rows_that_overlap_run_elsewhere) {
  const LinearCase p(DType::bfloat16, 1, 136, 144);
  Sparse24Linear inputs = p.inputs(Activation::none);
  for (std::int64_t stride : {0, 8, 144, 1 << 20}) {
    inputs.x_stride = stride;
    EXPECT(within_twice(p, inputs, run(p, inputs, {90, 64, 128}).data(), p.out_features));
  }
  LinearCase same(DType::bfloat16, 3, 136, 144);  // every row the first one
  for (std::int64_t i = same.in_features; i < 3 * same.in_features; ++i)
    same.x[i] = same.x[i - same.in_features];
  inputs = same.inputs(Activation::none);
  inputs.x_stride = 0;
  const cuda::Sparse24Config tma{90, 64, 128};
  const Guarded<std::uint16_t> out(same.tokens * same.out_features);
  const auto run_as = [&](const cuda::Sparse24Config* config) {
    return cuda::sparse24_linear(inputs, out.data(), same.out_features, nullptr, config);
  };
  EXPECT(run_as(&tma) == Status::invalid_argument);
  EXPECT(run_as(nullptr) == Status::ok);
  EXPECT(within_twice(same, inputs, out.data(), same.out_features));
}

TEST(a_default_is_a_configuration_that_there_is) {
  Sparse24Linear inputs = LinearCase(DType::bfloat16, 8, 8, 16).inputs(Activation::none);
  const int multiprocessors = std::exchange(simt::options.multiprocessors, 132);
  const cuda::Device h100{90, 132, 227 * 1024, 228 * 1024, true, 90, 63};  // a number that no other has
  for (std::int64_t tokens : {1, 64, 577, 4616, 18464}) {
    for (std::int64_t out_features : {8, 768, 3072}) {
      inputs.tokens = tokens, inputs.out_features = out_features;
      inputs.in_features = inputs.x_stride = 768;
      const cuda::Sparse24Config chosen = cuda::kLinearSm90.default_config({inputs}, h100);
      EXPECT(chosen.tile_out_features >= 64 && chosen.cluster >= 1 && chosen.cluster <= 4);
      if (tokens <= 64) EXPECT(chosen.tile_tokens == 64);
      if (tokens == 18464) EXPECT(chosen.tile_tokens > 64);
    }
  }
  simt::options.multiprocessors = multiprocessors;
}
