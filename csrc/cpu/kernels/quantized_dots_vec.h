// SPDX-License-Identifier: Apache-2.0
#pragma once

// Dot products of bytes, by the instructions of each set: one multiplies a vector of bytes of x with one of
// weights and adds the products up by fours, in int32, and one picks bytes of x. IntVec holds bytes too.

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

// kDotsColumns bytes of x.
#if defined(__aarch64__)
typedef int8x16_t DotsX;
#else
struct DotsX {
  char bytes[kDotsColumns];
};
#endif

// How they are picked from, and the products with the picked ones are added to a sum. A pick and its products
// are one statement, so that the compiler keeps no more than one vector of x in a register: with two it
// spills.
#if defined(__AVX512F__)
#define MADTP_PICK "vpermb %[x],%[columns],%[picked]"
#define MADTP_DOT(weights, sum) "\n\tvpdpbusd %[" #weights "],%[picked],%[" #sum "]"
#define MADTP_REGISTER "v"
#elif defined(__AVX2__)
#define MADTP_PICK "vbroadcasti128 %[x],%[picked]\n\tvpshufb %[columns],%[picked],%[picked]"
#define MADTP_DOT(weights, sum) "\n\t%{vex%} vpdpbusd %[" #weights "],%[picked],%[" #sum "]"
#define MADTP_REGISTER "x"
#else
#define MADTP_PICK "ldr %q[picked],%[x]\n\ttbl %[picked].16b,{%[picked].16b},%[columns].16b"
#define MADTP_DOT(weights, sum) "\n\tsdot %[" #sum "].4s,%[picked].16b,%[" #weights "].16b"
#define MADTP_REGISTER "w"
#endif

inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights,
                                                      IntVec& sum) {
  IntVec picked;
  asm(MADTP_PICK MADTP_DOT(weights, sum)
      : [picked] "=&" MADTP_REGISTER(picked), [sum] "+" MADTP_REGISTER(sum)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] MADTP_REGISTER(columns),
        [weights] MADTP_REGISTER(weights));
}

inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights0,
                                                      IntVec weights1, IntVec& sum0, IntVec& sum1) {
  IntVec picked;
  asm(MADTP_PICK MADTP_DOT(weights0, sum0) MADTP_DOT(weights1, sum1)
      : [picked] "=&" MADTP_REGISTER(picked), [sum0] "+" MADTP_REGISTER(sum0), [sum1] "+" MADTP_REGISTER(sum1)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] MADTP_REGISTER(columns),
        [weights0] MADTP_REGISTER(weights0), [weights1] MADTP_REGISTER(weights1));
}

#undef MADTP_PICK
#undef MADTP_DOT
#undef MADTP_REGISTER

// The same with four bytes of x for all lanes.
inline __attribute__((always_inline)) void add_spread(const char* x, IntVec weights0, IntVec weights1,
                                                      IntVec& sum0, IntVec& sum1) {
#if defined(__aarch64__)
  IntVec four;
  asm("ldr %s[four],%[x]\n\tsdot %[sum0].4s,%[weights0].16b,%[four].4b[0]\n\t"
      "sdot %[sum1].4s,%[weights1].16b,%[four].4b[0]"
      : [four] "=&w"(four), [sum0] "+w"(sum0), [sum1] "+w"(sum1)
      : [x] "m"(*reinterpret_cast<const float*>(x)), [weights0] "w"(weights0), [weights1] "w"(weights1));
#else
  std::int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const IntVec spread = IntVec{} + four;
#if defined(__AVX512F__)
  const auto dots = [&](IntVec weights, IntVec sum) {
    return bit_cast<IntVec>(
        _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(spread), bit_cast<__m512i>(weights)));
  };
#else
  const auto dots = [&](IntVec weights, IntVec sum) {
    return bit_cast<IntVec>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(spread),
                                                    bit_cast<__m256i>(weights)));
  };
#endif
  sum0 = dots(weights0, sum0);
  sum1 = dots(weights1, sum1);
#endif
}

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
