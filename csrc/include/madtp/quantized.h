// SPDX-License-Identifier: Apache-2.0
#pragma once

// y = residual + scale * activation(x W^T + bias) with W in int8, dense or 2:4, and x rounded to int8 row by
// row. The rules of madtp/tokens.h on pointers and statuses hold here too.
//
// A row of x has the scale amax / 127 of its largest magnitude, and is x * (127 / amax), rounded half to
// even. A row of which amax is below 2^-119 counts as zeros; one with a NaN or an infinity gives NaN. The
// products are summed in int32, exactly. Then, one rounding in float32 after another: the sum times the scale
// of the row, times that of the weight's row, plus the bias. So every instruction set and thread count gives
// the same bits, but for the activations that are approximated.

#include <cstdint>

#include "madtp/dtype.h"
#include "madtp/export.h"
#include "madtp/sparse24.h"
#include "madtp/status.h"
#include "madtp/version.h"

namespace madtp {

// With more, a sum might not be an int32.
constexpr std::int64_t kMaxQuantizedInFeatures = 1 << 16;

// W (out_features, in_features) in integers, as stored. -128 is not used.
struct QuantizedWeight {
  const std::int8_t* values;  // (out_features, in_features), or with indices (out_features, in_features / 2)
  const std::uint8_t* indices;  // (out_features, in_features / 8) as in Sparse24Weight, or null: W is dense
  std::int64_t out_features;    // with indices a multiple of 8
  std::int64_t in_features;     // with indices a multiple of 16
};

// A linear layer and what follows it.
struct QuantizedLinear {
  DType dtype;    // of x, residual and the output
  const void* x;  // (tokens, in_features)
  std::int64_t x_stride, tokens;
  const void* layout;         // what quantized_pack wrote
  bool sparse;                // whether it was given indices
  const float* weight_scale;  // (out_features,)
  std::int64_t out_features, in_features;
  const void* bias;  // (out_features,), or null
  DType bias_dtype;  // float32 or dtype
  Activation activation;
  const void* scale;     // (out_features,), or null
  DType scale_dtype;     // float32 or dtype
  const void* residual;  // (tokens, out_features), or null
  std::int64_t residual_stride;
  const std::int32_t* num_rows;  // one number: rows from it on are written as zeros; null: none are
};

namespace cpu MADTP_API {

// Bytes of the layout of a weight, which the instruction set in use shapes: a layout belongs to the process.
Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse,
                              std::int64_t* bytes);

// Writes the layout of a weight. Status::invalid_argument for indices that do not ascend.
Status quantized_pack(const QuantizedWeight& weight, void* layout, int threads);

Status quantized_linear(const QuantizedLinear& inputs,
                        void* out,  // (tokens, out_features)
                        std::int64_t out_stride, int threads);

}  // namespace cpu MADTP_API
}  // namespace madtp
