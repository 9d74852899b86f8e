// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the entry points of linear layers ask of indices and epilogues.

#include <cstdint>

#include "madtp/sparse24.h"

namespace madtp::cpu {

// i0 < i1 in every nibble, i0 | i1 << 2.
inline bool is_ascending(const std::uint8_t* indices, std::int64_t bytes) {
  constexpr unsigned valid = 1 << 4 | 1 << 8 | 1 << 12 | 1 << 9 | 1 << 13 | 1 << 14;
  unsigned all = 1;
  for (std::int64_t i = 0; i < bytes; ++i) all &= valid >> (indices[i] & 15) & valid >> (indices[i] >> 4);
  return all != 0;
}

// A vector of float32 or `dtype`, or none.
inline bool is_affine(const void* data, DType data_dtype, DType dtype) {
  return data == nullptr || data_dtype == DType::float32 || data_dtype == dtype;
}

inline bool is_activation(Activation activation) {
  return activation >= Activation::none && activation <= Activation::relu;
}

}  // namespace madtp::cpu
