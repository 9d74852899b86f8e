// SPDX-License-Identifier: Apache-2.0
#pragma once

// Steps of int8 weights: two of them times two columns of x, as int16 pairs side by side in 32 bits, summed
// in int32. Without an instruction that multiplies bytes exactly, a panel of pairs widened once is faster
// than bytes widened at every use; and for a 2:4 weight the pair of columns it keeps is one entry, found
// without a shuffle.

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/kernels/step.h"

namespace madtp::cpu::MADTP_ISA {

// a0 b0 + a1 b1 of the int16 pairs of every lane, plus the sum.
inline IntVec add_pair_products(IntVec a, IntVec b, IntVec sum) {
#if defined(__AVX512BW__)
  return bit_cast<IntVec>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b))) + sum;
#elif defined(__AVX2__)
  return bit_cast<IntVec>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b))) + sum;
#elif defined(__SSE2__)
  return bit_cast<IntVec>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b))) + sum;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The bytes of every lane, b0 to b3, as int16 pairs: (b0, b2) and (b1, b3).
struct EvenOdd {
  BitVec even, odd;
};

inline EvenOdd widen_bytes(Vec bytes) {
  typedef std::int16_t ShortVec __attribute__((vector_size(kWidth * 4)));
  const ShortVec shorts = bit_cast<ShortVec>(bytes);
  return {bit_cast<BitVec>(shorts << 8 >> 8), bit_cast<BitVec>(shorts >> 8)};
}

struct Int8Step {
  using Weight = std::uint32_t;  // two int16
  static constexpr int kColumns = 4 * kWidth;
  static constexpr int kTileVectors = 4;

  // Rows of x are padded, so that all columns can be read.
  static Vec load_columns(const std::int8_t* x, int) {
    Vec v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
  static Vec spread(std::uint32_t weights) { return bit_cast<Vec>(IntVec{} + std::int32_t(weights)); }
  static Vec add(Vec weights, Vec x, Vec sum) {
    return bit_cast<Vec>(
        add_pair_products(bit_cast<IntVec>(x), bit_cast<IntVec>(weights), bit_cast<IntVec>(sum)));
  }
  static Vec join(Vec a, Vec b) { return bit_cast<Vec>(bit_cast<IntVec>(a) + bit_cast<IntVec>(b)); }
};

// The two weights that a group of four columns keeps. The panel has every pair of columns.
struct Int8Pairs : Int8Step {
  static constexpr int kEntries = 6;
  static constexpr bool kOwnEntries = true;

  static void store_entries(const Vec (&tile)[kWidth], float* panel, std::int64_t stride) {
    constexpr std::uint32_t kLow = 0xffffu, kHigh = 0xffff0000u;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i, panel += kEntries * stride) {
      const auto [even, odd] = widen_bytes(tile[i]);
      store(panel, bit_cast<Vec>((even & kLow) | odd << 16));                   // 0 1
      store(panel + stride, bit_cast<Vec>(even));                               // 0 2
      store(panel + 2 * stride, bit_cast<Vec>((even & kLow) | (odd & kHigh)));  // 0 3
      store(panel + 3 * stride, bit_cast<Vec>((odd & kLow) | (even & kHigh)));  // 1 2
      store(panel + 4 * stride, bit_cast<Vec>(odd));                            // 1 3
      store(panel + 5 * stride, bit_cast<Vec>(even >> 16 | (odd & kHigh)));     // 2 3
    }
  }
};

// Two pairs of weights for every group: a dense weight.
struct Int8DensePairs : Int8Step {
  static constexpr int kEntries = 2;
  static constexpr bool kOwnEntries = false;
  static constexpr int kTileVectors = kMaxTileVectors;

  static void store_entries(const Vec (&tile)[kWidth], float* panel, std::int64_t stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i, panel += kEntries * stride) {
      const auto [even, odd] = widen_bytes(tile[i]);
      store(panel, bit_cast<Vec>(even));
      store(panel + stride, bit_cast<Vec>(odd));
    }
  }
};

}  // namespace madtp::cpu::MADTP_ISA
