// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernels of the chosen instruction set.

#include "madtp/tokens.h"

#include <cmath>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

bool is_valid(const TokenSelection& s) {
  return is_count(s.capacity) && are_offsets(s.cu_seqlens_in, s.batch, s.tokens, true) &&
         are_offsets(s.cu_seqlens_out, s.batch, s.capacity, false) && is_present(s.keep, s.tokens) &&
         is_present(s.source, s.capacity) && is_present(s.merge_weight, s.tokens);
}

bool is_valid(const ScoreInputs& s) {
  return are_offsets(s.cu_seqlens, s.batch, s.tokens, true) &&
         is_matrix(s.mag_logits, s.logits_dtype, s.tokens, s.alignment_tokens, s.logits_stride) &&
         is_count(s.alignment_tokens) && s.alignment_tokens >= 1;
}

bool is_valid(const SelectionOutputs& s, std::int64_t tokens) {
  return is_present(s.keep, tokens) && s.cu_seqlens_out != nullptr && is_present(s.source, tokens) &&
         is_present(s.merge_weight, tokens);
}

// The rows that a selection gathers from.
bool is_input(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
              const TokenSelection& s) {
  return is_count(channels) && is_matrix(x, dtype, s.tokens, channels, x_stride);
}

bool is_temperature(double value) { return value >= 0 && std::isfinite(value); }

// The weight or the bias of a norm.
bool is_affine(const void* data, std::int64_t channels, DType affine_dtype, DType dtype) {
  return is_present(data, channels) && (affine_dtype == dtype || affine_dtype == DType::float32);
}

bool is_eps(double value) { return value > 0 && std::isfinite(value); }

}  // namespace

Status token_importance(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, float* importance, int threads) {
  if (!is_valid(inputs) || !is_present(summary_attention, inputs.tokens) ||
      !is_present(received_attention, inputs.tokens) || !is_present(importance, inputs.tokens) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(token_importance(summary_attention, received_attention, inputs, importance, threads));
}

Status select_tokens(const float* importance, const ScoreInputs& inputs, double temperature,
                     const SelectionOutputs& selection, int threads) {
  if (!is_valid(inputs) || !is_temperature(temperature) || !is_valid(selection, inputs.tokens) ||
      !is_present(importance, inputs.tokens) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(select_tokens(importance, inputs, temperature, selection, threads));
}

Status score_and_select(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, double temperature, float* importance,
                        const SelectionOutputs& selection, int threads) {
  if (!is_valid(inputs) || !is_temperature(temperature) || !is_valid(selection, inputs.tokens) ||
      !is_present(summary_attention, inputs.tokens) || !is_present(received_attention, inputs.tokens) ||
      !is_present(importance, inputs.tokens) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(score_and_select(summary_attention, received_attention, inputs, temperature, importance,
                                  selection, threads));
}

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, int threads) {
  if (!is_valid(selection) || !is_input(x, dtype, x_stride, channels, selection) ||
      !is_matrix(out, dtype, selection.capacity, channels) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge(x, dtype, x_stride, channels, selection, out, threads));
}

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, int threads) {
  if (!is_valid(selection) || !is_input(x, dtype, x_stride, channels, selection) ||
      !is_matrix(grad, dtype, selection.capacity, channels, grad_stride) ||
      !is_matrix(grad_x, dtype, selection.tokens, channels) || !is_present(grad_weight, selection.tokens) ||
      threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge_backward(grad, grad_stride, x, dtype, x_stride, channels, selection, grad_x,
                                       grad_weight, threads));
}

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, int threads) {
  if (!is_valid(selection) || !is_input(x, dtype, x_stride, channels, selection) ||
      !is_matrix(x_out, dtype, selection.capacity, channels) ||
      !is_matrix(normed, dtype, selection.capacity, channels) ||
      !is_affine(weight, channels, affine_dtype, dtype) || !is_affine(bias, channels, affine_dtype, dtype) ||
      !is_eps(eps) || !is_present(mean, selection.capacity) || !is_present(rstd, selection.capacity) ||
      threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge_layernorm(x, dtype, x_stride, channels, selection, weight, bias, affine_dtype,
                                        eps, x_out, normed, mean, rstd, threads));
}

Status gather_merge_rmsnorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                            const TokenSelection& selection, const void* weight, DType affine_dtype,
                            double eps, void* x_out, void* normed, int threads) {
  if (!is_valid(selection) || !is_input(x, dtype, x_stride, channels, selection) ||
      !is_matrix(x_out, dtype, selection.capacity, channels) ||
      !is_matrix(normed, dtype, selection.capacity, channels) ||
      !is_affine(weight, channels, affine_dtype, dtype) || !is_eps(eps) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge_rmsnorm(x, dtype, x_stride, channels, selection, weight, affine_dtype, eps,
                                      x_out, normed, threads));
}

}  // namespace madtp::cpu
