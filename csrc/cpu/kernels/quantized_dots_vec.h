// SPDX-License-Identifier: Apache-2.0
#pragma once

// Dot products of bytes, by the instructions of each set: one multiplies a vector of bytes of x with one of
// weights and adds them up by fours, in int32, and one picks bytes of x. IntVec holds either.

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include "cpu/kernels/vec.h"

namespace madtp::cpu::MADTP_ISA {

#if defined(__AVX512F__)
constexpr int kDotsColumns = 64;  // that one instruction picks from
constexpr int kDotsTokens = 12;   // of a tile: times two vectors of output features, 24 accumulators of 32
constexpr int kDotsOffset = 128;  // x + 128 is what the instruction takes, unsigned
#elif defined(__AVX2__)
constexpr int kDotsColumns = 16;
constexpr int kDotsTokens = 6;  // 12 accumulators of 16
constexpr int kDotsOffset = 128;
#else
constexpr int kDotsColumns = 16;
constexpr int kDotsTokens = 12;
constexpr int kDotsOffset = 0;
#endif

inline IntVec load_bytes(const void* from) {
  IntVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// The sum, plus the products of the bytes of x and of the weights.
inline IntVec add_dots(IntVec sum, IntVec x, IntVec weights) {
#if defined(__AVX512F__)
  return bit_cast<IntVec>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(x), bit_cast<__m512i>(weights)));
#elif defined(__AVX2__)
  return bit_cast<IntVec>(
      _mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(x), bit_cast<__m256i>(weights)));
#else
  return vdotq_s32(sum, bit_cast<int8x16_t>(x), bit_cast<int8x16_t>(weights));
#endif
}

// Picks from kDotsColumns bytes of x, and adds the products. One statement, so that the compiler keeps no
// more than one vector of x in a register: with two it spills.
#if defined(__AVX512F__)
#define MADTP_PICK "vpermb %[x],%[columns],%[picked]\n\t"
#define MADTP_DOT "vpdpbusd "
#elif defined(__AVX2__)
#define MADTP_PICK "vbroadcasti128 %[x],%[picked]\n\tvpshufb %[columns],%[picked],%[picked]\n\t"
#define MADTP_DOT "%{vex%} vpdpbusd "
#endif

struct DotsX {
  char bytes[kDotsColumns];
};

inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights,
                                                      IntVec& sum) {
#if defined(MADTP_PICK)
  IntVec picked;
  asm(MADTP_PICK MADTP_DOT "%[weights],%[picked],%[sum]"
      : [picked] "=&v"(picked), [sum] "+v"(sum)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] "v"(columns), [weights] "v"(weights));
#else
  const int8x16_t picked = vqtbl1q_s8(bit_cast<int8x16_t>(load_bytes(x)), bit_cast<uint8x16_t>(columns));
  sum = add_dots(sum, bit_cast<IntVec>(picked), weights);
#endif
}

// The same for two sums.
inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights0,
                                                      IntVec weights1, IntVec& sum0, IntVec& sum1) {
#if defined(MADTP_PICK)
  IntVec picked;
  asm(MADTP_PICK MADTP_DOT "%[weights0],%[picked],%[sum0]\n\t" MADTP_DOT "%[weights1],%[picked],%[sum1]"
      : [picked] "=&v"(picked), [sum0] "+v"(sum0), [sum1] "+v"(sum1)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] "v"(columns), [weights0] "v"(weights0),
        [weights1] "v"(weights1));
#else
  const int8x16_t picked = vqtbl1q_s8(bit_cast<int8x16_t>(load_bytes(x)), bit_cast<uint8x16_t>(columns));
  sum0 = add_dots(sum0, bit_cast<IntVec>(picked), weights0);
  sum1 = add_dots(sum1, bit_cast<IntVec>(picked), weights1);
#endif
}

#undef MADTP_PICK
#undef MADTP_DOT

// Lane l of the result is lane from[l] of a and b, one after the other.
inline IntVec pick_lanes(IntVec a, IntVec b, IntVec from) {
#if defined(__AVX512F__)
  return bit_cast<IntVec>(
      _mm512_permutex2var_epi32(bit_cast<__m512i>(a), bit_cast<__m512i>(from), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i lanes = bit_cast<__m256i>(from);
  const IntVec of_a = bit_cast<IntVec>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(a), lanes)),
               of_b = bit_cast<IntVec>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(b), lanes));
  return (from & kWidth) != 0 ? of_b : of_a;
#else
  const uint8x16x2_t bytes{bit_cast<uint8x16_t>(a), bit_cast<uint8x16_t>(b)};
  return bit_cast<IntVec>(
      vqtbl2q_u8(bytes, bit_cast<uint8x16_t>(bit_cast<BitVec>(from) * 0x04040404u + 0x03020100u)));
#endif
}

}  // namespace madtp::cpu::MADTP_ISA
