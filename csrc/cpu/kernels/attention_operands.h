// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the products of attention multiply. Panels consist of cells of 32 bits: a float32, or, where the CPU
// multiplies pairs of bfloat16, two elements that follow one another along what the product sums over.

#include "cpu/kernels/bfloat16_pairs.h"

namespace madtp::cpu::MADTP_ISA {

// head_dim is a multiple of it: where vectors are wider, the last one of a head may be half full.
constexpr std::int64_t kHeadStep = 8;

// A vector of a head that has `left` more elements; zeros past its end.
template <typename T>
inline Vec load_head(const T* from, std::int64_t left) {
  if constexpr (kWidth > kHeadStep)
    if (left < kWidth) return load_part(from, kHeadStep);
  return load(from);
}

template <typename T>
inline void store_head(T* to, Vec v, std::int64_t left) {
  if constexpr (kWidth > kHeadStep)
    if (left < kWidth) return store_part(to, v, kHeadStep);
  store(to, v);
}

struct Floats {
  static constexpr int kTerms = 1;  // elements of a cell

  // A vector of cells along a row, which has `left` more elements.
  template <typename T>
  static Vec load_row(const T* row, std::int64_t left) {
    return load_head(row, left);
  }
  // A vector of cells across rows, of which `rows_left` are left; each has `left` more elements.
  template <typename T>
  static Vec load_rows(const T* rows, std::int64_t, std::int64_t, std::int64_t left) {
    return load_head(rows, left);
  }
  static Vec spread(const float* cell) { return broadcast(*cell); }
  static Vec add(Vec a, Vec b, Vec sum) { return a * b + sum; }
};

// How products of inputs of type T compute.
template <typename T>
struct OperandOf {
  using Type = Floats;
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kTerms = 2;

  static Vec load_row(const BFloat16* row, std::int64_t left) { return load_pairs(row, left); }
  // The second row is zeros where there is none.
  static Vec load_rows(const BFloat16* rows, std::int64_t stride, std::int64_t rows_left, std::int64_t left) {
    const BitVec first = bit_cast<BitVec>(load_head(rows, left)) >> 16;
    return bit_cast<Vec>(rows_left > 1 ? first | bit_cast<BitVec>(load_head(rows + stride, left)) : first);
  }
  static Vec spread(const float* cell) {
    std::int32_t bits;
    __builtin_memcpy(&bits, cell, sizeof bits);
    return bit_cast<Vec>(_mm512_set1_epi32(bits));
  }
  static Vec add(Vec a, Vec b, Vec sum) { return add_dots(a, b, sum); }
  // A vector of elements, rounded to half a vector of cells.
  static void store_rounded(float* to, Vec v) { store_pairs(to, v); }
};

template <>
struct OperandOf<BFloat16> {
  using Type = Pairs;
};
#endif

}  // namespace madtp::cpu::MADTP_ISA
