// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tensor maps, by which TMA copies boxes of a matrix.

#include <cstdint>

#include "cuda/ptx_sm90.cuh"
#include "madtp/dtype.h"
#include "madtp/status.h"

namespace madtp::cuda {

// Boxes of `box_rows` (at most 256) times 64 elements of 16 bits, 128 bytes, swizzled. Zeros outside of the
// matrix. The data and the rows are on 16-byte boundaries. Status::unsupported where the driver has no TMA.
Status encode_matrix(ptx::TensorMap* map, const void* data, DType dtype, std::int64_t rows,
                     std::int64_t columns, std::int64_t row_stride, int box_rows);

}  // namespace madtp::cuda
