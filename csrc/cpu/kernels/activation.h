// SPDX-License-Identifier: Apache-2.0
#pragma once

// Activations, vector by vector.

#include "cpu/kernels/vec.h"
#include "madtp/sparse24.h"

namespace madtp::cpu::MADTP_ISA {

inline Vec absolute(Vec x) { return bit_cast<Vec>(bit_cast<BitVec>(x) & 0x7fffffffu); }

// e^x for x <= 0; zero where that is no normal number, so that large inputs vanish.
inline Vec exp_nonpositive(Vec x) { return exp2_nonpositive(x * 1.44269504f); }

inline Vec sigmoid(Vec x) {
  const Vec e = exp_nonpositive(-absolute(x));
  return select(x < Vec{}, e, broadcast(1.0f)) / (1.0f + e);
}

// x Phi(x) to float accuracy. Beyond about 1 the small tail erfc = e^p comes first, so that negative x lose
// nothing; the polynomials are minimax fits of log(erfc(t)) and of erf(t) / t.
inline Vec gelu(Vec x) {
  const Vec a = x * 0.707106781f, t = absolute(a), s = t * t;
  Vec p = -1.72853470e-5f * t + 3.83197126e-4f;
  const Vec q = -3.88396438e-3f * t + 2.42546219e-2f;
  p = p * s + q;
  p = p * t - 1.06777877e-1f;
  p = p * t - 6.34846687e-1f;
  p = p * t - 1.28717512e-1f;
  p = p * t - t;
  const Vec tail = 0.5f * exp_nonpositive(p);
  Vec r = -5.96761703e-4f * s + 4.99119423e-3f;
  r = r * s - 2.67681349e-2f;
  r = r * s + 1.12819925e-1f;
  r = r * s - 3.76125336e-1f;
  r = r * s + 1.28379166e-1f;
  r = r * a + a;
  const Vec outside = select(x < Vec{}, tail, 1.0f - tail), inside = 0.5f * r + 0.5f;
  return x * select(t > broadcast(0.927734375f), outside, inside);
}

// x Phi(x) for results of 16 bits, in half the instructions. The tail Phi(-t) is 2^p, p the minimax fit of
// its logarithm on [0, 8]: a relative error of 3e-5, a sixteenth of what rounding to float16 costs. Further
// out p goes on falling, and what is left is below 1e-14.
inline Vec gelu_of_half(Vec x) {
  const Vec t = absolute(x);
  Vec p = -1.26245868e-6f * t + 4.82032956e-5f;
  p = p * t - 8.07248231e-4f;
  p = p * t + 7.94457830e-3f;
  p = p * t - 5.26353791e-2f;
  p = p * t - 4.59956855e-1f;
  p = p * t - 1.15060997f;
  p = p * t - 1.00004303f;
  const Vec tail = exp2_nonpositive<0, Accuracy::half>(p);
  return x * select(x < Vec{}, tail, 1.0f - tail);
}

inline Vec gelu_tanh(Vec x) { return x * sigmoid(x * (0.0713548163f * x * x + 1.59576912f)); }

inline Vec quick_gelu(Vec x) { return x * sigmoid(1.702f * x); }

inline Vec relu(Vec x) { return max(Vec{}, x); }  // in this order NaN stays

// with_activation<T>(activation, body) calls body(f) with f(Vec) -> Vec, whose results are rounded to T.
template <typename T, typename Body>
inline void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::none:
      return body([](Vec x) { return x; });
    case Activation::gelu:
      return body([](Vec x) { return sizeof(T) < sizeof(float) ? gelu_of_half(x) : gelu(x); });
    case Activation::gelu_tanh:
      return body([](Vec x) { return gelu_tanh(x); });
    case Activation::quick_gelu:
      return body([](Vec x) { return quick_gelu(x); });
    case Activation::relu:
      return body([](Vec x) { return relu(x); });
  }
}

}  // namespace madtp::cpu::MADTP_ISA
