// SPDX-License-Identifier: Apache-2.0
#include "madtp/quantized.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Keeps a product from becoming a part of an FMA.
float rounded(float value) {
  volatile float stored = value;
  return stored;
}

// A weight, and everything that a linear layer may have. alike: how likely a group keeps the columns that all
// rows do; below 0 the weight is dense. many_rows: the layout of a 2:4 weight.
struct LinearCase {
  std::int64_t tokens, out_features, in_features;
  bool sparse, many_rows;
  std::vector<std::int8_t> values;
  std::vector<std::uint8_t> indices, layout;
  std::vector<float> x, weight_scale, bias, scale, residual;

  LinearCase(std::int64_t m, std::int64_t n, std::int64_t c, double alike, bool many = false)
      : tokens(m), out_features(n), in_features(c), sparse(alike >= 0), many_rows(many) {
    constexpr unsigned nibbles[] = {4, 8, 12, 9, 13, 14};
    std::mt19937 generator(3);
    std::normal_distribution<float> normal(0, 1);
    std::uniform_real_distribution<double> uniform(0, 1);
    if (sparse) {
      std::vector<unsigned> common;
      for (std::int64_t g = 0; g < c / 4; ++g) common.push_back(nibbles[generator() % 6]);
      for (std::int64_t i = 0; i < n * c / 8; ++i) {
        unsigned byte = 0;
        for (int half = 0; half < 2; ++half) {
          const unsigned nibble = uniform(generator) < alike
                                      ? common[std::size_t(i * 2 + half) % common.size()]
                                      : nibbles[generator() % 6];
          byte |= nibble << 4 * half;
        }
        indices.push_back(std::uint8_t(byte));
      }
    }
    for (std::int64_t i = 0; i < n * c / (sparse ? 2 : 1); ++i)
      values.push_back(std::int8_t(int(generator() % 255) - 127));
    const auto draw = [&](std::vector<float>& to, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) to.push_back(normal(generator));
    };
    draw(x, m * c);
    draw(weight_scale, n);
    for (float& s : weight_scale) s = std::abs(s) / 64 + 1e-3f;
    draw(bias, n);
    draw(scale, n);
    draw(residual, m * n);
    std::int64_t bytes = -1;
    EXPECT(cpu::quantized_layout_bytes(n, c, sparse, &bytes, many_rows) == Status::ok);
    layout.resize(std::size_t(bytes), 0xff);
    EXPECT(cpu::quantized_pack(weight(), layout.data(), 2) == Status::ok);
  }

  QuantizedWeight weight() const {
    return {values.data(), sparse ? indices.data() : nullptr, out_features, in_features, many_rows};
  }

  QuantizedLinear inputs(Activation activation = Activation::none) const {
    return {DType::float32,      x.data(),       in_features,     tokens,       layout.data(),  sparse,
            weight_scale.data(), out_features,   in_features,     bias.data(),  DType::float32, activation,
            scale.data(),        DType::float32, residual.data(), out_features, nullptr,        many_rows};
  }

  std::vector<float> run(const QuantizedLinear& inputs, int threads = 1) const {
    std::vector<float> out(std::size_t(inputs.tokens * out_features), kNaN);
    EXPECT(cpu::quantized_linear(inputs, out.data(), out_features, threads) == Status::ok);
    return out;
  }

  int dense_weight(std::int64_t n, std::int64_t c) const {
    if (!sparse) return values[std::size_t(n * in_features + c)];
    const std::int64_t group = c / 4;
    const unsigned nibble = indices[std::size_t(n * in_features / 8 + group / 2)] >> (group % 2 * 4) & 15;
    const std::int8_t* const value = &values[std::size_t(n * in_features / 2 + 2 * group)];
    return unsigned(c % 4) == (nibble & 3) ? value[0] : unsigned(c % 4) == nibble >> 2 ? value[1] : 0;
  }
};

// Of a 2:4 weight both layouts are tried.
std::vector<bool> layouts(double alike) {
  return alike < 0 ? std::vector<bool>{false} : std::vector<bool>{false, true};
}

// What madtp/quantized.h says, one operation after another.
std::vector<float> expected(const LinearCase& p, Activation activation) {
  std::vector<float> result;
  std::vector<int> q(std::size_t(p.in_features));
  for (std::int64_t m = 0; m < p.tokens; ++m) {
    const float* const x = p.x.data() + m * p.in_features;
    float amax = 0, scale = 0;
    for (std::int64_t c = 0; c < p.in_features; ++c)
      amax = std::isnan(x[c]) || std::isnan(amax) ? kNaN : std::max(amax, std::abs(x[c]));
    std::fill(q.begin(), q.end(), 0);
    if (!std::isfinite(amax)) {
      scale = kNaN;
    } else if (amax >= std::ldexp(1.0f, -119)) {
      scale = amax / 127.0f;
      const float inverse = 127.0f / amax;
      for (std::int64_t c = 0; c < p.in_features; ++c)
        q[std::size_t(c)] = int(std::nearbyint(rounded(x[c] * inverse)));
    }
    for (std::int64_t n = 0; n < p.out_features; ++n) {
      std::int64_t sum = 0;
      for (std::int64_t c = 0; c < p.in_features; ++c) sum += q[std::size_t(c)] * p.dense_weight(n, c);
      float y =
          rounded(rounded(float(sum) * scale) * p.weight_scale[std::size_t(n)]) + p.bias[std::size_t(n)];
      if (activation == Activation::relu) y = 0.0f > y ? 0.0f : y;
      y = rounded(y * p.scale[std::size_t(n)]) + p.residual[std::size_t(m * p.out_features + n)];
      result.push_back(y);
    }
  }
  return result;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && std::memcmp(&a[i], &b[i], sizeof(float)) != 0)
      return false;
  return true;
}

constexpr std::int64_t kShapes[][3] = {{0, 8, 16},    {1, 8, 16},     {3, 24, 48},
                                       {8, 264, 64},  {9, 16, 144},   {13, 520, 80},
                                       {25, 40, 208}, {61, 104, 128}, {47, 32, 1040}};

}  // namespace

TEST(quantized_linear_has_the_bits_of_its_equation) {
  for (const auto& shape : kShapes) {
    for (double alike : {-1.0, 0.0, 0.6, 0.9, 1.0}) {
      for (bool many_rows : layouts(alike)) {
        LinearCase p(shape[0], shape[1], shape[2], alike, many_rows);
        if (p.tokens > 8) {
          std::fill_n(p.x.begin() + 2 * p.in_features, p.in_features, 0.0f);
          std::fill_n(p.x.begin() + 3 * p.in_features, p.in_features, 1e-37f);
          p.x[std::size_t(4 * p.in_features + 5)] = kNaN;
          p.x[std::size_t(5 * p.in_features + 15)] = -std::numeric_limits<float>::infinity();
        }
        for (Activation activation : {Activation::none, Activation::relu})
          EXPECT(same_bits(p.run(p.inputs(activation)), expected(p, activation)));
      }
    }
  }
}

TEST(a_dense_weight_has_any_sizes) {
  for (const auto& shape : {std::pair{1, 1}, {7, 5}, {33, 63}, {9, 65}, {300, 133}}) {
    const LinearCase p(14, shape.first, shape.second, -1);
    EXPECT(same_bits(p.run(p.inputs()), expected(p, Activation::none)));
  }
}

TEST(quantized_results_do_not_depend_on_threads_or_rows) {
  for (double alike : {-1.0, 0.5}) {
    for (bool many_rows : layouts(alike)) {
      const LinearCase p(70, 296, 144, alike, many_rows);
      const std::vector<float> all = p.run(p.inputs(Activation::gelu));
      for (int threads : {2, 3, 8}) EXPECT(same_bits(p.run(p.inputs(Activation::gelu), threads), all));
      for (std::int64_t count : {1, 2, 5, 12, 13, 24, 25, 33, 49}) {
        QuantizedLinear some = p.inputs(Activation::gelu);
        some.x = p.x.data() + 7 * p.in_features;
        some.residual = p.residual.data() + 7 * p.out_features;
        some.tokens = count;
        const auto first = all.begin() + 7 * p.out_features;
        EXPECT(same_bits(p.run(some), {first, first + count * p.out_features}));
      }
    }
  }
}

// A few rows share the output features among threads, more of them than a task would otherwise have.
TEST(few_quantized_rows_do_not_depend_on_threads) {
  for (std::int64_t tokens : {1, 3}) {
    const LinearCase p(tokens, 1032, 272, 0.5);
    const std::vector<float> alone = p.run(p.inputs());
    EXPECT(same_bits(alone, expected(p, Activation::none)));
    for (int threads : {2, 5}) EXPECT(same_bits(p.run(p.inputs(), threads), alone));
  }
}

TEST(a_sparse_layout_is_smaller_than_a_dense_one) {
  std::int64_t sparse = 0, many_rows = 0, dense = 0;
  EXPECT(cpu::quantized_layout_bytes(768, 768, true, &sparse) == Status::ok);
  EXPECT(cpu::quantized_layout_bytes(768, 768, true, &many_rows, true) == Status::ok);
  EXPECT(cpu::quantized_layout_bytes(768, 768, false, &dense) == Status::ok);
  EXPECT(sparse <= many_rows && double(sparse) < 0.8 * double(dense));
  std::int64_t same = 0;
  EXPECT(cpu::quantized_layout_bytes(768, 768, false, &same, true) == Status::ok && same == dense);
}

TEST(quantized_rows_past_num_rows_are_zeros) {
  LinearCase p(20, 40, 64, 0.5);
  const std::vector<float> all = p.run(p.inputs());
  QuantizedLinear some = p.inputs();
  const std::int32_t num_rows = 13;
  some.num_rows = &num_rows;
  std::fill(p.x.begin() + 13 * p.in_features, p.x.end(), kNaN);
  const std::vector<float> out = p.run(some);
  EXPECT(std::equal(all.begin(), all.begin() + 13 * 40, out.begin()));
  for (std::size_t i = 13 * 40; i < out.size(); ++i) EXPECT(out[i] == 0);
}

TEST(quantized_sums_are_exact_at_the_most_input_features) {
  LinearCase p(1, 8, kMaxQuantizedInFeatures, -1);
  std::fill(p.values.begin(), p.values.end(), std::int8_t(-127));
  std::fill(p.x.begin(), p.x.end(), -1.0f);
  EXPECT(cpu::quantized_pack(p.weight(), p.layout.data(), 1) == Status::ok);
  EXPECT(same_bits(p.run(p.inputs()), expected(p, Activation::none)));
}

TEST(quantized_weight_without_columns_has_the_bytes_that_are_said) {
  // It has no indices either, so nothing tells that it is 2:4.
  for (const bool many_rows : {false, true}) {
    std::int64_t bytes = -1;
    EXPECT(cpu::quantized_layout_bytes(16, 0, true, &bytes, many_rows) == Status::ok);
    std::vector<unsigned char> layout(std::size_t(bytes + 256), 0xab);
    EXPECT(cpu::quantized_pack({nullptr, nullptr, 16, 0, many_rows}, layout.data(), 1) == Status::ok);
    for (std::size_t i = std::size_t(bytes); i < layout.size(); ++i) EXPECT(layout[i] == 0xab);
  }
}

TEST(quantized_arguments_are_checked) {
  const LinearCase p(4, 16, 32, 0.5);
  std::int64_t bytes = 0;
  EXPECT(cpu::quantized_layout_bytes(12, 32, true, &bytes) == Status::invalid_argument);
  EXPECT(cpu::quantized_layout_bytes(16, 24, true, &bytes) == Status::invalid_argument);
  EXPECT(cpu::quantized_layout_bytes(16, kMaxQuantizedInFeatures + 16, false, &bytes) ==
         Status::invalid_argument);
  EXPECT(cpu::quantized_layout_bytes(-1, 32, false, &bytes) == Status::invalid_argument);
  EXPECT(cpu::quantized_layout_bytes(16, 32, false, nullptr) == Status::invalid_argument);
  std::vector<std::uint8_t> equal(p.indices.size(), 0), layout = p.layout;
  QuantizedWeight weight = p.weight();
  weight.indices = equal.data();
  EXPECT(cpu::quantized_pack(weight, layout.data(), 1) == Status::invalid_argument);
  EXPECT(cpu::quantized_pack(p.weight(), nullptr, 1) == Status::invalid_argument);
  std::vector<float> out(4 * 16);
  const auto refused = [&](auto change) {
    QuantizedLinear inputs = p.inputs();
    change(inputs);
    return cpu::quantized_linear(inputs, out.data(), 16, 1) == Status::invalid_argument;
  };
  EXPECT(refused([](QuantizedLinear& a) { a.x = nullptr; }));
  EXPECT(refused([](QuantizedLinear& a) { a.layout = nullptr; }));
  EXPECT(refused([](QuantizedLinear& a) { a.weight_scale = nullptr; }));
  EXPECT(refused([](QuantizedLinear& a) { a.tokens = -1; }));
  EXPECT(refused([](QuantizedLinear& a) { a.in_features = 24; }));
  EXPECT(refused([](QuantizedLinear& a) { a.bias_dtype = DType::float16; }));
  EXPECT(refused([](QuantizedLinear& a) { a.activation = Activation(9); }));
  EXPECT(cpu::quantized_linear(p.inputs(), out.data(), 16, 0) == Status::invalid_argument);
  for (std::int64_t stride : {0, 8, 15, -8})  // rows that would overwrite each other
    EXPECT(cpu::quantized_linear(p.inputs(), out.data(), stride, 1) == Status::invalid_argument);
}

// What a layout holds is not trusted: any bytes give some numbers, and read and write nothing else.
TEST(a_broken_layout_stays_in_its_memory) {
  for (double alike : {-1.0, 0.9}) {
    for (bool many_rows : layouts(alike)) {
      LinearCase p(26, 72, 208, alike, many_rows);
      std::mt19937 generator(5);
      for (int fill : {0, 255, -1}) {
        for (std::uint8_t& byte : p.layout) byte = std::uint8_t(fill < 0 ? generator() : unsigned(fill));
        EXPECT(p.run(p.inputs(), 2).size() == 26 * 72);
      }
    }
  }
}
