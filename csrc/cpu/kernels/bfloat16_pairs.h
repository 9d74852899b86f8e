// SPDX-License-Identifier: Apache-2.0
#pragma once

// Two bfloat16 side by side in 32 bits, and the instruction that multiplies them with two others and adds
// both products to a float32. It takes subnormal numbers for zero, and rounds to the nearest whatever the
// mode.

#include "cpu/kernels/vec.h"

#if defined(__AVX512BF16__)
namespace madtp::cpu::MADTP_ISA {

// The first `count` elements, a whole vector's 32 at most, in pairs; the other lanes are zero.
inline Vec load_pairs(const BFloat16* from, std::int64_t count) {
  const unsigned lanes = count < 2 * kWidth ? (1u << count / 2) - 1 : 0xffffu;
  return bit_cast<Vec>(_mm512_maskz_loadu_epi32(__mmask16(lanes), from));
}

// Lane by lane sum + a.first * b.first + a.second * b.second.
inline Vec add_dots(Vec a, Vec b, Vec sum) {
  return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}

// Lanes 0 1, 2 3, ... of the vector, rounded to kWidth / 2 pairs. Vector by vector, as Bochs, which the tests
// run on, gets the instruction for two of them wrong.
inline void store_pairs(float* to, Vec v) {
  const __m256bh pairs = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

}  // namespace madtp::cpu::MADTP_ISA
#endif
