// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a few chosen queries of ragged sequences attend to: how text ranks the image tokens of a decoder
// (FastV, Chen et al., ECCV 2024, arXiv 2403.06764). The rules of madtp/tokens.h on pointers, cu_seqlens and
// statuses hold here too.

#include <cstdint>

#include "madtp/dtype.h"
#include "madtp/export.h"
#include "madtp/status.h"
#include "madtp/version.h"

namespace madtp {

// Chosen queries and all keys of B sequences. Query head h reads key head h / (heads / key_heads). The
// head_dim elements of a head are contiguous; strides count elements.
struct AttentionRowsInputs {
  DType dtype;
  const void* q_rows;         // (rows, heads, head_dim)
  const void* k;              // (tokens, key_heads, head_dim)
  std::int64_t q_strides[2];  // between rows, between heads
  std::int64_t k_strides[2];
  const std::int32_t* cu_seqlens_q;  // (batch + 1,), of q_rows
  const std::int32_t* cu_seqlens_k;  // (batch + 1,), of k
  std::int64_t rows, tokens, batch;
  std::int64_t heads, key_heads, head_dim;  // heads is a multiple of key_heads
  float softmax_scale;  // mostly 1 / sqrt(head_dim); 0 gives all keys that a row sees the same score
  // (rows,) a row sees the keys 0 to this one of its sequence, none below 0; null: all of them
  const std::int32_t* row_position;
};

namespace cpu MADTP_API {

// attention_j = mean over the heads and over the rows of its sequence that see a key of
// softmax_j(softmax_scale q_i k_j), the softmax being over the keys that row i sees; 0 where no row sees any.
// Computes in float32. A softmax_scale q_i k_j that is 88 or more below the largest of its row counts for
// nothing. The bits do not depend on the number of threads or on other sequences.
Status attention_rows(const AttentionRowsInputs& inputs,
                      float* attention,  // (tokens,)
                      void* workspace,   // as many bytes as attention_rows_workspace says
                      int threads);

// The bytes that a call with these arguments needs beside its result, O(tokens * key_heads); a workspace is
// best aligned to 64 bytes.
Status attention_rows_workspace(const AttentionRowsInputs& inputs, int threads, std::int64_t* bytes);

}  // namespace cpu MADTP_API

#if MADTP_HAS_CUDA
namespace cuda MADTP_API {

// As its namesake above, enqueued on `stream` (a cudaStream_t), by Triton kernels that were compiled with the
// library: Status::unsupported in one that has none, or none for this device, and for more than 16 query
// heads on a key head. Nothing is read on the host. Also: q_rows, k and the workspace lie on 16-byte
// boundaries, head_dim and strides are multiples of 8, strides below 2^24 between rows. 0 in rows past the
// last sequence.
Status attention_rows(const AttentionRowsInputs& inputs, float* attention,
                      void* workspace,  // as many bytes as attention_rows_workspace says
                      void* stream);
Status attention_rows_workspace(const AttentionRowsInputs& inputs, std::int64_t* bytes);

}  // namespace cuda MADTP_API
#endif
}  // namespace madtp
