// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kinds of steps that a row of a weight is made of, and the panel of tokens that each multiplies.

#include "cpu/kernels/bfloat16_pairs.h"
#include "cpu/kernels/layout.h"

namespace madtp::cpu::MADTP_ISA {

// Vectors of tokens in a tile, at most. Times two rows: the accumulators, in registers. With more, a panel
// and the units leave L1.
constexpr int kMaxTileVectors = 6;

// One weight times one column, in float32. The panel has the columns.
struct Product {
  using Weight = float;
  static constexpr int kColumns = kWidth;  // of x in a tile of the panel
  static constexpr int kEntries = 4;       // of every 4 columns
  static constexpr bool kOwnEntries = true;
  static constexpr int kTileVectors = kMaxTileVectors;
  template <typename T>
  static Vec load_columns(const T* x, int) {
    return load(x);
  }
  static void store_entries(const Vec (&tile)[kWidth], float* panel, std::int64_t stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(panel + i * stride, tile[i]);
  }

  static Vec spread(float weight) { return broadcast(weight); }
  static Vec add(Vec weight, Vec x, Vec sum) { return weight * x + sum; }
  static Vec join(Vec a, Vec b) { return a + b; }  // sums of two blocks
};

#if defined(__AVX512BF16__)
// The two weights of a group times its two columns: all of them bfloat16, side by side in 32 bits. The panel
// has every pair of columns that a group can keep.
struct Dot {
  using Weight = std::uint32_t;
  static constexpr int kColumns = 2 * kWidth;
  static constexpr int kEntries = 6;
  static constexpr bool kOwnEntries = true;
  static constexpr int kTileVectors = kMaxTileVectors;

  static Vec load_columns(const BFloat16* x, int count) { return load_pairs(x, count); }
  // Rows 2g and 2g + 1 of the tile are columns 0 1 and 2 3 of group g.
  static void store_entries(const Vec (&tile)[kWidth], float* panel, std::int64_t stride) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i += 2, panel += kEntries * stride) {
      const BitVec x01 = bit_cast<BitVec>(tile[i]), x23 = bit_cast<BitVec>(tile[i + 1]);
      const BitVec x0 = x01 & 0xffffu, x1 = x01 >> 16, x2 = x23 << 16, x3 = x23 & 0xffff0000u;
      store(panel, tile[i]);
      store(panel + stride, bit_cast<Vec>(x0 | x2));
      store(panel + 2 * stride, bit_cast<Vec>(x0 | x3));
      store(panel + 3 * stride, bit_cast<Vec>(x1 | x2));
      store(panel + 4 * stride, bit_cast<Vec>(x1 | x3));
      store(panel + 5 * stride, tile[i + 1]);
    }
  }

  static Vec spread(std::uint32_t weights) { return bit_cast<Vec>(_mm512_set1_epi32(int(weights))); }
  static Vec add(Vec weights, Vec x, Vec sum) { return add_dots(weights, x, sum); }
  static Vec join(Vec a, Vec b) { return a + b; }
};
#endif

}  // namespace madtp::cpu::MADTP_ISA
