// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernel of the chosen instruction set.

#include "madtp/attention_rows.h"

#include <cmath>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

// (rows, heads, head_dim)
bool is_tensor(const AttentionRowsInputs& a, const void* data, std::int64_t rows, std::int64_t heads,
               const std::int64_t (&strides)[2]) {
  return is_matrix(data, a.dtype, rows, product_of({heads, a.head_dim}), strides[0]) &&
         is_addressable(heads, a.head_dim, strides[1], size_of(a.dtype));
}

bool is_valid(const AttentionRowsInputs& a) {
  return is_count(a.heads) && is_count(a.key_heads) && is_count(a.head_dim) && a.key_heads > 0 &&
         a.heads > 0 && a.heads % a.key_heads == 0 && a.head_dim > 0 &&
         are_offsets(a.cu_seqlens_q, a.batch, a.rows, true) &&
         are_offsets(a.cu_seqlens_k, a.batch, a.tokens, true) &&
         is_tensor(a, a.q_rows, a.rows, a.heads, a.q_strides) &&
         is_tensor(a, a.k, a.tokens, a.key_heads, a.k_strides) && std::isfinite(a.softmax_scale);
}

}  // namespace

Status attention_rows(const AttentionRowsInputs& inputs, float* attention, void* workspace, int threads) {
  if (!is_valid(inputs) || !is_present(attention, inputs.tokens) || workspace == nullptr || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(attention_rows(inputs, attention, workspace, threads));
}

Status attention_rows_workspace(const AttentionRowsInputs& inputs, int threads, std::int64_t* bytes) {
  if (!is_valid(inputs) || threads < 1 || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(attention_rows_workspace(inputs, threads, bytes));
}

}  // namespace madtp::cpu
