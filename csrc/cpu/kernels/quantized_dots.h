// SPDX-License-Identifier: Apache-2.0
#pragma once

// One unit of an int8 weight (quantized_dots_layout.h) times a tile of tokens: the sums of all input features
// stay in registers.

#include "cpu/kernels/quantized_dots_layout.h"

namespace madtp::cpu::MADTP_ISA {

// x of a tile is (blocks, T, kDotsColumns).
template <int T>
inline __attribute__((always_inline)) void add_own_step(const char* x, const char* step, IntVec (&sums)[T]) {
  const IntVec columns = load_bytes(step), weights = load_bytes(step + sizeof(IntVec));
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) add_picked(x + t * kDotsColumns, columns, weights, sums[t]);
}

template <int T>
inline __attribute__((always_inline)) void add_shared_step(const char* x, const char* step,
                                                           IntVec (&sums0)[T], IntVec (&sums1)[T]) {
  const IntVec columns = load_bytes(step), weights0 = load_bytes(step + sizeof(IntVec)),
               weights1 = load_bytes(step + 2 * sizeof(IntVec));
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
    add_picked(x + t * kDotsColumns, columns, weights0, weights1, sums0[t], sums1[t]);
}

// The blocks that share Shared steps, from the one at `words` on.
template <int T, int Shared>
inline __attribute__((always_inline)) void add_blocks(const char* x, std::int64_t blocks,
                                                      const std::uint32_t*& words, const std::uint32_t* end,
                                                      const char*& stream, IntVec (&sums0)[T],
                                                      IntVec (&sums1)[T]) {
  constexpr int kBytes = Shared * kSharedBytes + (kDotsSteps - Shared) * kOwnBytes, kAhead = 2048;
  for (; words < end && (Shared == 0 || *words >> 16 == Shared); ++words, stream += kBytes) {
    const std::int64_t block = *words & 0xffff;
    const char* at = x + (block < blocks ? block : 0) * (T * kDotsColumns);
    asm("" : "+r"(at));  // one register, not one for every token
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(stream + kAhead + i);
#pragma GCC unroll 8
    for (int s = 0; s < Shared; ++s) add_shared_step<T>(at, stream + s * kSharedBytes, sums0, sums1);
#pragma GCC unroll 8
    for (int s = 0; s < kDotsSteps - Shared; ++s) {
      const char* const own = stream + Shared * kSharedBytes + s * kOwnBytes;
      add_own_step<T>(at, own, sums0);
      add_own_step<T>(at, own + kOwnBytes / 2, sums1);
    }
  }
}

// x (blocks, T, kDotsColumns) -> sums int32 (T, kDotsRows), corrected.
template <int T>
__attribute__((noinline)) void multiply_dots(const char* x, const DotsUnit& unit, std::int32_t* sums) {
  const DotsLayout& layout = unit.layout;
  IntVec sums0[T], sums1[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sums0[t] = sums1[t] = IntVec{};
  const char* stream = unit.stream();
  if (layout.sparse) {
    const std::uint32_t* words = unit.blocks();
    const std::uint32_t* const end = words + layout.blocks;
    add_blocks<T, kDotsSteps>(x, layout.blocks, words, end, stream, sums0, sums1);
    if constexpr (kDotsSteps > 4) {
      add_blocks<T, 4>(x, layout.blocks, words, end, stream, sums0, sums1);
      add_blocks<T, 3>(x, layout.blocks, words, end, stream, sums0, sums1);
      add_blocks<T, 2>(x, layout.blocks, words, end, stream, sums0, sums1);
    } else {
      add_blocks<T, 1>(x, layout.blocks, words, end, stream, sums0, sums1);
    }
    add_blocks<T, 0>(x, layout.blocks, words, end, stream, sums0, sums1);
    const IntVec low = load_ints(unit.lanes()), high = load_ints(unit.lanes() + kWidth);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const IntVec first = sums0[t], second = sums1[t];
      sums0[t] = pick_lanes(first, second, low);
      sums1[t] = pick_lanes(first, second, high);
    }
  } else {
    constexpr int kStepBytes = 4 * kDotsRows;
    for (std::int64_t block = 0; block < layout.blocks; ++block, x += T * kDotsColumns) {
#pragma GCC unroll 1
      for (int c = 0; c < kDotsColumns; c += 4, stream += kStepBytes) {
        const IntVec weights0 = load_bytes(stream), weights1 = load_bytes(stream + kStepBytes / 2);
        for (int i = 0; i < kStepBytes; i += 64) __builtin_prefetch(stream + 1024 + i);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t)
          add_spread(x + t * kDotsColumns + c, weights0, weights1, sums0[t], sums1[t]);
      }
    }
  }
  const IntVec low = load_ints(unit.corrections()), high = load_ints(unit.corrections() + kWidth);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    store(sums + t * kDotsRows, sums0[t] - low);
    store(sums + t * kDotsRows + kWidth, sums1[t] - high);
  }
}

using MultiplyDots = void (*)(const char* x, const DotsUnit& unit, std::int32_t* sums);

// multiply_dots<tokens>
template <int T = kDotsTokens>
inline MultiplyDots multiply_dots_function(int tokens) {
  if constexpr (T == 0) {
    return nullptr;
  } else {
    return tokens == T ? &multiply_dots<T> : multiply_dots_function<T - 1>(tokens);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
