// SPDX-License-Identifier: Apache-2.0
#pragma once

// ldmatrix, stmatrix and mma.sp, element by element, by the fragment tables of the PTX manual.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "simt/copies.h"

namespace madtp::simt {

// Element `half` (0: low) of a register of two.
inline float element(std::uint32_t word, int half, bool is_float16) {
  const std::uint16_t bits = std::uint16_t(half == 0 ? word : word >> 16);
  if (!is_float16) return __bfloat162float({bits});
  __half value;
  std::memcpy(&value, &bits, sizeof bits);
  return __half2float(value);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  struct Lane {
    std::uint32_t* r;
    std::uint32_t address;
  } mine{r, address};
  with_warp("ldmatrix.x4", mine, [](auto&& of) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      for (unsigned row = 0; row < 8; ++row) {
        const unsigned char* const from = shared(block(), of(matrix * 8 + row).address, 16, 16, "ldmatrix");
        for (unsigned t = 0; t < 4; ++t) std::memcpy(&of(row * 4 + t).r[matrix], from + 4 * t, 4);
      }
    }
  });
}

// Lane 4 g + t has elements 2 t and 2 t + 1 of column g, of rows that lie as for ldmatrix: use(the 16 bits in
// shared memory, the lane, its register, the half of that).
template <typename Word, typename Use>
void for_each_transposed(const char* name, Word word, std::uint32_t address, Use&& use) {
  struct Lane {
    Word word;
    std::uint32_t address;
  } mine{word, address};
  with_warp(name, mine, [&](auto&& of) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      for (unsigned row = 0; row < 8; ++row) {
        unsigned char* const at = shared(block(), of(matrix * 8 + row).address, 16, 16, name);
        for (unsigned column = 0; column < 8; ++column)
          use(at + 2 * column, of(column * 4 + row / 2).word + matrix, row % 2);
      }
    }
  });
}

inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  for_each_transposed("ldmatrix.x4.trans", &r[0], address,
                      [](const unsigned char* from, std::uint32_t* word, unsigned half) {
                        std::memcpy(reinterpret_cast<unsigned char*>(word) + 2 * half, from, 2);
                      });
}

inline void stmatrix_x4_trans(std::uint32_t address, const std::uint32_t (&r)[4]) {
  for_each_transposed("stmatrix.x4.trans", &r[0], address,
                      [](unsigned char* to, const std::uint32_t* word, unsigned half) {
                        std::memcpy(to, reinterpret_cast<const unsigned char*>(word) + 2 * half, 2);
                      });
}

// The columns of the two kept values of a group of four, from its nibble of the metadata.
struct KeptColumns {
  unsigned first, second;
};
inline KeptColumns kept_columns(std::uint32_t nibble) {
  const KeptColumns kept{nibble & 3, nibble >> 2 & 3};
  if (kept.first >= kept.second) fail("metadata: the columns %u, %u do not ascend", kept.first, kept.second);
  return kept;
}

// Rows of 32 columns, 2:4, as the 32 lanes of a warp hold 16 of them: words 0 and 2 of a lane are columns
// 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of the kept values of row g = lane / 4, t = lane % 4, words 1 and 3 those
// of row g + 8. Of the lanes of row g, number 2 selector + h has the metadata of columns 16 h on: its low
// half of row g, its high half of row g + 8, a nibble for each group of four.
template <typename Word, typename Metadata, typename Use>
void for_each_kept(int row, int selector, bool is_float16, Word&& word, Metadata&& metadata, Use&& use) {
  const unsigned g = unsigned(row % 8);
  const int high = row / 8;
  for (int group = 0; group < 8; ++group) {
    const std::uint32_t bits = metadata(g * 4 + unsigned(2 * selector + group / 4));
    const KeptColumns kept = kept_columns(bits >> (16 * high + 4 * (group % 4)) & 15);
    // Kept values 2 group and 2 group + 1 of the row are one word.
    const std::uint32_t pair = word(g * 4 + unsigned(group % 4), high + 2 * (group / 4));
    use(4 * group + int(kept.first), element(pair, 0, is_float16));
    use(4 * group + int(kept.second), element(pair, 1, is_float16));
  }
}

inline void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                            std::uint32_t metadata, int selector, bool is_float16) {
  struct Lane {
    float* d;
    const std::uint32_t *a, *b;
    std::uint32_t metadata;
  } mine{d, a, b, metadata};
  with_warp(selector == 0 ? "mma.sp, selector 0" : "mma.sp, selector 1", mine, [&](auto&& of) {
    float right[32][8];  // b: register i of a lane holds rows 8 i + 2 t, + 1 of column g
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 8; ++i)
        right[i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4] =
            element(of(lane).b[i / 2], int(i % 2), is_float16);
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for_each_kept(
          row, selector, is_float16, [&](unsigned lane, int i) { return of(lane).a[i]; },
          [&](unsigned lane) { return of(lane).metadata; },
          [&](int column, float value) {
            for (int n = 0; n < 8; ++n) sums[n] += value * right[column][n];
          });
      for (unsigned n = 0; n < 8; ++n)
        of(unsigned(row % 8) * 4 + n / 2).d[row / 8 * 2 + int(n % 2)] += sums[n];
    }
  });
}

}  // namespace madtp::simt
