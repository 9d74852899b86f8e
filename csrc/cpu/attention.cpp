// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernel of the chosen instruction set.

#include "madtp/attention.h"

#include <cmath>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

constexpr std::int64_t kMaxHeadDim = 128;

// Every sequence with queries has keys, and as many of them in self-attention.
bool has_valid_lengths(const AttentionInputs& a, bool self_attention) {
  for (std::int64_t b = 0; b < a.batch; ++b) {
    const std::int32_t queries = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
    const std::int32_t keys = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b];
    if (self_attention ? queries != keys : queries > 0 && keys == 0) return false;
  }
  return true;
}

// (rows, heads, head_dim)
bool is_tensor(const AttentionInputs& a, const void* data, std::int64_t rows,
               const std::int64_t (&strides)[2]) {
  return is_matrix(data, a.dtype, rows, a.heads * a.head_dim, strides[0]) &&
         is_addressable(a.heads, a.head_dim, strides[1], size_of(a.dtype));
}

bool is_query_tensor(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.tokens_q, a.heads * a.head_dim);
}

bool is_key_tensor(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.tokens_k, a.heads * a.head_dim);
}

bool is_valid(const AttentionInputs& a, bool statistics) {
  return is_count(a.heads) && (a.heads > 0 || !statistics) && a.head_dim >= 16 && a.head_dim <= kMaxHeadDim &&
         a.head_dim % 16 == 0 && are_offsets(a.cu_seqlens_q, a.batch, a.tokens_q, true) &&
         are_offsets(a.cu_seqlens_k, a.batch, a.tokens_k, true) &&
         is_tensor(a, a.q, a.tokens_q, a.q_strides) && is_tensor(a, a.k, a.tokens_k, a.k_strides) &&
         is_tensor(a, a.v, a.tokens_k, a.v_strides) && std::isfinite(a.softmax_scale) &&
         has_valid_lengths(a, statistics || a.causal);
}

}  // namespace

Status varlen_attention(const AttentionInputs& a, void* out, float* lse, float* summary_attention,
                        float* received_attention, void* workspace, int threads) {
  const bool statistics = summary_attention != nullptr || received_attention != nullptr;
  if (!is_valid(a, statistics) || !is_query_tensor(a, out) || workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  if (statistics &&
      !(is_present(summary_attention, a.tokens_q) && is_present(received_attention, a.tokens_q)))
    return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention(a, out, lse, summary_attention, received_attention, workspace, threads));
}

Status varlen_attention_backward(const AttentionInputs& a, const AttentionGradients& g, void* workspace,
                                 int threads) {
  const bool statistics = g.grad_summary_attention != nullptr || g.grad_received_attention != nullptr;
  if (!is_valid(a, statistics) || !is_query_tensor(a, g.grad_out) || !is_query_tensor(a, g.grad_q) ||
      !is_key_tensor(a, g.grad_k) || !is_key_tensor(a, g.grad_v) || !is_present(g.lse, a.tokens_q, a.heads) ||
      workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  if (statistics && !(is_present(g.grad_summary_attention, a.tokens_q) &&
                      is_present(g.grad_received_attention, a.tokens_q) && is_query_tensor(a, g.out)))
    return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_backward(a, g, workspace, threads));
}

Status varlen_attention_workspace(const AttentionInputs& a, bool statistics, int threads,
                                  std::int64_t* bytes) {
  if (!is_valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_workspace(a, statistics, threads, bytes));
}

Status varlen_attention_backward_workspace(const AttentionInputs& a, bool statistics, int threads,
                                           std::int64_t* bytes) {
  if (!is_valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_backward_workspace(a, statistics, threads, bytes));
}

}  // namespace madtp::cpu
