// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace madtp {

// Element type of a tensor passed as void*. The values are part of the ABI.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Bytes per element, 0 for a value outside the enum.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
  }
  return 0;
}

}  // namespace madtp
