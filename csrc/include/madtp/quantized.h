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
  bool many_rows = false;       // which layout a 2:4 weight gets: see cpu::quantized_layout_bytes
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
  bool many_rows = false;        // as the layout was packed
};

namespace cpu MADTP_API {

// Bytes of the layout of a weight, which the instruction set in use shapes: a layout belongs to the process.
// With AVX-512 VNNI a 2:4 weight has two. Either takes any number of rows of x and gives the same bits. With
// many_rows it is 1.01 bytes for a weight of the dense matrix in place of 0.63, some 6 % faster from 500 rows
// on and slower below 200, and takes 30 times as long to pack. Elsewhere they are the same.
Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse,
                              std::int64_t* bytes, bool many_rows = false);

// Writes the layout of a weight. Status::invalid_argument for indices that do not ascend.
Status quantized_pack(const QuantizedWeight& weight, void* layout, int threads);

Status quantized_linear(const QuantizedLinear& inputs,
                        void* out,                // (tokens, out_features)
                        std::int64_t out_stride,  // at least out_features: rows must not overlap
                        int threads);

}  // namespace cpu MADTP_API

#if MADTP_HAS_CUDA
// 2:4 weights alone, on GPUs of compute capability 8.0 and newer for which the library has code, and where
// that is code for sm_90a in e4m3 too; Status::unsupported elsewhere, and for a dense weight. Pointers are
// multiples of 16 bytes (of 4 to `num_rows`), strides of 8 elements, of quantised rows of 16; at most 2^27
// tokens and output features. Work is queued on `stream`, a cudaStream_t of the current device; of another
// device it is Status::invalid_argument.
namespace cuda MADTP_API {

// What x and the weight are rounded to. The values are part of the ABI. e4m3 is torch.float8_e4m3fn: there
// amax / 448 and 448 / amax stand where int8 has 127, and products are summed in float32 as the tensor cores
// do it, which keep some 14 bits of a sum: other bits than a CPU's.
enum class QuantizedType : int { int8 = 0, e4m3 = 1 };

// Rows of x, rounded with a scale each. A row with a NaN or an infinity has zeros and the scale NaN.
struct QuantizedRows {
  QuantizedType type;
  void* values;         // (tokens, in_features), 8 bits each
  std::int64_t stride;  // at least in_features: rows must not overlap
  float* scale;         // (tokens,)
};

// Writes `rows`, the same bits as the CPU. Those from `num_rows` on stay as they are.
Status quantize_rows(DType dtype,
                     const void* x,  // (tokens, in_features)
                     std::int64_t x_stride, std::int64_t tokens,
                     std::int64_t in_features,      // a multiple of 16
                     const std::int32_t* num_rows,  // one number, or null
                     const QuantizedRows& rows, void* stream);

// Bytes of the layout, the same on every device and for both types: 0.625 of the dense weight's in 8 bits,
// padded to 64 output and 128 input features.
Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, std::int64_t* bytes);

// Writes the layout of a weight of either type whose indices ascend.
Status quantized_pack(const QuantizedWeight& weight, void* layout, void* stream);

// Every configuration that can run these inputs on the current device, as sparse24_linear_configs.
Status quantized_linear_configs(const QuantizedLinear& inputs, const QuantizedRows& rows,
                                Sparse24Config* configs,  // (capacity,)
                                int capacity, int* count);

// The layer of rows that quantize_rows has written, in place of x, which is not read. In int8 the same bits
// as on a CPU without an activation and with relu. float32 outputs run on the kernel of sm_80.
Status quantized_linear(const QuantizedLinear& inputs, const QuantizedRows& rows,
                        void* out,  // (tokens, out_features)
                        std::int64_t out_stride, void* stream, const Sparse24Config* config = nullptr);

}  // namespace cuda MADTP_API
#endif

}  // namespace madtp
