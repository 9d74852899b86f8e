// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random quantised 2:4 layers, int8 or e4m3, and what the CPU makes of them, or float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "madtp/quantized.h"
#include "simt/matrix.h"
#include "tests/simt/sparse24_cases.h"

namespace madtp::test {

using cuda::QuantizedRows;
using cuda::QuantizedType;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Elements of float32, bfloat16 or float16.
class Elements {
 public:
  Elements(DType dtype, std::int64_t size)
      : dtype_(dtype), size_(size), bytes_(size * (dtype == DType::float32 ? 4 : 2)) {}
  void set(std::int64_t i, float x) const {
    if (dtype_ == DType::float32) {
      std::memcpy(bytes_.data() + 4 * i, &x, 4);
    } else {
      const std::uint16_t bits = encode(x, dtype_);
      std::memcpy(bytes_.data() + 2 * i, &bits, 2);
    }
  }
  float get(std::int64_t i) const {
    float x;
    std::uint16_t bits;
    std::memcpy(&x, bytes_.data() + 4 * i * (dtype_ == DType::float32), 4 * (dtype_ == DType::float32));
    if (dtype_ == DType::float32) return x;
    std::memcpy(&bits, bytes_.data() + 2 * i, 2);
    return decode(bits, dtype_);
  }
  void* data() const { return bytes_.data(); }
  // Bits of NaN are of no concern.
  bool same(const Elements& other) const {
    for (std::int64_t i = 0; i < size_; ++i) {
      const float a = get(i), b = other.get(i);
      if (!(std::isnan(a) && std::isnan(b)) && (a != b || std::signbit(a) != std::signbit(b))) return false;
    }
    return true;
  }
  bool is_poison(std::int64_t from, std::int64_t to) const {
    const std::int64_t size = dtype_ == DType::float32 ? 4 : 2;
    return std::all_of(bytes_.data() + from * size, bytes_.data() + to * size,
                       [](std::uint8_t byte) { return byte == 0xff; });
  }

 private:
  DType dtype_;
  std::int64_t size_;
  Guarded<std::uint8_t> bytes_;
};

inline float largest_of(QuantizedType type) { return type == QuantizedType::int8 ? 127 : 448; }

inline float value_of(std::uint8_t bits, QuantizedType type) {
  return type == QuantizedType::int8 ? float(std::int8_t(bits)) : simt::e4m3_to_float(bits);
}

// The nearest of e4m3, of equally near ones the even, by trying all.
inline std::uint8_t nearest_e4m3(float x) {
  int best = 0;
  for (int bits = 0; bits < 127; ++bits) {
    const double now = std::abs(double(std::abs(x)) - double(simt::e4m3_to_float(unsigned(bits))));
    const double before = std::abs(double(std::abs(x)) - double(simt::e4m3_to_float(unsigned(best))));
    if (now < before || (now == before && bits % 2 == 0)) best = bits;
  }
  return std::uint8_t(best | (std::signbit(x) ? 128 : 0));
}

struct QuantizedCase {
  DType dtype;
  QuantizedType type;
  std::int64_t tokens, out_features, in_features, gap;
  bool affine_is_float;
  Guarded<std::uint8_t> values, indices, layout, rows;
  Guarded<float> weight_scale, x_scale;
  Elements x, residual, bias, scale;

  QuantizedCase(DType dtype, std::int64_t tokens, std::int64_t out_features, std::int64_t in_features,
                QuantizedType type = QuantizedType::int8, std::int64_t gap = 0, bool affine_is_float = true)
      : dtype(dtype),
        type(type),
        tokens(tokens),
        out_features(out_features),
        in_features(in_features),
        gap(gap),
        affine_is_float(affine_is_float),
        values(out_features * in_features / 2),
        indices(out_features * in_features / 8),
        rows(tokens * (in_features + 2 * gap)),
        weight_scale(out_features),
        x_scale(tokens),
        x(dtype, tokens * (in_features + gap)),
        residual(dtype, tokens * (out_features + gap)),
        bias(affine(), out_features),
        scale(affine(), out_features) {
    constexpr unsigned nibbles[] = {4, 8, 12, 9, 13, 14};
    std::mt19937 generator(unsigned(tokens * 31 + out_features * 7 + in_features));
    std::normal_distribution<float> normal(0, 1);
    for (std::size_t i = 0; i < indices.size(); ++i)
      indices[std::int64_t(i)] = std::uint8_t(nibbles[generator() % 6] | nibbles[generator() % 6] << 4);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[std::int64_t(i)] = type == QuantizedType::int8 ? std::uint8_t(int(generator() % 255) - 127)
                                                            : nearest_e4m3(100 * normal(generator));
    for (std::int64_t n = 0; n < out_features; ++n) {
      weight_scale[n] = std::exp(normal(generator)) / largest_of(type) / 8;
      bias.set(n, normal(generator));
      scale.set(n, normal(generator));
    }
    for (std::int64_t r = 0; r < tokens; ++r) {
      const float factor = std::exp(normal(generator));
      for (std::int64_t c = 0; c < in_features; ++c)
        x.set(r * (in_features + gap) + c, factor * normal(generator));
      for (std::int64_t n = 0; n < out_features; ++n)
        residual.set(r * (out_features + gap) + n, normal(generator));
    }
    std::int64_t bytes = -1;
    EXPECT(cuda::quantized_layout_bytes(out_features, in_features, &bytes) == Status::ok);
    layout = Guarded<std::uint8_t>(bytes);
    EXPECT(cuda::quantized_pack(weight(), layout.data(), nullptr) == Status::ok);
  }

  DType affine() const { return affine_is_float ? DType::float32 : dtype; }

  QuantizedWeight weight() const {
    return {reinterpret_cast<const std::int8_t*>(values.data()), indices.data(), out_features, in_features};
  }

  QuantizedRows quantized() const { return {type, rows.data(), in_features + 2 * gap, x_scale.data()}; }

  // Writes them, all or those before num_rows.
  void quantize(const std::int32_t* num_rows = nullptr) const {
    EXPECT(cuda::quantize_rows(dtype, x.data(), in_features + gap, tokens, in_features, num_rows, quantized(),
                               nullptr) == Status::ok);
  }

  QuantizedLinear inputs(Activation activation) const {
    return {dtype,
            x.data(),
            in_features + gap,
            tokens,
            layout.data(),
            true,
            weight_scale.data(),
            out_features,
            in_features,
            bias.data(),
            affine(),
            activation,
            scale.data(),
            affine(),
            residual.data(),
            out_features + gap,
            nullptr};
  }

  // By the CPU kernel, rows out_features + gap apart.
  Elements by_cpu(QuantizedLinear inputs) const {
    std::int64_t bytes = -1;
    EXPECT(cpu::quantized_layout_bytes(out_features, in_features, true, &bytes) == Status::ok);
    const std::vector<std::uint64_t> memory(std::size_t(bytes / 8 + 16));
    char* const aligned =
        reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    EXPECT(cpu::quantized_pack(weight(), aligned, 1) == Status::ok);
    inputs.layout = aligned;
    Elements out(dtype, tokens * (out_features + gap));
    EXPECT(cpu::quantized_linear(inputs, out.data(), out_features + gap, 1) == Status::ok);
    return out;
  }

  // In float64 from the quantised rows; `term` is the sum of the magnitudes of what it is made of.
  double exact(const QuantizedLinear& a, std::int64_t m, std::int64_t n, double* term) const {
    double sum = 0, magnitude = 0;
    for (std::int64_t g = 0; g < in_features / 4; ++g) {
      const unsigned nibble = indices[n * in_features / 8 + g / 2] >> (g % 2 * 4) & 15;
      for (int k = 0; k < 2; ++k) {
        const double product =
            double(value_of(values[n * in_features / 2 + 2 * g + k], type)) *
            double(value_of(rows[m * (in_features + 2 * gap) + 4 * g + (nibble >> 2 * k & 3)], type));
        sum += product, magnitude += std::abs(product);
      }
    }
    const double factor = double(x_scale[m]) * double(weight_scale[n]);
    sum *= factor, magnitude *= factor;
    if (a.bias != nullptr) sum += double(bias.get(n)), magnitude += std::abs(double(bias.get(n)));
    double y = activate(a.activation, sum);
    if (a.scale != nullptr) y *= double(scale.get(n)), magnitude *= std::abs(double(scale.get(n)));
    if (a.residual != nullptr) {
      const double before = double(residual.get(m * (out_features + gap) + n));
      y += before, magnitude += std::abs(before);
    }
    *term = magnitude + std::abs(y);
    return y;
  }
};

// Whether every output is within the rounding of its dtype, and of sums in float32, of the one in float64. An
// activation is off by 3.5e-5 of its result at most, and its slope is below 1.2.
inline bool is_near(const QuantizedCase& p, const QuantizedLinear& a, const Elements& got) {
  const double unit = p.dtype == DType::bfloat16 ? 0x1p-8 : p.dtype == DType::float16 ? 0x1p-11 : 0x1p-24;
  for (std::int64_t m = 0; m < p.tokens; ++m) {
    for (std::int64_t n = 0; n < p.out_features; ++n) {
      double term = 0;
      const double y = p.exact(a, m, n, &term);
      const double bound = std::abs(y) * unit + term * (0x1p-19 + 5e-5 * (a.activation != Activation::none));
      if (!(std::abs(double(got.get(m * (p.out_features + p.gap) + n)) - y) <= bound + 1e-6)) return false;
    }
  }
  return true;
}

}  // namespace madtp::test
