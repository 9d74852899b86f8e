// SPDX-License-Identifier: Apache-2.0
#pragma once

// One unit of an int8 weight (quantized_vnni_layout.h) times a tile of tokens: the sums of all input features
// stay in registers.

#include <immintrin.h>

#include <utility>

#include "cpu/kernels/quantized_vnni_layout.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kVnniTokens = 12;  // of a tile: times two vectors of output features, 24 accumulators

// x of a tile is (blocks, T, kVnniColumns), unsigned.
template <int T>
inline __attribute__((always_inline)) void add_own_step(const char* x, const char* step, __m512i (&sums)[T]) {
  const __m512i columns = _mm512_loadu_si512(step), weights = _mm512_loadu_si512(step + 64);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    // One statement, so that the compiler keeps no more than one vector of x in a register: with two it
    // spills.
    __m512i picked;
    asm("vpermb %2,%3,%0\n\tvpdpbusd %4,%0,%1"
        : "=&v"(picked), "+v"(sums[t])
        : "m"(*reinterpret_cast<const __m512i*>(x + t * 64)), "v"(columns), "v"(weights));
  }
}

template <int T>
inline __attribute__((always_inline)) void add_shared_step(const char* x, const char* step,
                                                           __m512i (&sums0)[T], __m512i (&sums1)[T]) {
  const __m512i columns = _mm512_loadu_si512(step), weights0 = _mm512_loadu_si512(step + 64),
                weights1 = _mm512_loadu_si512(step + 128);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    __m512i picked;
    asm("vpermb %3,%4,%0\n\tvpdpbusd %5,%0,%1\n\tvpdpbusd %6,%0,%2"
        : "=&v"(picked), "+v"(sums0[t]), "+v"(sums1[t])
        : "m"(*reinterpret_cast<const __m512i*>(x + t * 64)), "v"(columns), "v"(weights0), "v"(weights1));
  }
}

// The blocks that share Shared steps, from the one at `words` on.
template <int T, int Shared>
inline __attribute__((always_inline)) void add_blocks(const char* x, std::int64_t blocks,
                                                      const std::uint32_t*& words, const std::uint32_t* end,
                                                      const char*& stream, __m512i (&sums0)[T],
                                                      __m512i (&sums1)[T]) {
  constexpr int kBytes = Shared * kSharedBytes + (kVnniSteps - Shared) * kOwnBytes;
  for (; words < end && (Shared == 0 || *words >> 16 == Shared); ++words, stream += kBytes) {
    const std::int64_t block = *words & 0xffff;
    const char* const at = x + (block < blocks ? block : 0) * (T * 64);
    for (int i = 0; i < kBytes; i += 64) _mm_prefetch(stream + kVnniSteps * kOwnBytes + i, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int s = 0; s < Shared; ++s) add_shared_step<T>(at, stream + s * kSharedBytes, sums0, sums1);
#pragma GCC unroll 8
    for (int s = 0; s < kVnniSteps - Shared; ++s) {
      const char* const own = stream + Shared * kSharedBytes + s * kOwnBytes;
      add_own_step<T>(at, own, sums0);
      add_own_step<T>(at, own + 128, sums1);
    }
  }
}

// x (blocks, T, kVnniColumns) -> sums int32 (T, kVnniRows), corrected.
template <int T>
__attribute__((noinline)) void multiply_vnni(const char* x, const VnniUnit& unit, std::int32_t* sums) {
  const VnniLayout& layout = unit.layout;
  __m512i sums0[T], sums1[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sums0[t] = sums1[t] = _mm512_setzero_si512();
  const char* stream = unit.stream();
  const __m512i low_correction = _mm512_loadu_si512(unit.corrections());
  const __m512i high_correction = _mm512_loadu_si512(unit.corrections() + 16);
  if (layout.sparse) {
    const std::uint32_t* words = unit.blocks();
    const std::uint32_t* const end = words + layout.blocks;
    add_blocks<T, 8>(x, layout.blocks, words, end, stream, sums0, sums1);
    add_blocks<T, 4>(x, layout.blocks, words, end, stream, sums0, sums1);
    add_blocks<T, 3>(x, layout.blocks, words, end, stream, sums0, sums1);
    add_blocks<T, 2>(x, layout.blocks, words, end, stream, sums0, sums1);
    add_blocks<T, 0>(x, layout.blocks, words, end, stream, sums0, sums1);
    const __m512i low = _mm512_loadu_si512(unit.lanes()), high = _mm512_loadu_si512(unit.lanes() + 16);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512i first = sums0[t], second = sums1[t];
      sums0[t] = _mm512_permutex2var_epi32(first, low, second);
      sums1[t] = _mm512_permutex2var_epi32(first, high, second);
    }
  } else {
    for (std::int64_t block = 0; block < layout.blocks; ++block, x += T * 64) {
#pragma GCC unroll 1
      for (int c = 0; c < kVnniColumns; c += 4, stream += 128) {
        const __m512i weights0 = _mm512_loadu_si512(stream), weights1 = _mm512_loadu_si512(stream + 64);
        _mm_prefetch(stream + 1024, _MM_HINT_T0);
        _mm_prefetch(stream + 1088, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
          std::int32_t four;
          __builtin_memcpy(&four, x + t * 64 + c, sizeof four);
          const __m512i spread = _mm512_set1_epi32(four);
          sums0[t] = _mm512_dpbusd_epi32(sums0[t], spread, weights0);
          sums1[t] = _mm512_dpbusd_epi32(sums1[t], spread, weights1);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    _mm512_storeu_si512(sums + t * kVnniRows, _mm512_sub_epi32(sums0[t], low_correction));
    _mm512_storeu_si512(sums + t * kVnniRows + 16, _mm512_sub_epi32(sums1[t], high_correction));
  }
}

using MultiplyVnni = void (*)(const char* x, const VnniUnit& unit, std::int32_t* sums);

// multiply_vnni<tokens>
template <int T = kVnniTokens>
inline MultiplyVnni multiply_vnni_function(int tokens) {
  if constexpr (T == 0) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_vnni<T> : multiply_vnni_function<T - 1>(tokens);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
