// SPDX-License-Identifier: Apache-2.0
#pragma once

// Dynamic token pruning of a ragged batch: B sequences one after another in T tokens, sequence b in rows
// cu_seqlens[b] to cu_seqlens[b + 1]. The equations are those of MADTP (Cao et al., CVPR 2024, arXiv
// 2403.02991, section 3.3).
//
// Pointers of madtp::cpu point to host memory, those of madtp::cuda to device memory of the current device.
// Outputs are written in full and must not overlap inputs. Strides count elements between rows; the elements
// of a row are contiguous. Any size may be 0, of which the result is empty, but where a function says that it
// needs one; none is above 2^31 - 1, and no row starts 2^61 bytes or more from the first.
//
// Every function returns Status::invalid_argument, before anything is written, for a null pointer to data
// that is not empty, a size or a stride that breaks these limits, or a DType outside the enum. madtp::cpu
// also refuses cu_seqlens that do not start at 0, decrease or do not end at the number of tokens; madtp::cuda
// cannot see them, and is memory-safe on any value.

#include <cstdint>

#include "madtp/dtype.h"
#include "madtp/export.h"
#include "madtp/status.h"
#include "madtp/version.h"

namespace madtp {

// The `source` of an output row past the last sequence.
constexpr std::int32_t padding_row = INT32_MIN;

// Which tokens stay and where they go: what select_tokens writes, with the offsets of its input.
struct TokenSelection {
  const std::uint8_t* keep;            // (tokens,) 0 or 1
  const std::int32_t* cu_seqlens_in;   // (batch + 1,)
  const std::int32_t* cu_seqlens_out;  // (batch + 1,); a merged row is the last of its sequence
  const std::int32_t* source;  // (capacity,) input row; -(b + 1): merged row of sequence b; or padding_row
  const float* merge_weight;   // (tokens,) weight of a pruned token in the merged row of its sequence
  std::int64_t tokens;         // T, of the input
  std::int64_t capacity;       // output rows, at least cu_seqlens_out[batch]
  std::int64_t batch;          // B
};

// The alignment logits of a ragged batch: what its tokens are scored and selected by.
struct ScoreInputs {
  const void* mag_logits;  // (tokens, alignment_tokens)
  DType logits_dtype;
  std::int64_t logits_stride, alignment_tokens;  // at least one of these
  const std::int32_t* cu_seqlens;                // (batch + 1,)
  std::int64_t tokens, batch;
  const std::int32_t* summary_index;  // (batch,) row inside its sequence, -1: none; null: row 0 of each
  // (tokens,) 0 or 1: always kept, and no candidate, as the summary token; null: none
  const std::uint8_t* protected_rows = nullptr;
};

// What select_tokens writes: the fields of a TokenSelection but cu_seqlens_in, in their order.
struct SelectionOutputs {
  std::uint8_t* keep;            // (tokens,)
  std::int32_t* cu_seqlens_out;  // (batch + 1,)
  std::int32_t* source;          // (tokens,), padding_row past cu_seqlens_out[batch]
  float* merge_weight;           // (tokens,), 0 where kept
};

namespace cpu MADTP_API {

// importance = (S_cls + S_self + S_mag) / 3: `summary_attention`, and the shares of `received_attention` and
// of relu(max_k mag_logits) in their sums over the prunable tokens of the sequence; 0 at the summary token
// and in protected rows.
Status token_importance(const float* summary_attention,   // (tokens,)
                        const float* received_attention,  // (tokens,)
                        const ScoreInputs& inputs,
                        float* importance,  // (tokens,)
                        int threads);

// keep j when S_j > min_k sum_j softmax_j(A_jk / temperature) S_j, or all of a sequence where fewer than 2
// would go or a value is not finite; j runs over the prunable tokens, and no other is looked at. Below a
// temperature of 0.01 the threshold goes on to the least S_j, in proportion to it. temperature 0 keeps
// everything; it must be finite and not negative.
Status select_tokens(const float* importance,  // (tokens,)
                     const ScoreInputs& inputs, double temperature, const SelectionOutputs& selection,
                     int threads);

// token_importance, then select_tokens of it, each sequence in one go while its logits are in the cache: what
// both write, bit for bit.
Status score_and_select(const float* summary_attention,   // (tokens,)
                        const float* received_attention,  // (tokens,)
                        const ScoreInputs& inputs, double temperature,
                        float* importance,  // (tokens,)
                        const SelectionOutputs& selection, int threads);

// Kept rows copied, the pruned rows of a sequence summed with their weights in float32, zeros past the last
// sequence.
Status gather_merge(const void* x, DType dtype, std::int64_t x_stride,  // (tokens, channels)
                    std::int64_t channels, const TokenSelection& selection,
                    void* out,  // (capacity, channels)
                    int threads);

// The gradient of gather_merge to x and to merge_weight (0 where kept).
Status gather_merge_backward(const void* grad, std::int64_t grad_stride,  // (capacity, channels), of dtype
                             const void* x, DType dtype, std::int64_t x_stride,  // (tokens, channels)
                             std::int64_t channels, const TokenSelection& selection,
                             void* grad_x,        // (tokens, channels)
                             float* grad_weight,  // (tokens,)
                             int threads);

// gather_merge, then LayerNorm of the rows as stored, statistics in float32; all zero past the last sequence.
// affine_dtype is float32 or dtype.
Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride,  // (tokens, channels)
                              std::int64_t channels, const TokenSelection& selection, const void* weight,
                              const void* bias,  // (channels,)
                              DType affine_dtype, double eps,
                              void* x_out,               // (capacity, channels)
                              void* normed,              // (capacity, channels)
                              float* mean, float* rstd,  // (capacity,)
                              int threads);

// gather_merge, then RMSNorm of the rows as stored: x / sqrt(mean(x^2) + eps) in float32, rounded to dtype,
// times the weight; zero past the last sequence.
Status gather_merge_rmsnorm(const void* x, DType dtype, std::int64_t x_stride,  // (tokens, channels)
                            std::int64_t channels, const TokenSelection& selection,
                            const void* weight,  // (channels,)
                            DType affine_dtype, double eps,
                            void* x_out,   // (capacity, channels)
                            void* normed,  // (capacity, channels)
                            int threads);

}  // namespace cpu MADTP_API

#if MADTP_HAS_CUDA
namespace cuda MADTP_API {

// As their namesakes above, enqueued on `stream` (a cudaStream_t). Nothing is read on the host.

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, void* stream);

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, void* stream);

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, void* stream);

// These three by Triton kernels that were compiled with the library: Status::unsupported in one that has
// none, or none for this device. logits_stride fits 32 bits, and the workspace lies on a 16-byte boundary. Of
// rows past the last sequence `source` alone is written.
Status token_importance(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, float* importance, void* workspace, void* stream);

Status select_tokens(const float* importance, const ScoreInputs& inputs, double temperature,
                     const SelectionOutputs& selection, void* workspace, void* stream);

Status score_and_select(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, double temperature, float* importance,
                        const SelectionOutputs& selection, void* workspace, void* stream);

// The bytes that the workspace of any of these three has for these inputs.
Status score_workspace(const ScoreInputs& inputs, std::int64_t* bytes);

}  // namespace cuda MADTP_API
#endif

}  // namespace madtp
