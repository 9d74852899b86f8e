// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernel of the chosen instruction set.

#include "madtp/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

constexpr std::int64_t kHeadStep = 8, kMaxHeadDim = 256;

// With what is given in another way where it may be: kernels read key_heads and the window alone.
AttentionInputs resolved(AttentionInputs a) {
  if (a.key_heads == 0) a.key_heads = a.heads;
  if (a.causal) a.window_right = 0;
  for (std::int64_t* const side : {&a.window_left, &a.window_right})
    *side = std::min(*side, std::int64_t{INT32_MAX});  // no sequence is longer
  // Further out it bends every score to nothing, or none.
  if (a.softcap > 0) a.softcap = std::clamp(a.softcap, 1e-30f, 1e30f);
  return a;
}

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
bool is_tensor(const AttentionInputs& a, const void* data, std::int64_t rows, std::int64_t heads,
               const std::int64_t (&strides)[2]) {
  return is_matrix(data, a.dtype, rows, heads * a.head_dim, strides[0]) &&
         is_addressable(heads, a.head_dim, strides[1], size_of(a.dtype));
}

bool is_query_tensor(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.tokens_q, a.heads * a.head_dim);
}

bool is_key_tensor(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.tokens_k, a.key_heads * a.head_dim);
}

bool has_valid_heads(const AttentionInputs& a) {
  return is_count(a.heads) && is_count(a.key_heads) &&
         (a.key_heads > 0 ? a.heads % a.key_heads == 0 : a.heads == 0) && a.head_dim >= kHeadStep &&
         a.head_dim <= kMaxHeadDim && a.head_dim % kHeadStep == 0;
}

bool has_valid_scores(const AttentionInputs& a) {
  return std::isfinite(a.softmax_scale) && std::isfinite(a.softcap) && a.softcap >= 0 &&
         a.window_left >= -1 && a.window_right >= -1 &&
         (a.alibi_slopes == nullptr || is_addressable(a.batch, a.heads, a.alibi_stride, sizeof(float)));
}

bool is_valid(const AttentionInputs& a, bool statistics) {
  return has_valid_heads(a) && (a.heads > 0 || !statistics) &&
         are_offsets(a.cu_seqlens_q, a.batch, a.tokens_q, true) &&
         are_offsets(a.cu_seqlens_k, a.batch, a.tokens_k, true) &&
         is_tensor(a, a.q, a.tokens_q, a.heads, a.q_strides) &&
         is_tensor(a, a.k, a.tokens_k, a.key_heads, a.k_strides) &&
         is_tensor(a, a.v, a.tokens_k, a.key_heads, a.v_strides) && has_valid_scores(a) &&
         has_valid_lengths(a, statistics);
}

}  // namespace

Status varlen_attention(const AttentionInputs& inputs, void* out, float* lse, float* summary_attention,
                        float* received_attention, void* workspace, int threads) {
  const AttentionInputs a = resolved(inputs);
  const bool statistics = summary_attention != nullptr || received_attention != nullptr;
  if (!is_valid(a, statistics) || !is_query_tensor(a, out) || workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  if (statistics &&
      !(is_present(summary_attention, a.tokens_q) && is_present(received_attention, a.tokens_q)))
    return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention(a, out, lse, summary_attention, received_attention, workspace, threads));
}

Status varlen_attention_backward(const AttentionInputs& inputs, const AttentionGradients& g, void* workspace,
                                 int threads) {
  const AttentionInputs a = resolved(inputs);
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

Status varlen_attention_workspace(const AttentionInputs& inputs, bool statistics, int threads,
                                  std::int64_t* bytes) {
  const AttentionInputs a = resolved(inputs);
  if (!is_valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_workspace(a, statistics, threads, bytes));
}

Status varlen_attention_backward_workspace(const AttentionInputs& inputs, bool statistics, int threads,
                                           std::int64_t* bytes) {
  const AttentionInputs a = resolved(inputs);
  if (!is_valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_backward_workspace(a, statistics, threads, bytes));
}

}  // namespace madtp::cpu
