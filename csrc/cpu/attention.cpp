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
bool lengths(const AttentionInputs& a, bool self_attention) {
  for (std::int64_t b = 0; b < a.batch; ++b) {
    const std::int32_t queries = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
    const std::int32_t keys = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b];
    if (self_attention ? queries != keys : queries > 0 && keys == 0) return false;
  }
  return true;
}

bool query_rows(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.rows_q, a.heads * a.head_dim);
}

bool key_rows(const AttentionInputs& a, const void* data) {
  return is_matrix(data, a.dtype, a.rows_k, a.heads * a.head_dim);
}

bool valid(const AttentionInputs& a, bool statistics) {
  return a.heads >= 0 && a.head_dim >= 16 && a.head_dim <= kMaxHeadDim && a.head_dim % 16 == 0 &&
         are_offsets(a.cu_seqlens_q, a.batch, a.rows_q, true) &&
         are_offsets(a.cu_seqlens_k, a.batch, a.rows_k, true) && query_rows(a, a.q) && key_rows(a, a.k) &&
         key_rows(a, a.v) && std::isfinite(a.softmax_scale) && lengths(a, statistics || a.causal);
}

}  // namespace

Status varlen_attention(const AttentionInputs& a, void* out, float* lse, float* summary, float* received,
                        void* workspace, int threads) {
  const bool statistics = summary != nullptr || received != nullptr;
  if (!valid(a, statistics) || !query_rows(a, out) || workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  if (statistics && !(is_present(summary, a.rows_q) && is_present(received, a.rows_q)))
    return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention(a, out, lse, summary, received, workspace, threads));
}

Status varlen_attention_backward(const AttentionInputs& a, const AttentionGradients& g, void* workspace,
                                 int threads) {
  const bool statistics = g.grad_summary != nullptr || g.grad_received != nullptr;
  if (!valid(a, statistics) || !query_rows(a, g.grad_out) || !query_rows(a, g.grad_q) ||
      !key_rows(a, g.grad_k) || !key_rows(a, g.grad_v) || !is_present(g.lse, a.rows_q, a.heads) ||
      workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  if (statistics && !(is_present(g.grad_summary, a.rows_q) && is_present(g.grad_received, a.rows_q) &&
                      query_rows(a, g.out)))
    return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_backward(a, g, workspace, threads));
}

Status varlen_attention_workspace(const AttentionInputs& a, bool statistics, int threads,
                                  std::int64_t* bytes) {
  if (!valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_workspace(a, statistics, threads, bytes));
}

Status varlen_attention_backward_workspace(const AttentionInputs& a, bool statistics, int threads,
                                           std::int64_t* bytes) {
  if (!valid(a, statistics) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention_backward_workspace(a, statistics, threads, bytes));
}

}  // namespace madtp::cpu
