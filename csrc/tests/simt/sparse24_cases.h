// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the tests of CUDA kernels share: memory between guards, a device to pretend, and random 2:4 linear
// layers in bfloat16 or float16, their value in float64, and the error of float32 accumulation in the same
// dtype.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "madtp/sparse24.h"
#include "simt/machine.h"
#include "tests/test.h"

namespace madtp::test {

inline constexpr Activation kActivations[] = {Activation::none, Activation::gelu, Activation::gelu_tanh,
                                              Activation::quick_gelu, Activation::relu};
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Rounds to the nearest, to 16 bits.
inline std::uint16_t encode(float x, DType dtype) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (dtype == DType::bfloat16)
    return x != x ? std::uint16_t(0x7fc0) : std::uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  const unsigned sign = word >> 31 << 15;
  const float magnitude = std::abs(x);
  if (x != x) return std::uint16_t(0x7e00);
  if (magnitude >= 65520) return std::uint16_t(sign | 0x7c00);
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = magnitude == 0 ? -24 : std::max(exponent - 11, -24);
  return std::uint16_t(
      sign | (unsigned((unit + 24) << 10) + unsigned(std::nearbyint(std::ldexp(magnitude, -unit)))));
}

inline float decode(std::uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    const std::uint32_t word = std::uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  float x =
      exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(1024 + fraction), exponent - 25);
  if (exponent == 31) x = fraction == 0 ? std::numeric_limits<float>::infinity() : kNaN;
  return bits >> 15 ? -x : x;
}

// `size` elements of T from a 16-byte boundary on, right before a page that nobody may touch. Every bit is 1
// (a NaN), those around it too, and there they must stay.
template <typename T>
class Guarded {
 public:
  explicit Guarded(std::int64_t size = 0)
      : size_(std::size_t(size)), pages_(std::max(size_ * sizeof(T), std::size_t(1))) {
    std::memset(pages_.data(), 0xff, pages_.bytes());
  }
  Guarded(Guarded&&) = default;
  Guarded& operator=(Guarded&&) = default;
  ~Guarded() {
    const unsigned char *const first = reinterpret_cast<unsigned char*>(data()),
                               *const last = reinterpret_cast<unsigned char*>(data() + size_);
    const auto intact = [](const unsigned char* from, const unsigned char* to) {
      return std::all_of(from, to, [](unsigned char byte) { return byte == 0xff; });
    };
    EXPECT(pages_.data() == nullptr || (intact(pages_.data(), first) && intact(last, pages_.end())));
  }

  T* data() const {
    if (pages_.data() == nullptr) return nullptr;
    return reinterpret_cast<T*>(pages_.end() - (size_ * sizeof(T) + 15) / 16 * 16);
  }
  std::size_t size() const { return size_; }
  T& operator[](std::int64_t i) const { return data()[i]; }
  std::vector<T> values() const { return std::vector<T>(data(), data() + size_); }

 private:
  std::size_t size_;
  simt::GuardedPages pages_;
};

// For a while the machine is of this compute capability, and the kernels are compiled for these.
class Capability {
 public:
  explicit Capability(int capability, const char* archs = simt::options.archs) : before_(simt::options) {
    simt::options.capability = capability;
    simt::options.archs = archs;
  }
  ~Capability() { simt::options = before_; }

 private:
  simt::Options before_;
};

// A weight with random columns in every group, and everything that a linear layer may have. Matrices have
// rows `gap` elements further apart than they are long.
struct LinearCase {
  DType dtype;
  std::int64_t tokens, out_features, in_features, gap;
  bool affine_is_float;
  Guarded<std::uint16_t> values, x, residual;
  Guarded<std::uint8_t> indices, layout;
  Guarded<float> bias, scale;
  Guarded<std::uint16_t> narrow_bias, narrow_scale;

  LinearCase(DType dtype, std::int64_t tokens, std::int64_t out_features, std::int64_t in_features,
             std::int64_t gap = 0, bool affine_is_float = true)
      : dtype(dtype),
        tokens(tokens),
        out_features(out_features),
        in_features(in_features),
        gap(gap),
        affine_is_float(affine_is_float),
        values(out_features * in_features / 2),
        x(tokens * (in_features + gap)),
        residual(tokens * (out_features + gap)),
        indices(out_features * in_features / 8),
        bias(out_features),
        scale(out_features),
        narrow_bias(out_features),
        narrow_scale(out_features) {
    constexpr unsigned nibbles[] = {4, 8, 12, 9, 13, 14};
    std::mt19937 generator(unsigned(tokens * 31 + out_features * 7 + in_features));
    std::normal_distribution<float> normal(0, 1);
    for (std::size_t i = 0; i < indices.size(); ++i)
      indices[std::int64_t(i)] = std::uint8_t(nibbles[generator() % 6] | nibbles[generator() % 6] << 4);
    const auto draw = [&] { return encode(normal(generator), dtype); };
    for (std::size_t i = 0; i < values.size(); ++i) values[std::int64_t(i)] = draw();
    for (std::int64_t r = 0; r < tokens; ++r) {
      for (std::int64_t c = 0; c < in_features; ++c) x[r * (in_features + gap) + c] = draw();
      for (std::int64_t n = 0; n < out_features; ++n) residual[r * (out_features + gap) + n] = draw();
    }
    for (std::int64_t n = 0; n < out_features; ++n) {
      narrow_bias[n] = draw();
      narrow_scale[n] = draw();
      bias[n] = affine_is_float ? normal(generator) : decode(narrow_bias[n], dtype);
      scale[n] = affine_is_float ? normal(generator) : decode(narrow_scale[n], dtype);
    }
    std::int64_t bytes = -1;
    EXPECT(cuda::sparse24_layout_bytes(out_features, in_features, dtype, &bytes) == Status::ok);
    layout = Guarded<std::uint8_t>(bytes);
    EXPECT(cuda::sparse24_pack(weight(), layout.data(), nullptr) == Status::ok);
  }

  Sparse24Weight weight() const { return {dtype, values.data(), indices.data(), out_features, in_features}; }

  Sparse24Linear inputs(Activation activation) const {
    const DType affine = affine_is_float ? DType::float32 : dtype;
    const auto choose = [&](const Guarded<float>& wide, const Guarded<std::uint16_t>& narrow) {
      return affine_is_float ? static_cast<const void*>(wide.data()) : narrow.data();
    };
    return {dtype,        x.data(),        in_features + gap,
            tokens,       layout.data(),   dtype,
            out_features, in_features,     choose(bias, narrow_bias),
            affine,       activation,      choose(scale, narrow_scale),
            affine,       residual.data(), out_features + gap,
            nullptr};
  }
};

template <typename Real>
Real activate(Activation activation, Real x) {
  switch (activation) {
    case Activation::gelu:
      return x * Real(0.5) * std::erfc(-x / std::sqrt(Real(2)));
    case Activation::gelu_tanh:
      return Real(0.5) * x * (1 + std::tanh(std::sqrt(Real(2 / M_PI)) * (x + Real(0.044715) * x * x * x)));
    case Activation::quick_gelu:
      return x / (1 + std::exp(Real(-1.702) * x));
    case Activation::relu:
      return std::max(x, Real(0));
    default:
      return x;
  }
}

// (tokens, out_features), with all of the epilogue that `inputs` has.
template <typename Real>
std::vector<Real> evaluate(const LinearCase& p, const Sparse24Linear& inputs) {
  std::vector<Real> result;
  for (std::int64_t m = 0; m < p.tokens; ++m) {
    for (std::int64_t n = 0; n < p.out_features; ++n) {
      Real sum = 0;
      for (std::int64_t g = 0; g < p.in_features / 4; ++g) {
        const unsigned nibble = p.indices[n * p.in_features / 8 + g / 2] >> (g % 2 * 4) & 15;
        for (int k = 0; k < 2; ++k)
          sum += Real(decode(p.values[n * p.in_features / 2 + 2 * g + k], p.dtype)) *
                 Real(decode(p.x[m * (p.in_features + p.gap) + 4 * g + (nibble >> 2 * k & 3)], p.dtype));
      }
      if (inputs.bias != nullptr) sum += p.bias[n];
      Real y = activate(inputs.activation, sum);
      if (inputs.scale != nullptr) y *= p.scale[n];
      if (inputs.residual != nullptr) y += decode(p.residual[m * (p.out_features + p.gap) + n], p.dtype);
      result.push_back(y);
    }
  }
  return result;
}

// Whether the errors of `got`, rows `stride` apart, are at most twice those of the same dtype.
inline bool within_twice(const LinearCase& p, const Sparse24Linear& inputs, const std::uint16_t* got,
                         std::int64_t stride) {
  const std::vector<double> exact = evaluate<double>(p, inputs);
  const std::vector<float> same = evaluate<float>(p, inputs);
  double error = 0, bound = 0, largest = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const std::int64_t m = std::int64_t(i) / p.out_features, n = std::int64_t(i) % p.out_features;
    const double difference = std::abs(double(decode(got[m * stride + n], p.dtype)) - exact[i]);
    if (!(difference <= error)) error = difference;  // NaN stays
    bound = std::max(bound, std::abs(double(decode(encode(same[i], p.dtype), p.dtype)) - exact[i]));
    largest = std::max(largest, std::abs(exact[i]));
  }
  return error <= 2 * bound + 4 * std::numeric_limits<float>::epsilon() * largest;
}

}  // namespace madtp::test
