// The public entry point: checks its arguments, then runs the kernel of the chosen instruction set.

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

}  // namespace

Status varlen_attention(const AttentionInputs& a, void* out, float* summary, float* received, int threads) {
  const bool statistics = summary != nullptr || received != nullptr;
  const std::int64_t columns = a.heads * a.head_dim;
  if (!offsets(a.cu_seqlens_q, a.batch, a.rows_q, true) ||
      !offsets(a.cu_seqlens_k, a.batch, a.rows_k, true) || a.heads < 0 || a.head_dim < 16 ||
      a.head_dim > kMaxHeadDim || a.head_dim % 16 != 0 || !matrix(a.q, a.dtype, a.rows_q, columns) ||
      !matrix(a.k, a.dtype, a.rows_k, columns) || !matrix(a.v, a.dtype, a.rows_k, columns) ||
      !matrix(out, a.dtype, a.rows_q, columns) || !std::isfinite(a.softmax_scale) || threads < 1)
    return Status::invalid_argument;
  if (statistics && !(present(summary, a.rows_q) && present(received, a.rows_q)))
    return Status::invalid_argument;
  if (!lengths(a, statistics || a.causal)) return Status::invalid_argument;
  MADTP_DISPATCH(varlen_attention(a, out, summary, received, threads));
}

}  // namespace madtp::cpu
