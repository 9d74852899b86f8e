// SPDX-License-Identifier: Apache-2.0
#pragma once

// y = residual + scale * activation(x W^T + bias) with a 2:4 sparse W: at most 2 non-zeros in every aligned
// group of 4 columns. The rules of madtp/tokens.h on pointers and statuses hold here too.

#include <cstdint>

#include "madtp/dtype.h"
#include "madtp/export.h"
#include "madtp/status.h"
#include "madtp/version.h"

namespace madtp {

// The values are part of the ABI. gelu is x Phi(x), gelu_tanh its usual approximation, quick_gelu
// x sigmoid(1.702 x).
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, quick_gelu = 3, relu = 4 };

// Whether a weight of this shape can be stored as a Sparse24Weight: whole groups, and rows that kernels can
// pair.
constexpr bool sparse24_supports_shape(std::int64_t out_features, std::int64_t in_features) {
  return out_features >= 0 && out_features % 8 == 0 && in_features >= 0 && in_features % 16 == 0;
}

// W (out_features, in_features) as stored: the two kept values of every group and where they stand in it.
struct Sparse24Weight {
  DType dtype;
  const void* values;           // (out_features, in_features / 2)
  const std::uint8_t* indices;  // (out_features, in_features / 8), two groups a byte, the first in the low
                                // nibble; a nibble is i0 | i1 << 2, columns i0 < i1
  std::int64_t out_features;    // a multiple of 8
  std::int64_t in_features;     // a multiple of 16
};

// A dense W, before it is 2:4.
struct Sparse24Dense {
  DType dtype;
  const void* weight;  // (out_features, in_features)
  std::int64_t weight_stride;
  const float* score;  // (out_features, in_features): what ranks the columns; null: their magnitudes
  std::int64_t score_stride;
  std::int64_t out_features;  // a multiple of 8
  std::int64_t in_features;   // a multiple of 16
  bool transposed = false;    // weight and score are stored as (in_features, out_features), on GPUs only
};

// A linear layer and what follows it.
struct Sparse24Linear {
  DType dtype;    // of x, residual and the output
  const void* x;  // (tokens, in_features)
  std::int64_t x_stride, tokens;
  const void* layout;  // what sparse24_pack wrote
  DType weight_dtype;  // float32 or dtype
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

// Keeps the two columns of every group that rank highest, of equal ones the lower, and writes them as a
// Sparse24Weight. A kept zero is as good as none: a group with fewer than two non-zeros left stores zeros
// (never -0) at its lowest free columns. Status::invalid_argument for a NaN in weight or score; values and
// indices are then of no use. Status::unsupported for a transposed weight.
Status sparse24_prune(const Sparse24Dense& dense,
                      void* values,           // (out_features, in_features / 2), dtype of the weight
                      std::uint8_t* indices,  // (out_features, in_features / 8)
                      int threads);

// Bytes of the layout of a weight, which the instruction set in use shapes: a layout belongs to the process
// that packed it. About 0.64 of the bytes of the dense weight in float32, and in bfloat16 where the CPU has
// dot products of it; else 0.78 in the 16-bit types.
Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes);

// Writes the layout. Status::invalid_argument for indices that do not ascend.
Status sparse24_pack(const Sparse24Weight& weight, void* layout, int threads);

// The rows of `out` must not overlap: out_stride is at least out_features, or at most -out_features, for two
// rows and more. Accumulates in float32 and casts once. A row of the result has the same bits whatever the
// other rows, their number and the number of threads are.
Status sparse24_linear(const Sparse24Linear& inputs,
                       void* out,  // (tokens, out_features)
                       std::int64_t out_stride, int threads);

}  // namespace cpu MADTP_API

#if MADTP_HAS_CUDA
// bfloat16 and float16 (float32 too where a weight is pruned), on GPUs of compute capability 8.0 and newer
// for which the library has code; Status::unsupported elsewhere. Pointers are multiples of 16 bytes (of 4 to
// `num_rows` and `has_nan`), strides of 8 elements, and a weight has the dtype of x. At most 2^27 tokens and
// features of either side. Work is queued on `stream`, a cudaStream_t of the current device; of another
// device it is Status::invalid_argument.
namespace cuda MADTP_API {

// As madtp::cpu::sparse24_prune, of a transposed weight too, but that the device cannot answer at once:
// `has_nan` becomes 1 where it would have returned Status::invalid_argument for a NaN, else 0.
Status sparse24_prune(const Sparse24Dense& dense,
                      void* values,           // (out_features, in_features / 2), dtype of the weight
                      std::uint8_t* indices,  // (out_features, in_features / 8)
                      std::int32_t* has_nan,  // (1,)
                      void* stream);

// Bytes of the layout, the same on every device: 0.5625 of the dense weight's, padded to 64 features
// on either side.
Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes);

// Writes the layout of a weight whose indices ascend.
Status sparse24_pack(const Sparse24Weight& weight, void* layout, void* stream);

// How a linear layer is laid out on a device: what a tuner chooses from.
struct Sparse24Config {
  int architecture;       // that the kernel was written for: 80, which runs on newer devices too, or 90 ...
  int tile_tokens;        // of a block
  int tile_out_features;  // of a block
  int cluster = 1;        // blocks that share the tokens of a tile
};

// Every configuration that can run these inputs on the current device: writes the first `capacity` of them to
// `configs`, which may be null where that is 0, and how many there are to `count`.
Status sparse24_linear_configs(const Sparse24Linear& inputs,
                               Sparse24Config* configs,  // (capacity,)
                               int capacity, int* count);

// Accumulates in float32 and casts once. Rows from `num_rows` on cost next to nothing. A row of the result
// has the same bits whatever the other rows and their number are; all configurations of an architecture
// agree. Null is the one that should be fastest by a model of the device. Status::invalid_argument for one
// that cannot run the inputs.
Status sparse24_linear(const Sparse24Linear& inputs,
                       void* out,  // (tokens, out_features)
                       std::int64_t out_stride, void* stream, const Sparse24Config* config = nullptr);

}  // namespace cuda MADTP_API
#endif

}  // namespace madtp
