// SPDX-License-Identifier: Apache-2.0
#pragma once

// What runs behind the entry points of madtp/quantized.h, which have checked the arguments; the linear layer
// is in cuda/sparse24/architectures.h.

#include "madtp/quantized.h"

namespace madtp::cuda {

Status quantize(DType dtype, const void* x, std::int64_t x_stride, std::int64_t tokens,
                std::int64_t in_features, const std::int32_t* num_rows, const QuantizedRows& rows,
                void* stream);

}  // namespace madtp::cuda
