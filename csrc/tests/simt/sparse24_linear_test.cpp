// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <vector>

#include "cuda/sparse24/architectures.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr DType kTypes[] = {DType::bfloat16, DType::float16};
constexpr cuda::Sparse24Config kTiles[] = {
    {80, 128, 256}, {80, 128, 128}, {80, 64, 128}, {80, 64, 64}, {80, 16, 32}};
constexpr std::int64_t kTokens[] = {0, 1, 7, 8, 63, 64, 65, 130};
constexpr std::int64_t kWeights[][2] = {{8, 16}, {24, 48}, {64, 64}, {136, 144}};

// On one tile, or on the default of the public function; rows of the result are `gap` further apart.
Guarded<std::uint16_t> run(const LinearCase& p, const Sparse24Linear& inputs,
                           const cuda::Sparse24Config* tile = nullptr) {
  const std::int64_t stride = p.out_features + p.gap;
  Guarded<std::uint16_t> out(inputs.tokens * stride);
  EXPECT(cuda::sparse24_linear(inputs, out.data(), stride, nullptr, tile) == Status::ok);
  for (std::int64_t r = 0; r < inputs.tokens; ++r)
    for (std::int64_t n = p.out_features; n < stride; ++n) EXPECT(out[r * stride + n] == 0xffff);
  return out;
}

}  // namespace

TEST(every_tile_follows_the_equation) {
  int turn = 0;
  for (DType dtype : kTypes) {
    for (const auto& weight : kWeights) {
      for (std::int64_t tokens : kTokens) {
        const LinearCase p(dtype, tokens, weight[0], weight[1]);
        for (const cuda::Sparse24Config& tile : kTiles) {
          const Sparse24Linear inputs = p.inputs(kActivations[turn++ % 5]);
          EXPECT(within_twice(p, inputs, run(p, inputs, &tile).data(), p.out_features));
        }
      }
    }
  }
}

TEST(more_steps_than_stages_and_more_tiles_than_one) {
  for (const cuda::Sparse24Config& tile : kTiles) {
    const LinearCase p(DType::bfloat16, 150, 328, 656);
    const Sparse24Linear inputs = p.inputs(Activation::gelu);
    EXPECT(within_twice(p, inputs, run(p, inputs, &tile).data(), p.out_features));
  }
}

TEST(every_epilogue) {
  for (DType dtype : kTypes) {
    for (bool affine_is_float : {false, true}) {
      const LinearCase p(dtype, 9, 40, 32, 0, affine_is_float);
      for (Activation activation : kActivations) {
        for (int parts = 0; parts < 8; ++parts) {
          Sparse24Linear inputs = p.inputs(activation);
          if (parts & 1) inputs.bias = nullptr;
          if (parts & 2) inputs.scale = nullptr;
          if (parts & 4) inputs.residual = nullptr;
          for (int capability : {80, 90}) {
            const Capability pretended(capability);
            EXPECT(within_twice(p, inputs, run(p, inputs).data(), p.out_features));
          }
        }
      }
    }
  }
}

TEST(no_bit_of_a_row_depends_on_the_tile_or_on_other_rows) {
  const LinearCase p(DType::bfloat16, 130, 72, 208);
  const Sparse24Linear inputs = p.inputs(Activation::gelu);
  const std::vector<std::uint16_t> all = run(p, inputs, &kTiles[0]).values();
  for (const cuda::Sparse24Config& tile : kTiles) {
    EXPECT(run(p, inputs, &tile).values() == all);
    for (std::int64_t tokens : {1, 17, 65}) {
      Sparse24Linear part = inputs;
      part.tokens = tokens;
      part.x = p.x.data() + 11 * p.in_features;
      part.residual = p.residual.data() + 11 * p.out_features;
      const std::vector<std::uint16_t> got = run(p, part, &tile).values();
      EXPECT(std::equal(got.begin(), got.end(), all.begin() + 11 * p.out_features));
    }
  }
}

TEST(rows_past_num_rows_are_zeros_whatever_they_hold) {
  const LinearCase p(DType::float16, 130, 72, 80);
  const std::vector<std::uint16_t> all = run(p, p.inputs(Activation::relu)).values();
  for (std::int32_t num_rows :
       {1000, 131, 130, 129, 65, 64, 63, 16, 7, 1, 0, -5}) {  // x is spoilt as it falls
    const std::int64_t real = std::min<std::int64_t>(std::max(num_rows, 0), p.tokens);
    for (std::int64_t i = real * p.in_features; i < p.tokens * p.in_features; ++i)
      p.x[i] = encode(kNaN, p.dtype);
    for (const cuda::Sparse24Config& tile : kTiles) {
      Sparse24Linear inputs = p.inputs(Activation::relu);
      inputs.num_rows = &num_rows;
      const std::vector<std::uint16_t> got = run(p, inputs, &tile).values();
      EXPECT(std::equal(all.begin(), all.begin() + real * p.out_features, got.begin()));
      EXPECT(std::all_of(got.begin() + real * p.out_features, got.end(),
                         [](std::uint16_t x) { return x == 0; }));
    }
  }
}

TEST(rows_may_lie_apart) {
  for (std::int64_t gap : {8, 40}) {
    const LinearCase p(DType::bfloat16, 70, 40, 80, gap, false);
    for (const cuda::Sparse24Config& tile : kTiles) {
      const Sparse24Linear inputs = p.inputs(Activation::quick_gelu);
      EXPECT(within_twice(p, inputs, run(p, inputs, &tile).data(), p.out_features + gap));
    }
  }
}

TEST(without_channels_the_epilogue_is_left) {
  const LinearCase p(DType::bfloat16, 20, 24, 0);
  const Sparse24Linear inputs = p.inputs(Activation::gelu);
  for (const cuda::Sparse24Config& tile : kTiles)
    EXPECT(within_twice(p, inputs, run(p, inputs, &tile).data(), p.out_features));
}

TEST(a_default_is_a_tile_that_the_device_can_hold) {
  Sparse24Linear inputs = LinearCase(DType::bfloat16, 8, 8, 16).inputs(Activation::none);
  const cuda::Device a100{80, 108, 163 * 1024, 164 * 1024, true, 0};
  const cuda::Device ada{89, 128, 99 * 1024, 100 * 1024, true, 0};
  for (std::int64_t tokens : {1, 16, 64, 577, 4616, 18464}) {
    for (std::int64_t out_features : {8, 768, 3072}) {
      inputs.tokens = tokens;
      inputs.out_features = out_features;
      inputs.in_features = 768;
      for (const cuda::Device& device : {a100, ada}) {
        const cuda::Sparse24Config chosen = cuda::kLinearSm80.default_config({inputs}, device);
        bool known = false;
        for (const cuda::Sparse24Config& tile : kTiles)
          known |=
              tile.tile_tokens == chosen.tile_tokens && tile.tile_out_features == chosen.tile_out_features;
        EXPECT(known && chosen.cluster == 1);
        EXPECT(device.block_shared_bytes > 100 * 1024 || chosen.tile_out_features < 256);
        if (tokens <= 16) EXPECT(chosen.tile_tokens == 16);
        if (tokens == 18464 && out_features == 3072) EXPECT(chosen.tile_tokens == 128);
      }
    }
  }
}

TEST(bad_linear_arguments_are_refused) {
  const LinearCase p(DType::bfloat16, 4, 16, 32);
  const Guarded<std::uint16_t> out(4 * 16 + 8);
  const auto refused = [&](auto change, Status expected = Status::invalid_argument) {
    Sparse24Linear inputs = p.inputs(Activation::gelu);
    change(inputs);
    EXPECT(cuda::sparse24_linear(inputs, out.data(), 16, nullptr) == expected);
  };
  const auto moved = [](const void* data) {
    return static_cast<const void*>(static_cast<const char*>(data) + 8);
  };
  refused([](Sparse24Linear& a) { a.in_features = 24; });
  refused([](Sparse24Linear& a) { a.out_features = 12; });
  refused([](Sparse24Linear& a) { a.tokens = -1; });
  refused([](Sparse24Linear& a) { a.tokens = std::int64_t{1} << 31; });
  refused([](Sparse24Linear& a) { a.x = nullptr; });
  refused([](Sparse24Linear& a) { a.layout = nullptr; });
  refused([&](Sparse24Linear& a) { a.x = moved(a.x); });
  refused([&](Sparse24Linear& a) { a.layout = moved(a.layout); });
  refused([&](Sparse24Linear& a) { a.bias = moved(a.bias); });
  refused([&](Sparse24Linear& a) { a.scale = moved(a.scale); });
  refused([&](Sparse24Linear& a) { a.residual = moved(a.residual); });
  alignas(4) const char num_rows[8] = {};
  refused([&](Sparse24Linear& a) { a.num_rows = reinterpret_cast<const std::int32_t*>(num_rows + 2); });
  refused([](Sparse24Linear& a) { a.x_stride = 36; });
  refused([](Sparse24Linear& a) { a.residual_stride = 20; });
  refused([](Sparse24Linear& a) { a.dtype = DType(3); });
  refused([](Sparse24Linear& a) { a.weight_dtype = DType::float32; });
  refused([](Sparse24Linear& a) { a.bias_dtype = DType::float16; });
  refused([](Sparse24Linear& a) { a.scale_dtype = DType(7); });
  refused([](Sparse24Linear& a) { a.activation = Activation(5); });
  refused([](Sparse24Linear& a) { a.dtype = a.weight_dtype = DType::float32; }, Status::unsupported);
  const Sparse24Linear good = p.inputs(Activation::none);
  EXPECT(cuda::sparse24_linear(good, nullptr, 16, nullptr) == Status::invalid_argument);
  EXPECT(cuda::sparse24_linear(good, out.data() + 4, 16, nullptr) == Status::invalid_argument);
  for (std::int64_t stride : {20, 8, 0, -8})
    EXPECT(cuda::sparse24_linear(good, out.data(), stride, nullptr) == Status::invalid_argument);
  for (std::uint16_t bits : out.values()) EXPECT(bits == 0xffff);
}

TEST(a_device_without_the_shared_memory_is_a_status) {
  const LinearCase p(DType::bfloat16, 4, 16, 32);
  const Guarded<std::uint16_t> out(4 * 16);
  simt::options.error = 1;
  EXPECT(cuda::sparse24_linear(p.inputs(Activation::none), out.data(), 16, nullptr, kTiles) ==
         Status::cuda_error);
  simt::options.error = 0;
  for (std::uint16_t bits : out.values()) EXPECT(bits == 0xffff);
}
