// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the products of attention multiply. Panels consist of cells of 32 bits: a float32, or, where the CPU
// multiplies pairs of bfloat16, two elements that follow one another along what the product sums over.

#include "cpu/kernels/bfloat16_pairs.h"

namespace madtp::cpu::MADTP_ISA {

struct Floats {
  static constexpr int kTerms = 1;  // elements of a cell

  // A vector of cells along a row, which has `left` more elements.
  template <typename T>
  static Vec load_row(const T* row, std::int64_t) {
    return load(row);
  }
  // A vector of cells across rows, of which `left` are left.
  template <typename T>
  static Vec load_rows(const T* rows, std::int64_t, std::int64_t) {
    return load(rows);
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
  static Vec load_rows(const BFloat16* rows, std::int64_t stride, std::int64_t left) {
    const BitVec first = bit_cast<BitVec>(load(rows)) >> 16;
    return bit_cast<Vec>(left > 1 ? first | bit_cast<BitVec>(load(rows + stride)) : first);
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
