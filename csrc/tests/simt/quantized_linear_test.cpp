// SPDX-License-Identifier: Apache-2.0
// Quantised layers by mma.sp: in int8 the bits of the CPU kernel, in e4m3 the value in float64.

#include "cuda/sparse24/architectures.h"
#include "tests/simt/quantized_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};
constexpr cuda::Sparse24Config kTiles[] = {
    {80, 128, 256}, {80, 128, 128}, {80, 64, 128}, {80, 64, 64}, {80, 16, 32}};

// On one tile, or on the default; rows of x are quantised before.
Elements run(const QuantizedCase& p, const QuantizedLinear& inputs,
             const cuda::Sparse24Config* tile = nullptr) {
  const std::int64_t stride = p.out_features + p.gap;
  Elements out(p.dtype, inputs.tokens * stride);
  p.quantize(inputs.num_rows);
  EXPECT(cuda::quantized_linear(inputs, p.quantized(), out.data(), stride, nullptr, tile) == Status::ok);
  for (std::int64_t r = 0; r < inputs.tokens; ++r)
    EXPECT(out.is_poison(r * stride + p.out_features, (r + 1) * stride));
  return out;
}

bool is_exact(Activation activation) {
  return activation == Activation::none || activation == Activation::relu;
}

void expect_right(const QuantizedCase& p, const QuantizedLinear& inputs, const Elements& got) {
  if (p.type == QuantizedType::int8 && is_exact(inputs.activation)) {
    EXPECT(got.same(p.by_cpu(inputs)));
  } else {
    EXPECT(is_near(p, inputs, got));
  }
}

}  // namespace

TEST(every_tile_has_the_bits_of_the_cpu) {
  int turn = 0;
  constexpr std::int64_t weights[][2] = {{8, 16}, {24, 48}, {64, 128}, {136, 272}};
  for (const auto& weight : weights) {
    for (std::int64_t tokens : {0, 1, 7, 65, 130}) {
      const QuantizedCase p(kTypes[turn % 3], tokens, weight[0], weight[1]);
      for (const cuda::Sparse24Config& tile : kTiles) {
        const QuantizedLinear inputs = p.inputs(turn++ % 2 == 0 ? Activation::none : Activation::relu);
        expect_right(p, inputs, run(p, inputs, &tile));
      }
    }
  }
}

TEST(more_steps_than_stages_and_more_tiles_than_one) {
  for (const cuda::Sparse24Config& tile : kTiles) {
    const QuantizedCase p(DType::bfloat16, 150, 328, 128 * 9 + 16);
    const QuantizedLinear inputs = p.inputs(Activation::none);
    expect_right(p, inputs, run(p, inputs, &tile));
  }
}

TEST(every_epilogue) {
  for (DType dtype : kTypes) {
    for (bool affine_is_float : {false, true}) {
      const QuantizedCase p(dtype, 9, 40, 32, QuantizedType::int8, 16, affine_is_float);
      for (Activation activation : kActivations) {
        for (int parts = 0; parts < 8; ++parts) {
          QuantizedLinear inputs = p.inputs(activation);
          if (parts & 1) inputs.bias = nullptr;
          if (parts & 2) inputs.scale = nullptr;
          if (parts & 4) inputs.residual = nullptr;
          for (int capability : {80, 90}) {
            const Capability pretended(capability);
            expect_right(p, inputs, run(p, inputs));
          }
        }
      }
    }
  }
}

TEST(e4m3_follows_the_equation) {
  const Capability pretended(90);
  int turn = 0;
  for (std::int64_t tokens : {1, 65}) {
    for (DType dtype : kTypes) {
      const QuantizedCase p(dtype, tokens, 72, 176, QuantizedType::e4m3);
      const QuantizedLinear inputs = p.inputs(kActivations[turn++ % 5]);
      expect_right(p, inputs, run(p, inputs, &kTiles[4]));  // the one that it has
    }
  }
}

TEST(a_row_with_no_number_is_nan_and_tiny_ones_are_zeros) {
  for (QuantizedType type : {QuantizedType::int8, QuantizedType::e4m3}) {
    const Capability pretended(90);
    const QuantizedCase p(DType::float32, 5, 24, 48, type);
    p.x.set(1 * 48 + 5, kNaN);
    p.x.set(3 * 48 + 47, -kInfinity);
    for (std::int64_t c = 0; c < 48; ++c) p.x.set(4 * 48 + c, 0x1p-121f);
    QuantizedLinear inputs = p.inputs(Activation::none);
    inputs.scale = inputs.residual = nullptr;
    const Elements got = run(p, inputs);
    if (type == QuantizedType::int8) EXPECT(got.same(p.by_cpu(inputs)));
    for (std::int64_t n = 0; n < 24; ++n) {
      EXPECT(!std::isnan(got.get(n)) && std::isnan(got.get(24 + n)) && std::isnan(got.get(3 * 24 + n)));
      EXPECT(got.get(4 * 24 + n) == p.bias.get(n));
    }
  }
}

TEST(rows_past_num_rows_are_zeros) {
  const QuantizedCase p(DType::float16, 130, 72, 80);
  for (std::int32_t num_rows : {1000, 130, 129, 64, 17, 1, 0, -5}) {
    QuantizedLinear inputs = p.inputs(Activation::relu);
    inputs.num_rows = &num_rows;
    const Elements expected = p.by_cpu(inputs);
    for (const cuda::Sparse24Config& tile : kTiles) EXPECT(run(p, inputs, &tile).same(expected));
  }
}

TEST(without_channels_the_epilogue_is_left) {
  const QuantizedCase p(DType::bfloat16, 20, 24, 0);
  for (Activation activation : kActivations) {
    const QuantizedLinear inputs = p.inputs(activation);
    expect_right(p, inputs, run(p, inputs));
  }
}

TEST(what_runs_where) {
  const QuantizedCase p(DType::bfloat16, 4, 16, 32), e4m3(DType::bfloat16, 4, 16, 32, QuantizedType::e4m3),
      wide(DType::float32, 4, 16, 32, QuantizedType::e4m3);
  const auto count = [](const QuantizedCase& of, int capability, const char* archs) {
    const Capability pretended(capability, archs);
    int found = -1;
    EXPECT(cuda::quantized_linear_configs(of.inputs(Activation::none), of.quantized(), nullptr, 0, &found) ==
           Status::ok);
    return found;
  };
  EXPECT(count(p, 80, "80;90a") == 5 && count(p, 90, "80;90a") == 5 + 15 && count(p, 90, "80") == 5);
  EXPECT(count(e4m3, 80, "80;90a") == 0 && count(e4m3, 90, "80;90a") == 1 + 15 && count(e4m3, 90, "80") == 0);
  EXPECT(count(wide, 90, "80;90a") == 1);
  const Elements out(DType::bfloat16, 4 * 16);
  const Capability ampere(80);
  EXPECT(cuda::quantized_linear(e4m3.inputs(Activation::none), e4m3.quantized(), out.data(), 16, nullptr) ==
         Status::unsupported);
  EXPECT(out.is_poison(0, 4 * 16));
}

TEST(bad_linear_arguments_are_refused) {
  const QuantizedCase p(DType::bfloat16, 4, 16, 32);
  const Elements out(DType::bfloat16, 4 * 16 + 8);
  const auto refused = [&](auto change, Status expected = Status::invalid_argument) {
    QuantizedLinear inputs = p.inputs(Activation::gelu);
    QuantizedRows rows = p.quantized();
    change(inputs, rows);
    EXPECT(cuda::quantized_linear(inputs, rows, out.data(), 16, nullptr) == expected);
  };
  using Linear = QuantizedLinear;
  refused([](Linear& a, auto&) { a.in_features = 24; });
  refused([](Linear& a, auto&) { a.out_features = 12; });
  refused([](Linear& a, auto&) { a.tokens = -1; });
  refused([](Linear& a, auto&) { a.layout = nullptr; });
  refused([](Linear& a, auto&) { a.weight_scale = nullptr; });
  refused([](Linear& a, auto&) { a.weight_scale += 1; });
  refused([](Linear& a, auto&) { a.residual_stride = 20; });
  refused([](Linear& a, auto&) { a.dtype = DType(3); });
  refused([](Linear& a, auto&) { a.bias_dtype = DType::float16; });
  refused([](Linear& a, auto&) { a.activation = Activation(5); });
  refused([](Linear&, auto& rows) { rows.values = nullptr; });
  refused([](Linear&, auto& rows) { rows.scale = nullptr; });
  refused([](Linear&, auto& rows) { rows.stride = 40; });
  refused([](Linear&, auto& rows) { rows.type = QuantizedType(2); });
  refused([](Linear& a, auto&) { a.sparse = false; }, Status::unsupported);
  const Linear good = p.inputs(Activation::none);
  const cuda::Sparse24Config none{80, 32, 32};
  EXPECT(cuda::quantized_linear(good, p.quantized(), nullptr, 16, nullptr) == Status::invalid_argument);
  for (std::int64_t stride : {20, 8, 0, -8})
    EXPECT(cuda::quantized_linear(good, p.quantized(), out.data(), stride, nullptr) ==
           Status::invalid_argument);
  EXPECT(cuda::quantized_linear(good, p.quantized(), out.data(), 16, nullptr, &none) ==
         Status::invalid_argument);
  int count = 0;
  EXPECT(cuda::quantized_linear_configs(good, p.quantized(), nullptr, 1, &count) == Status::invalid_argument);
  EXPECT(cuda::quantized_linear_configs(good, p.quantized(), nullptr, 0, nullptr) ==
         Status::invalid_argument);
  EXPECT(out.is_poison(0, 4 * 16 + 8));
}
