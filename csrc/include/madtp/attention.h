// SPDX-License-Identifier: Apache-2.0
#pragma once

// Softmax attention inside ragged sequences that also returns how important every token is to the others
// (MADTP, Cao et al., CVPR 2024, arXiv 2403.02991, section 3.3). The rules of madtp/tokens.h on pointers,
// cu_seqlens and statuses hold here too.

#include <cstdint>

#include "madtp/dtype.h"
#include "madtp/export.h"
#include "madtp/status.h"
#include "madtp/version.h"

namespace madtp {

// Queries, keys and values of B sequences. Self-attention passes the same cu_seqlens twice. The head_dim
// elements of a head are contiguous; strides count elements. Query i of Nq stands at position
// p = i + Nk - Nq among the Nk keys of its sequence: the last query at the last key.
struct AttentionInputs {
  DType dtype;
  const void* q;              // (tokens_q, heads, head_dim)
  const void* k;              // (tokens_k, key_heads, head_dim)
  const void* v;              // (tokens_k, key_heads, head_dim)
  std::int64_t q_strides[2];  // between rows, between heads
  std::int64_t k_strides[2];
  std::int64_t v_strides[2];
  const std::int32_t* cu_seqlens_q;  // (batch + 1,)
  const std::int32_t* cu_seqlens_k;  // (batch + 1,)
  std::int64_t tokens_q, tokens_k, batch, heads, head_dim;
  float softmax_scale;  // mostly 1 / sqrt(head_dim); 0 gives all keys that a query sees the same score
  bool causal;          // a query sees no key after its position
  const std::int32_t* summary_index;  // (batch,) row inside its sequence, -1: none; null: row 0 of each
  // Query head h reads key head h / (heads / key_heads). A divisor of heads; 0 is as many as those.
  std::int64_t key_heads = 0;
  std::int64_t window_left = -1;   // how many keys before its position a query sees; -1: all
  std::int64_t window_right = -1;  // likewise after it
  float softcap = 0;               // above 0: a score s becomes softcap tanh(s / softcap)
  // A slope for each head: slope |p - j| is taken off the score of key j, after softcap. Null: none.
  const float* alibi_slopes = nullptr;  // (heads,), or (batch, heads) with alibi_stride
  std::int64_t alibi_stride = 0;        // between sequences: 0 where all have the same slopes
};

namespace cpu MADTP_API {

// out_i = sum_j softmax_j(score_ij) v_j over the keys that query i sees, zeros where it sees none; score_ij
// is softmax_scale q_i k_j, after softcap and slopes. With statistics, which are for self-attention of at
// least one head: summary_attention_j = sum_h P[h,s,j] ||out[h,j]|| / sum_h ||out[h,j]|| for the summary
// token s, and received_attention_j = sum over queries i != s of max_h P[h,i,j], under a causal mask or in a
// window divided by the number that see j. head_dim is a multiple of 8, at most 256. Computes in float32;
// where the CPU multiplies pairs of bfloat16, subnormal inputs of that type may count as zero, and
// probabilities are rounded to it before they multiply v. A score that is 88 or more below the largest of its
// row counts for nothing. Tokens of a sequence whose q, k and v are equal have the same bits in every result,
// unless a mask makes them see other keys or slopes tell them apart.
Status varlen_attention(const AttentionInputs& inputs,
                        void* out,   // (tokens_q, heads, head_dim), contiguous
                        float* lse,  // (heads, tokens_q) log_e of sum_j exp(score_ij), -inf of none; or null
                        float* summary_attention,   // (tokens_q,); both null: no statistics
                        float* received_attention,  // (tokens_q,)
                        void* workspace,            // as many bytes as varlen_attention_workspace says
                        int threads);

// The bytes that a forward with these arguments needs beside its results: O(tokens * heads), and with
// statistics a float for every key of a sequence and every 84 of its queries. A workspace is best aligned to
// 64 bytes.
Status varlen_attention_workspace(const AttentionInputs& inputs, bool statistics, int threads,
                                  std::int64_t* bytes);

// What the backward reads and writes beside the inputs of the forward.
struct AttentionGradients {
  const void* out;       // (tokens_q, heads, head_dim) of the forward, contiguous; read with statistics only
  const float* lse;      // (heads, tokens_q) of the forward
  const void* grad_out;  // (tokens_q, heads, head_dim), contiguous
  const float* grad_summary_attention;   // (tokens_q,); both null: the forward gave no statistics
  const float* grad_received_attention;  // (tokens_q,)
  void* grad_q;                          // (tokens_q, heads, head_dim), contiguous
  void* grad_k;                          // (tokens_k, key_heads, head_dim), contiguous
  void* grad_v;                          // (tokens_k, key_heads, head_dim), contiguous
};

// Exact through the output and both statistics; the maximum over heads hands its gradient to the first head
// that reaches it. Probabilities are recomputed: the workspace is O(tokens * heads * head_dim).
Status varlen_attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                                 void* workspace, int threads);
Status varlen_attention_backward_workspace(const AttentionInputs& inputs, bool statistics, int threads,
                                           std::int64_t* bytes);

}  // namespace cpu MADTP_API

#if MADTP_HAS_CUDA
namespace cuda MADTP_API {

// As their namesakes above, enqueued on `stream` (a cudaStream_t), by Triton kernels that were compiled with
// the library: Status::unsupported in one that has none, or none for this device or this head_dim, and with
// softcap or alibi_slopes, which these kernels have not. Nothing is read on the host, so the caller says how
// long the longest sequence may be; one that is longer counts as that long. Also: q, k, v, out and the
// workspace lie on 16-byte boundaries and strides are multiples of 8, below 2^24 between rows; softmax_scale
// is not negative; statistics need as many queries as keys. In rows past the last sequence lse is not
// written, all else is zero.
Status varlen_attention(const AttentionInputs& inputs, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                        void* out, float* lse, float* summary_attention, float* received_attention,
                        void* workspace,  // as many bytes as varlen_attention_workspace says
                        void* stream);
Status varlen_attention_workspace(const AttentionInputs& inputs, std::int64_t max_seqlen_q,
                                  std::int64_t max_seqlen_k, bool statistics, std::int64_t* bytes);

}  // namespace cuda MADTP_API
#endif
}  // namespace madtp
