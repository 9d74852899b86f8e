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
#define MADTP_HAS_TWINS 1  // whether there is a form of 2:4 weights for many rows (quantized_twins.h)
constexpr int kPickedColumns = 64;  // that one instruction picks from
constexpr int kDotsSums = 24;       // accumulators of a tile, of 32 registers
constexpr int kDotsOffset = 128;    // x + 128 is what the instruction takes, unsigned
#elif defined(__AVX2__)
#define MADTP_HAS_TWINS 0
constexpr int kPickedColumns = 16;
constexpr int kDotsSums = 12;  // of 16
constexpr int kDotsOffset = 128;
#else
#define MADTP_HAS_TWINS 0
constexpr int kPickedColumns = 16;
constexpr int kDotsSums = 24;
constexpr int kDotsOffset = 0;
#endif

inline IntVec load_bytes(const void* from) {
  IntVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// kPickedColumns bytes of x.
#if defined(__aarch64__)
typedef int8x16_t DotsX;
#else
struct DotsX {
  char bytes[kPickedColumns];
};
#endif

// How they are picked from, and the products with the picked ones are added to a sum. A pick and its products
// are one statement, so that the compiler keeps no more than one vector of x in a register: with more it
// spills.
#if defined(__AVX512F__)
#define MADTP_PICK "vpermb %[x],%[columns],%[picked]"
#define MADTP_DOT "\n\tvpdpbusd %[weights],%[picked],%[sum]"
#define MADTP_REGISTER "v"
#elif defined(__AVX2__)
#define MADTP_PICK "vbroadcasti128 %[x],%[picked]\n\tvpshufb %[columns],%[picked],%[picked]"
#define MADTP_DOT "\n\t%{vex%} vpdpbusd %[weights],%[picked],%[sum]"
#define MADTP_REGISTER "x"
#else
#define MADTP_PICK "ldr %q[picked],%[x]\n\ttbl %[picked].16b,{%[picked].16b},%[columns].16b"
#define MADTP_DOT "\n\tsdot %[sum].4s,%[picked].16b,%[weights].16b"
#define MADTP_REGISTER "w"
#endif

inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights,
                                                      IntVec& sum) {
  IntVec picked;
  asm(MADTP_PICK MADTP_DOT
      : [picked] "=&" MADTP_REGISTER(picked), [sum] "+" MADTP_REGISTER(sum)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] MADTP_REGISTER(columns),
        [weights] MADTP_REGISTER(weights));
}

#if defined(__AVX512F__)
// One pick for two products.
inline __attribute__((always_inline)) void add_picked(const char* x, IntVec columns, IntVec weights0,
                                                      IntVec weights1, IntVec& sum0, IntVec& sum1) {
  IntVec picked;
  asm(MADTP_PICK "\n\tvpdpbusd %[weights0],%[picked],%[sum0]\n\tvpdpbusd %[weights1],%[picked],%[sum1]"
      : [picked] "=&" MADTP_REGISTER(picked), [sum0] "+" MADTP_REGISTER(sum0), [sum1] "+" MADTP_REGISTER(sum1)
      : [x] "m"(*reinterpret_cast<const DotsX*>(x)), [columns] MADTP_REGISTER(columns),
        [weights0] MADTP_REGISTER(weights0), [weights1] MADTP_REGISTER(weights1));
}

// Lane l of the result is lane from[l] of a and b, one after the other.
inline IntVec pick_lanes(IntVec a, IntVec b, IntVec from) {
  return bit_cast<IntVec>(
      _mm512_permutex2var_epi32(bit_cast<__m512i>(a), bit_cast<__m512i>(from), bit_cast<__m512i>(b)));
}
#endif

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

}  // namespace madtp::cpu::MADTP_ISA
