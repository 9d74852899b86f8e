// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the entry points ask of their arguments.

#include <cstdint>

#include "madtp/dtype.h"
#include "sizes.h"

namespace madtp::cpu {

// Some data, or none to point to.
inline bool is_present(const void* data, std::int64_t rows, std::int64_t columns = 1) {
  return data != nullptr || rows == 0 || columns == 0;
}

// 0 first, never decreasing, `rows` (or at most that) last.
inline bool are_offsets(const std::int32_t* cu_seqlens, std::int64_t batch, std::int64_t rows, bool exactly) {
  if (cu_seqlens == nullptr || !is_count(batch) || !is_count(rows) || cu_seqlens[0] != 0) return false;
  for (std::int64_t b = 0; b < batch; ++b)
    if (cu_seqlens[b + 1] < cu_seqlens[b]) return false;
  return exactly ? cu_seqlens[batch] == rows : cu_seqlens[batch] <= rows;
}

// Rows of `columns` contiguous elements, `stride` elements from one to the next.
inline bool is_matrix(const void* data, DType dtype, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride) {
  return size_of(dtype) != 0 && is_addressable(rows, columns, stride, size_of(dtype)) &&
         is_present(data, rows, columns);
}

inline bool is_matrix(const void* data, DType dtype, std::int64_t rows, std::int64_t columns) {
  return is_matrix(data, dtype, rows, columns, columns);
}

// Likewise of an output, whose rows must not share elements.
inline bool is_output(const void* data, DType dtype, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride) {
  return is_matrix(data, dtype, rows, columns, stride) && are_apart(rows, columns, stride);
}

}  // namespace madtp::cpu
