// SPDX-License-Identifier: Apache-2.0
// Quantised layers by wgmma.sp, as quantized_linear_test.cpp has them by mma.sp.

#include <utility>

#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/model_sm90.h"
#include "tests/simt/quantized_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr QuantizedType kTypes[] = {QuantizedType::int8, QuantizedType::e4m3};

Elements run(const QuantizedCase& p, const QuantizedLinear& inputs, const cuda::Sparse24Config& config,
             int multiprocessors = 5) {
  const std::int64_t stride = p.out_features + p.gap;
  Elements out(p.dtype, inputs.tokens * stride);
  p.quantize(inputs.num_rows);
  const int before =
      std::exchange(simt::options.multiprocessors, multiprocessors);  // fewer than tiles, and odd
  EXPECT(cuda::quantized_linear(inputs, p.quantized(), out.data(), stride, nullptr, &config) == Status::ok);
  simt::options.multiprocessors = before;
  for (std::int64_t r = 0; r < inputs.tokens; ++r)
    EXPECT(out.is_poison(r * stride + p.out_features, (r + 1) * stride));
  return out;
}

void expect_right(const QuantizedCase& p, const QuantizedLinear& inputs, const Elements& got) {
  const bool is_exact = inputs.activation == Activation::none || inputs.activation == Activation::relu;
  if (p.type == QuantizedType::int8 && is_exact) {
    EXPECT(got.same(p.by_cpu(inputs)));
  } else {
    EXPECT(is_near(p, inputs, got));
  }
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
  for (QuantizedType type : kTypes) {
    constexpr std::int64_t sizes[][3] = {{1, 8, 16}, {63, 136, 176}, {130, 264, 272}};
    for (const auto& [tokens, out_features, in_features] : sizes) {
      const QuantizedCase p(turn % 2 ? DType::float16 : DType::bfloat16, tokens, out_features, in_features,
                            type);
      for_each_config([&](const cuda::Sparse24Config& config) {
        const Activation activation = turn % 3 == 0 ? kActivations[turn % 5] : Activation::none;
        ++turn;
        const QuantizedLinear inputs = p.inputs(activation);
        expect_right(p, inputs, run(p, inputs, config));
      });
    }
  }
}

TEST(more_steps_than_stages_and_warpgroups_that_take_turns) {
  // On one block nine tiles, on a cluster of 4 three.
  for (QuantizedType type : kTypes) {
    const QuantizedCase p(DType::bfloat16, 300, 264, 128 * 13 + 16, type);
    QuantizedLinear inputs = p.inputs(Activation::none);
    for (int cluster : {1, 4}) {
      inputs.num_rows = nullptr;
      const Elements all = run(p, inputs, {90, 128, 128, cluster}, cluster);
      expect_right(p, inputs, all);
      const std::int32_t num_rows = 200;  // the last row of tiles is left out
      inputs.num_rows = &num_rows;
      const Elements got = run(p, inputs, {90, 128, 128, cluster}, cluster);
      for (std::int64_t i = 0; i < 300 * 264; ++i)
        EXPECT(got.get(i) == (i < num_rows * 264 ? all.get(i) : 0));
    }
  }
}

TEST(rows_past_num_rows_are_zeros) {
  const QuantizedCase p(DType::float16, 150, 136, 144);
  for_each_config([&](const cuda::Sparse24Config& config) {
    for (std::int32_t num_rows : {149, 64, 0}) {
      QuantizedLinear inputs = p.inputs(Activation::relu);
      inputs.num_rows = &num_rows;
      EXPECT(run(p, inputs, config).same(p.by_cpu(inputs)));
    }
  });
}

TEST(rows_may_lie_apart_and_parts_of_the_epilogue_be_missing) {
  const QuantizedCase p(DType::bfloat16, 70, 40, 144, QuantizedType::int8, 16, false);
  int parts = 0;
  for_each_config([&](const cuda::Sparse24Config& config) {
    QuantizedLinear inputs = p.inputs(parts % 3 == 0 ? Activation::relu : Activation::none);
    if (parts & 1) inputs.bias = nullptr;
    if (parts & 2) inputs.scale = nullptr;
    if (parts & 4) inputs.residual = nullptr;
    ++parts;
    expect_right(p, inputs, run(p, inputs, config));
  });
}

TEST(a_row_with_no_number_is_nan) {
  for (QuantizedType type : kTypes) {
    const QuantizedCase p(DType::bfloat16, 70, 24, 48, type);
    p.x.set(65 * 48 + 5, kNaN);
    const Elements got = run(p, p.inputs(Activation::none), {90, 64, 128});
    for (std::int64_t i = 0; i < 70 * 24; ++i) EXPECT(std::isnan(got.get(i)) == (i / 24 == 65));
  }
}

TEST(the_public_function_runs_it_unasked) {
  const Capability pretended(90);
  for (QuantizedType type : kTypes) {
    const QuantizedCase p(DType::bfloat16, 5, 8, 128 * 24, type);
    const QuantizedLinear inputs = p.inputs(Activation::gelu);
    p.quantize();
    const Elements out(p.dtype, 5 * 8);
    EXPECT(cuda::quantized_linear(inputs, p.quantized(), out.data(), 8, nullptr) == Status::ok);
    EXPECT(out.same(run(p, inputs, {90, 64, 128})));
  }
}
