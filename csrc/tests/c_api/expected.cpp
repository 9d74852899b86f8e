// SPDX-License-Identifier: Apache-2.0
#include "expected.h"

#include <vector>

#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/quantized.h"
#include "madtp/sparse24.h"
#include "madtp/tokens.h"

using namespace madtp;

namespace {

constexpr DType kFloat = DType::float32;

// The first status that is not ok.
Status first_failure(std::initializer_list<Status> all) {
  for (const Status status : all)
    if (status != Status::ok) return status;
  return Status::ok;
}

std::vector<char> scratch(std::int64_t bytes) { return std::vector<char>(bytes + 1); }

}  // namespace

int expected_attention(const float* q, const float* k, const float* v, const float* grad,
                       const std::int32_t* cu_seqlens, float scale, std::int64_t window_left,
                       attention_results* to) {
  AttentionInputs a{kFloat,
                    q,
                    k,
                    v,
                    {CHANNELS, HEAD_DIM},
                    {CHANNELS, HEAD_DIM},
                    {CHANNELS, HEAD_DIM},
                    cu_seqlens,
                    cu_seqlens,
                    TOKENS,
                    TOKENS,
                    BATCH,
                    HEADS,
                    HEAD_DIM,
                    scale,
                    false,
                    nullptr};
  a.window_left = window_left;
  std::int64_t bytes = 0, backward_bytes = 0;
  const Status sized = first_failure({cpu::varlen_attention_workspace(a, true, 1, &bytes),
                                      cpu::varlen_attention_backward_workspace(a, true, 1, &backward_bytes)});
  if (sized != Status::ok) return int(sized);
  const Status forward =
      cpu::varlen_attention(a, to->out, to->lse, to->summary, to->received, scratch(bytes).data(), 1);
  const cpu::AttentionGradients gradients{to->out,      to->lse,    grad,       to->summary,
                                          to->received, to->grad_q, to->grad_k, to->grad_v};
  return int(first_failure(
      {forward, cpu::varlen_attention_backward(a, gradients, scratch(backward_bytes).data(), 1)}));
}

int expected_attention_rows(const float* q_rows, const float* k, const std::int32_t* cu_seqlens_q,
                            const std::int32_t* cu_seqlens_k, float scale, float* attention) {
  const AttentionRowsInputs a{kFloat,
                              q_rows,
                              k,
                              {CHANNELS, HEAD_DIM},
                              {CHANNELS, HEAD_DIM},
                              cu_seqlens_q,
                              cu_seqlens_k,
                              ROWS,
                              TOKENS,
                              BATCH,
                              HEADS,
                              HEADS,
                              HEAD_DIM,
                              scale,
                              nullptr};
  std::int64_t bytes = 0;
  const Status sized = cpu::attention_rows_workspace(a, 1, &bytes);
  if (sized != Status::ok) return int(sized);
  return int(cpu::attention_rows(a, attention, scratch(bytes).data(), 1));
}

int expected_tokens(const float* x, const float* summary, const float* received, const float* logits,
                    const std::int32_t* cu_seqlens, double temperature, const float* weight,
                    const float* bias, token_results* to) {
  const ScoreInputs scores{logits, kFloat, K, K, cu_seqlens, TOKENS, BATCH, nullptr};
  const SelectionOutputs outputs{to->keep, to->cu_seqlens_out, to->source, to->merge_weight};
  const Status selected =
      cpu::score_and_select(summary, received, scores, temperature, to->importance, outputs, 1);
  if (selected != Status::ok) return int(selected);
  to->capacity = to->cu_seqlens_out[BATCH];
  const TokenSelection selection{to->keep,         cu_seqlens, to->cu_seqlens_out, to->source,
                                 to->merge_weight, TOKENS,     to->capacity,       BATCH};
  return int(
      first_failure({cpu::gather_merge(x, kFloat, CHANNELS, CHANNELS, selection, to->out, 1),
                     cpu::gather_merge_rmsnorm(x, kFloat, CHANNELS, CHANNELS, selection, weight, kFloat, 1e-6,
                                               to->out, to->rms, 1),
                     cpu::gather_merge_layernorm(x, kFloat, CHANNELS, CHANNELS, selection, weight, bias,
                                                 kFloat, 1e-5, to->out, to->normed, to->mean, to->rstd, 1),
                     cpu::gather_merge_backward(to->normed, CHANNELS, x, kFloat, CHANNELS, CHANNELS,
                                                selection, to->grad_x, to->grad_weight, 1)}));
}

int expected_sparse24(const float* x, const float* weight, const float* bias, const float* scale,
                      const float* residual, linear_results* to) {
  const Sparse24Dense dense{kFloat, weight, CHANNELS, nullptr, 0, OUT, CHANNELS};
  std::int64_t bytes = 0;
  const Status pruned = first_failure({cpu::sparse24_prune(dense, to->values, to->indices, 1),
                                       cpu::sparse24_layout_bytes(OUT, CHANNELS, kFloat, &bytes)});
  if (pruned != Status::ok) return int(pruned);
  std::vector<char> layout = scratch(bytes);
  const Status packed =
      cpu::sparse24_pack({kFloat, to->values, to->indices, OUT, CHANNELS}, layout.data(), 1);
  const Sparse24Linear a{kFloat, x,      CHANNELS,         TOKENS, layout.data(), kFloat,   OUT, CHANNELS,
                         bias,   kFloat, Activation::gelu, scale,  kFloat,        residual, OUT, nullptr};
  return int(first_failure({packed, cpu::sparse24_linear(a, to->out, OUT, 1)}));
}

int expected_quantized(const float* x, const std::int8_t* values, const std::uint8_t* indices,
                       const float* weight_scale, const float* bias, float* out) {
  const bool sparse = indices != nullptr;
  std::int64_t bytes = 0;
  const Status sized = cpu::quantized_layout_bytes(OUT, CHANNELS, sparse, &bytes);
  if (sized != Status::ok) return int(sized);
  std::vector<char> layout = scratch(bytes);
  const Status packed = cpu::quantized_pack({values, indices, OUT, CHANNELS}, layout.data(), 1);
  const QuantizedLinear a{kFloat,       x,      CHANNELS, TOKENS, layout.data(), sparse,
                          weight_scale, OUT,    CHANNELS, bias,   kFloat,        Activation::relu,
                          nullptr,      kFloat, nullptr,  0,      nullptr};
  return int(first_failure({packed, cpu::quantized_linear(a, out, OUT, 1)}));
}
