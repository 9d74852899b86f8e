// SPDX-License-Identifier: Apache-2.0
#pragma once

// Arithmetic on sizes that cannot overflow, for every check of arguments and every count of memory. Functions
// are static: each instruction set compiles its own.

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace madtp {

// What a product or a sum is that no memory could hold, and what it stays in further ones. Small enough to be
// rounded up.
constexpr std::int64_t kTooLarge = std::int64_t{1} << 61;

// A number of rows, columns, heads, sequences: products of two fit 64 bits.
static constexpr bool is_count(std::int64_t size) { return size >= 0 && size <= INT32_MAX; }

static constexpr std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Of sizes that are not negative.
static inline std::int64_t product_of(std::initializer_list<std::int64_t> sizes) {
  std::int64_t result = 1;
  for (const std::int64_t size : sizes)
    if (size == 0) return 0;
  for (const std::int64_t size : sizes)
    if (__builtin_mul_overflow(result, size, &result) || result > kTooLarge) return kTooLarge;
  return result;
}

static inline std::int64_t sum_of(std::initializer_list<std::int64_t> sizes) {
  std::int64_t result = 0;
  for (const std::int64_t size : sizes)
    if (__builtin_add_overflow(result, size, &result) || result > kTooLarge) return kTooLarge;
  return result;
}

// Whether the addresses of `rows` rows of `columns` elements can be computed. Strides may be negative.
static inline bool is_addressable(std::int64_t rows, std::int64_t columns, std::int64_t stride,
                                  std::size_t element_bytes) {
  if (rows < 0 || columns < 0 || stride == INT64_MIN) return false;
  const std::int64_t elements = sum_of({product_of({rows, stride < 0 ? -stride : stride}), columns});
  return product_of({elements, std::int64_t(element_bytes)}) < kTooLarge;
}

// Whether no two rows of an output share an element.
static constexpr bool are_apart(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  return rows <= 1 || stride >= columns || stride <= -columns;
}

}  // namespace madtp
