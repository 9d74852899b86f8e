// SPDX-License-Identifier: Apache-2.0
#pragma once

// One unit of an int8 weight (quantized_dots_layout.h) times a tile of tokens: the sums of all input features
// stay in registers.

#include "cpu/kernels/quantized_dots_layout.h"

#if MADTP_HAS_TWINS
#include "cpu/kernels/quantized_twins.h"
#endif

namespace madtp::cpu::MADTP_ISA {

// Which byte of x each weight of a step is multiplied with, of the kPickedColumns that hold its columns.
inline IntVec picked_columns(IntVec indices, int step) {
  const unsigned first = unsigned(step * 8 % kPickedColumns);
  return bit_cast<IntVec>((bit_cast<BitVec>(indices) >> unsigned(step % kIndexedSteps * 2) & 0x03030303u) |
                          (first * 0x01010101u + 0x04040000u));
}

// x (blocks, T, kDotsColumns) -> sums int32 (T, kWidth), corrected.
template <int T>
__attribute__((noinline)) void multiply_sparse(const char* x, const DotsUnit& unit, std::int64_t blocks,
                                               std::int32_t* sums) {
  constexpr int kSteps = kDotsColumns / 8, kAhead = 2048;
  IntVec acc[T];
#pragma GCC unroll 24
  for (int t = 0; t < T; ++t) acc[t] = IntVec{};
  const char* stream = unit.stream;
  // The columns of a step are ready before the one ahead of it ends. Those after the last are of the
  // corrections, and not used.
  IntVec indices = load_bytes(stream), columns = picked_columns(indices, 0);
  for (std::int64_t block = 0; block < blocks; ++block, x += T * kDotsColumns) {
    const char* at = x;
    asm("" : "+r"(at));  // one register, not one for every token
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      const IntVec weights = load_bytes(stream + (1 + s % kIndexedSteps) * int(sizeof(IntVec)));
      if (s % kIndexedSteps == kIndexedSteps - 1) {
        for (int i = 0; i < kIndexedBytes; i += 64) __builtin_prefetch(stream + kAhead + i);
        stream += kIndexedBytes;
        indices = load_bytes(stream);
      }
      const IntVec next = picked_columns(indices, (s + 1) % kSteps);
      const char* const from = at + s * 8 / kPickedColumns * kPickedColumns;
#pragma GCC unroll 24
      for (int t = 0; t < T; ++t) add_picked(from + t * kDotsColumns, columns, weights, acc[t]);
      columns = next;
    }
  }
  const IntVec corrections = load_ints(unit.corrections);
#pragma GCC unroll 24
  for (int t = 0; t < T; ++t) store(sums + t * kWidth, acc[t] - corrections);
}

// x (blocks, T, kDotsColumns) -> sums int32 (T, 2 kWidth), corrected.
template <int T>
__attribute__((noinline)) void multiply_dense(const char* x, const DotsUnit& unit, std::int64_t blocks,
                                              std::int32_t* sums) {
  constexpr int kStepBytes = 2 * int(sizeof(IntVec));
  IntVec acc0[T], acc1[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) acc0[t] = acc1[t] = IntVec{};
  const char* stream = unit.stream;
  for (std::int64_t block = 0; block < blocks; ++block, x += T * kDotsColumns) {
#pragma GCC unroll 1
    for (int c = 0; c < kDotsColumns; c += 4, stream += kStepBytes) {
      const IntVec weights0 = load_bytes(stream), weights1 = load_bytes(stream + kStepBytes / 2);
      for (int i = 0; i < kStepBytes; i += 64) __builtin_prefetch(stream + 1024 + i);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) add_spread(x + t * kDotsColumns + c, weights0, weights1, acc0[t], acc1[t]);
    }
  }
  const IntVec low = load_ints(unit.corrections), high = load_ints(unit.corrections + kWidth);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    store(sums + t * 2 * kWidth, acc0[t] - low);
    store(sums + t * 2 * kWidth + kWidth, acc1[t] - high);
  }
}

using MultiplyDots = void (*)(const char* x, const DotsUnit& unit, std::int64_t blocks, std::int32_t* sums);

// That of a form and so many tokens, of a tile at most.
template <int T = kDotsSums>
inline MultiplyDots multiply_dots_function(DotsForm form, int tokens) {
  if constexpr (T == 0) {
    return nullptr;
  } else {
    if (tokens != T) return multiply_dots_function<T - 1>(form, tokens);
    if constexpr (T <= kDotsSums / 2) {
      if (form == DotsForm::dense) return &multiply_dense<T>;
#if MADTP_HAS_TWINS
      if (form == DotsForm::twins) return &multiply_twins<T>;
#endif
    }
    return &multiply_sparse<T>;
  }
}

}  // namespace madtp::cpu::MADTP_ISA
