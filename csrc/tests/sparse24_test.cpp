// SPDX-License-Identifier: Apache-2.0
#include "madtp/sparse24.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Activation kActivations[] = {Activation::none, Activation::gelu, Activation::gelu_tanh,
                                       Activation::quick_gelu, Activation::relu};

// A weight with random columns in every group, and everything that a linear layer may have.
struct LinearCase {
  std::int64_t tokens, out_features, in_features;
  std::vector<float> values, x, bias, scale, residual;
  std::vector<std::uint8_t> indices, layout;

  LinearCase(std::int64_t m, std::int64_t n, std::int64_t c) : tokens(m), out_features(n), in_features(c) {
    constexpr unsigned nibbles[] = {4, 8, 12, 9, 13, 14};
    std::mt19937 generator(3);
    std::normal_distribution<float> normal(0, 1);
    for (std::int64_t i = 0; i < n * c / 8; ++i)
      indices.push_back(std::uint8_t(nibbles[generator() % 6] | nibbles[generator() % 6] << 4));
    const auto draw = [&](std::vector<float>& to, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) to.push_back(normal(generator));
    };
    draw(values, n * c / 2);
    draw(x, m * c);
    draw(bias, n);
    draw(scale, n);
    draw(residual, m * n);
    std::int64_t bytes = -1;
    EXPECT(cpu::sparse24_layout_bytes(n, c, DType::float32, &bytes) == Status::ok);
    layout.resize(std::size_t(bytes));
    EXPECT(cpu::sparse24_pack(weight(), layout.data(), 2) == Status::ok);
  }

  Sparse24Weight weight() const {
    return {DType::float32, values.data(), indices.data(), out_features, in_features};
  }

  Sparse24Linear inputs(Activation activation) const {
    return {DType::float32, x.data(),        in_features,  tokens,         layout.data(), DType::float32,
            out_features,   in_features,     bias.data(),  DType::float32, activation,    scale.data(),
            DType::float32, residual.data(), out_features, nullptr};
  }

  std::vector<float> run(const Sparse24Linear& inputs, int threads = 1) const {
    std::vector<float> out(std::size_t(inputs.tokens * out_features), kNaN);
    EXPECT(cpu::sparse24_linear(inputs, out.data(), out_features, threads) == Status::ok);
    return out;
  }
};

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::quick_gelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::relu:
      return std::max(x, 0.0);
    default:
      return x;
  }
}

std::vector<float> expected(const LinearCase& p, Activation activation) {
  std::vector<float> result;
  for (std::int64_t m = 0; m < p.tokens; ++m) {
    for (std::int64_t n = 0; n < p.out_features; ++n) {
      double sum = p.bias[n];
      for (std::int64_t g = 0; g < p.in_features / 4; ++g) {
        const unsigned nibble = p.indices[n * p.in_features / 8 + g / 2] >> (g % 2 * 4) & 15;
        const float* const value = &p.values[n * p.in_features / 2 + 2 * g];
        const float* const x = &p.x[m * p.in_features + 4 * g];
        sum += double(value[0]) * x[nibble & 3] + double(value[1]) * x[nibble >> 2];
      }
      result.push_back(float(p.residual[m * p.out_features + n] + p.scale[n] * activate(activation, sum)));
    }
  }
  return result;
}

bool same_bits(const float* a, const float* b, std::int64_t count) {
  return std::memcmp(a, b, std::size_t(count) * sizeof(float)) == 0;
}

}  // namespace

TEST(sparse24_linear_follows_its_equation) {
  const std::int64_t shapes[][3] = {{0, 8, 16},   {1, 8, 16},    {3, 24, 48},   {8, 264, 64},
                                    {9, 16, 144}, {21, 520, 80}, {70, 40, 208}, {131, 776, 128}};
  for (const auto& shape : shapes) {
    const LinearCase p(shape[0], shape[1], shape[2]);
    for (Activation activation : kActivations) {
      const std::vector<float> wanted = expected(p, activation), got = p.run(p.inputs(activation));
      for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(got[i], wanted[i], 2e-4);
    }
  }
}

TEST(no_bit_of_a_row_depends_on_other_rows_or_threads) {
  const LinearCase p(230, 280, 208);
  const std::vector<float> all = p.run(p.inputs(Activation::gelu));
  for (int threads : {2, 3, 40}) EXPECT(p.run(p.inputs(Activation::gelu), threads) == all);
  for (std::int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 50, 65, 90, 120, 150, 200}) {
    Sparse24Linear part = p.inputs(Activation::gelu);
    part.tokens = tokens;
    part.x = p.x.data() + 11 * p.in_features;
    part.residual = p.residual.data() + 11 * p.out_features;
    for (int threads : {1, 3})
      EXPECT(
          same_bits(p.run(part, threads).data(), all.data() + 11 * p.out_features, tokens * p.out_features));
  }
}

TEST(rows_past_num_rows_are_zeros) {
  LinearCase p(40, 24, 32);
  const std::vector<float> all = p.run(p.inputs(Activation::relu));
  std::fill(p.x.begin() + 30 * 32, p.x.end(), kNaN);
  for (std::int32_t num_rows : {-5, 0, 1, 7, 30, 1000}) {
    Sparse24Linear inputs = p.inputs(Activation::relu);
    inputs.num_rows = &num_rows;
    inputs.tokens = num_rows == 1000 ? 30 : 40;
    const std::vector<float> got = p.run(inputs, 2);
    const std::int64_t real = std::clamp<std::int64_t>(num_rows, 0, inputs.tokens);
    EXPECT(same_bits(got.data(), all.data(), real * 24));
    for (std::size_t i = std::size_t(real * 24); i < got.size(); ++i) EXPECT(got[i] == 0);
  }
}

TEST(strides_and_missing_parts) {
  const LinearCase p(20, 16, 32);
  Sparse24Linear inputs = p.inputs(Activation::none);
  inputs.bias = inputs.scale = inputs.residual = nullptr;
  const std::vector<float> plain = p.run(inputs);
  inputs.tokens = 10;
  inputs.x_stride = 64;  // every other row
  std::vector<float> out(10 * 20, kNaN);
  EXPECT(cpu::sparse24_linear(inputs, out.data(), 20, 1) == Status::ok);
  for (std::int64_t row = 0; row < 10; ++row) {
    EXPECT(same_bits(&out[row * 20], &plain[row * 2 * 16], 16));
    EXPECT(std::isnan(out[row * 20 + 16]));
  }
}

TEST(a_layout_is_small_and_depends_on_the_weight_alone) {
  std::int64_t bytes = 0;
  for (std::int64_t in_features : {64, 768, 784, 3072}) {
    EXPECT(cpu::sparse24_layout_bytes(768, in_features, DType::float32, &bytes) == Status::ok);
    EXPECT(double(bytes) <= 0.7 * 4 * 768 * double(in_features));
  }
  const LinearCase p(1, 776, 208);
  std::vector<std::uint8_t> other(p.layout.size(), 255);
  EXPECT(cpu::sparse24_pack(p.weight(), other.data(), 5) == Status::ok);
  EXPECT(other == p.layout);
}

TEST(any_layout_is_memory_safe) {
  LinearCase p(37, 40, 80);
  std::mt19937 generator(5);
  for (std::uint8_t& byte : p.layout) byte = std::uint8_t(generator());
  for (std::int64_t tokens : {1, 5, 12, 37}) {
    Sparse24Linear inputs = p.inputs(Activation::none);
    inputs.tokens = tokens;
    p.run(inputs);
  }
}

TEST(bad_sparse24_arguments_are_refused) {
  const LinearCase p(4, 16, 32);
  std::vector<float> out(4 * 16, 5);
  const auto refused = [&](auto change) {
    Sparse24Linear inputs = p.inputs(Activation::gelu);
    change(inputs);
    EXPECT(cpu::sparse24_linear(inputs, out.data(), 16, 1) == Status::invalid_argument);
  };
  refused([](Sparse24Linear& a) { a.in_features = 24; });
  refused([](Sparse24Linear& a) { a.out_features = 12; });
  refused([](Sparse24Linear& a) { a.tokens = -1; });
  refused([](Sparse24Linear& a) { a.x = nullptr; });
  refused([](Sparse24Linear& a) { a.layout = nullptr; });
  refused([](Sparse24Linear& a) { a.dtype = DType(3); });
  refused([](Sparse24Linear& a) { a.weight_dtype = DType::float16; });
  refused([](Sparse24Linear& a) { a.bias_dtype = DType::bfloat16; });
  refused([](Sparse24Linear& a) { a.scale_dtype = DType(7); });
  refused([](Sparse24Linear& a) { a.activation = Activation(5); });
  EXPECT(cpu::sparse24_linear(p.inputs(Activation::none), out.data(), 16, 0) == Status::invalid_argument);
  for (std::int64_t stride : {0, 8, 15, -8})  // rows that would overwrite each other
    EXPECT(cpu::sparse24_linear(p.inputs(Activation::none), out.data(), stride, 1) ==
           Status::invalid_argument);
  EXPECT((out == std::vector<float>(4 * 16, 5)));

  std::vector<std::uint8_t> layout(p.layout.size(), 9);
  for (unsigned nibble : {0u, 1u, 5u, 6u, 10u, 15u, 2u, 3u, 7u, 11u}) {  // i0 >= i1
    for (unsigned shift : {0u, 4u}) {
      LinearCase broken = p;
      broken.indices[17] = std::uint8_t((broken.indices[17] & ~(15u << shift)) | nibble << shift);
      EXPECT(cpu::sparse24_pack(broken.weight(), layout.data(), 1) == Status::invalid_argument);
    }
  }
  Sparse24Weight odd = p.weight();
  odd.in_features = 40;
  EXPECT(cpu::sparse24_pack(odd, layout.data(), 1) == Status::invalid_argument);
  EXPECT((layout == std::vector<std::uint8_t>(p.layout.size(), 9)));
  std::int64_t bytes = 1;
  EXPECT(cpu::sparse24_layout_bytes(12, 32, DType::float32, &bytes) == Status::invalid_argument);
  EXPECT(cpu::sparse24_layout_bytes(16, 32, DType(3), &bytes) == Status::invalid_argument);
}
