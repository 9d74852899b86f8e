// SPDX-License-Identifier: Apache-2.0
#pragma once

// ldmatrix, stmatrix and mma.sp, element by element, by the fragment tables of the PTX manual.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "simt/copies.h"

namespace madtp::simt {

// What the operands of a product are made of.
enum class Element { bfloat16, float16, int8, e4m3 };

constexpr int bytes_of(Element element) {
  return element == Element::bfloat16 || element == Element::float16 ? 2 : 1;
}
constexpr int elements_of_word(Element element) { return 4 / bytes_of(element); }

inline float e4m3_to_float(std::uint32_t bits) {  // no infinities, and one NaN of either sign
  const int exponent = int(bits >> 3 & 15), fraction = int(bits & 7);
  const float magnitude = (bits & 127) == 127 ? std::numeric_limits<float>::quiet_NaN()
                          : exponent == 0     ? std::ldexp(float(fraction), -9)
                                              : std::ldexp(float(8 + fraction), exponent - 10);
  return (bits >> 7 & 1) != 0 ? -magnitude : magnitude;
}

// Element i (0: the lowest) of a register.
inline float element_of(std::uint32_t word, int i, Element element) {
  const std::uint32_t bits = word >> (8 * bytes_of(element) * i);
  if (element == Element::int8) return float(std::int8_t(bits));
  if (element == Element::e4m3) return e4m3_to_float(bits & 255);
  const std::uint16_t half = std::uint16_t(bits);
  if (element == Element::bfloat16) return __bfloat162float({half});
  __half value;
  std::memcpy(&value, &half, sizeof half);
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

// Rows of 2:4 as the 32 lanes of a warp hold 16 of them, 32 columns of 16-bit elements or 64 of 8-bit ones.
// With g = lane / 4, t = lane % 4 and w elements in a word, words 0 and 2 of a lane are the kept values w t
// on and 4 w + w t on of row g, words 1 and 3 those of row g + 8.
//
// Metadata is a nibble for each group of four columns. Of 16-bit elements number 2 selector + h of the lanes
// of row g has that of columns 16 h on, in its low half of row g, in its high half of row g + 8. Of 8-bit
// elements number 2 h + r has that of columns 32 h on of row g + 8 r.
template <typename Word, typename Metadata, typename Use>
void for_each_kept(int row, int selector, Element element, Word&& word, Metadata&& metadata, Use&& use) {
  const unsigned g = unsigned(row % 8);
  const int high = row / 8, w = elements_of_word(element);
  for (int group = 0; group < 4 * w; ++group) {
    const bool is_wide = bytes_of(element) == 2;
    const std::uint32_t bits =
        metadata(g * 4 + unsigned(is_wide ? 2 * selector + group / 4 : group / 8 * 2 + high));
    const KeptColumns kept =
        kept_columns((is_wide ? bits >> (16 * high + 4 * (group % 4)) : bits >> (4 * (group % 8))) & 15);
    for (int i = 0; i < 2; ++i) {
      const int place = 2 * group + i;  // among the kept values of the row
      const std::uint32_t of_lane = word(g * 4 + unsigned(place % (4 * w) / w), high + 2 * (place / (4 * w)));
      use(4 * group + int(i == 0 ? kept.first : kept.second), element_of(of_lane, place % w, element));
    }
  }
}

// d (16, 8) += a (16, 16 w, 2:4) b (16 w, 8) of elements of which a word has w. Products of 8-bit integers
// are summed exactly.
template <typename Sum>
void mma_sp(Sum (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4], std::uint32_t metadata,
            int selector, Element element) {
  struct Lane {
    Sum* d;
    const std::uint32_t *a, *b;
    std::uint32_t metadata;
  } mine{d, a, b, metadata};
  with_warp(selector == 0 ? "mma.sp, selector 0" : "mma.sp, selector 1", mine, [&](auto&& of) {
    const unsigned w = unsigned(elements_of_word(element));
    Sum right[64][8];  // b: register i of a lane holds rows 4 w i + w t on of column g
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 4 * w; ++i)
        right[i / w * 4 * w + lane % 4 * w + i % w][lane / 4] =
            Sum(element_of(of(lane).b[i / w], int(i % w), element));
    for (int row = 0; row < 16; ++row) {
      Sum sums[8] = {};
      for_each_kept(
          row, selector, element, [&](unsigned lane, int i) { return of(lane).a[i]; },
          [&](unsigned lane) { return of(lane).metadata; },
          [&](int column, float value) {
            for (int n = 0; n < 8; ++n) sums[n] += Sum(value) * right[column][n];
          });
      for (unsigned n = 0; n < 8; ++n)
        of(unsigned(row % 8) * 4 + n / 2).d[row / 8 * 2 + int(n % 2)] += sums[n];
    }
  });
}

}  // namespace madtp::simt
