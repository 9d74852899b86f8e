// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the entry points of the linear layers ask of their arguments.

#include <cstdint>

#include "madtp/sparse24.h"
#include "sizes.h"

namespace madtp::cuda {

inline constexpr std::int64_t kMaxSize = 1 << 27;  // so that what is counted within a tile fits 32 bits

inline bool is_weight_shape(std::int64_t out_features, std::int64_t in_features, DType dtype) {
  return size_of(dtype) != 0 && sparse24_supports_shape(out_features, in_features) &&
         out_features <= kMaxSize && in_features <= kMaxSize;
}

inline bool is_aligned(const void* data, int bytes = 16) {
  return reinterpret_cast<std::uintptr_t>(data) % unsigned(bytes) == 0;
}

// Data on a boundary of 16 bytes, or none where there is nothing to point to.
inline bool is_present(const void* data, std::int64_t rows, std::int64_t columns) {
  return is_aligned(data) && (data != nullptr || rows == 0 || columns == 0);
}

inline bool is_matrix(const void* data, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  return is_present(data, rows, columns) && stride % 8 == 0 &&
         is_addressable(rows, columns, stride, sizeof(float));  // the widest element
}

// Likewise of an output, whose rows must not share elements.
inline bool is_output(const void* data, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  return is_matrix(data, stride, rows, columns) && are_apart(rows, columns, stride);
}

// A vector of float32 or `dtype`, or none.
inline bool is_affine(const void* data, DType data_dtype, DType dtype) {
  return data == nullptr || (is_aligned(data) && (data_dtype == DType::float32 || data_dtype == dtype));
}

// Whether what follows the product can be read, and num_rows.
inline bool is_epilogue(const Sparse24Linear& a) {
  return is_affine(a.bias, a.bias_dtype, a.dtype) && is_affine(a.scale, a.scale_dtype, a.dtype) &&
         a.activation >= Activation::none && a.activation <= Activation::relu &&
         (a.residual == nullptr || is_matrix(a.residual, a.residual_stride, a.tokens, a.out_features)) &&
         is_aligned(a.num_rows, 4);
}

}  // namespace madtp::cuda
