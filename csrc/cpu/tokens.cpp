// The public entry points: they check their arguments, then run the kernels of the chosen instruction set.

#include "madtp/tokens.h"

#include <cmath>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

bool valid(const TokenSelection& s) {
  return s.capacity >= 0 && are_offsets(s.cu_seqlens, s.batch, s.rows, true) &&
         are_offsets(s.cu_seqlens_out, s.batch, s.capacity, false) && is_present(s.keep, s.rows) &&
         is_present(s.merge_weight, s.rows) && is_present(s.source, s.capacity);
}

// What importance and selection both read.
bool valid_scores(const void* mag_logits, DType dtype, std::int64_t alignment_tokens,
                  const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch, int threads) {
  return are_offsets(cu_seqlens, batch, rows, true) && is_matrix(mag_logits, dtype, rows, alignment_tokens) &&
         alignment_tokens >= 1 && threads >= 1;
}

// What selection writes, and its temperature.
bool valid_choice(double temperature, std::int64_t rows, const std::uint8_t* keep,
                  const std::int32_t* cu_seqlens_out, const std::int32_t* source, const float* merge_weight) {
  return temperature >= 0 && std::isfinite(temperature) && is_present(keep, rows) &&
         cu_seqlens_out != nullptr && is_present(source, rows) && is_present(merge_weight, rows);
}

}  // namespace

Status token_importance(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                        const std::int32_t* summary_index, float* importance, int threads) {
  if (!valid_scores(mag_logits, logits_dtype, alignment_tokens, cu_seqlens, rows, batch, threads) ||
      !is_present(summary, rows) || !is_present(received, rows) || !is_present(importance, rows))
    return Status::invalid_argument;
  MADTP_DISPATCH(token_importance(summary, received, mag_logits, logits_dtype, logits_stride,
                                  alignment_tokens, cu_seqlens, batch, summary_index, importance, threads));
}

Status select_tokens(const float* importance, const void* mag_logits, DType logits_dtype,
                     std::int64_t logits_stride, std::int64_t alignment_tokens,
                     const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                     const std::int32_t* summary_index, double temperature, std::uint8_t* keep,
                     std::int32_t* cu_seqlens_out, std::int32_t* source, float* merge_weight, int threads) {
  if (!valid_scores(mag_logits, logits_dtype, alignment_tokens, cu_seqlens, rows, batch, threads) ||
      !valid_choice(temperature, rows, keep, cu_seqlens_out, source, merge_weight) ||
      !is_present(importance, rows))
    return Status::invalid_argument;
  MADTP_DISPATCH(select_tokens(importance, mag_logits, logits_dtype, logits_stride, alignment_tokens,
                               cu_seqlens, rows, batch, summary_index, temperature, keep, cu_seqlens_out,
                               source, merge_weight, threads));
}

Status score_and_select(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                        const std::int32_t* summary_index, double temperature, float* importance,
                        std::uint8_t* keep, std::int32_t* cu_seqlens_out, std::int32_t* source,
                        float* merge_weight, int threads) {
  if (!valid_scores(mag_logits, logits_dtype, alignment_tokens, cu_seqlens, rows, batch, threads) ||
      !valid_choice(temperature, rows, keep, cu_seqlens_out, source, merge_weight) ||
      !is_present(summary, rows) || !is_present(received, rows) || !is_present(importance, rows))
    return Status::invalid_argument;
  MADTP_DISPATCH(score_and_select(summary, received, mag_logits, logits_dtype, logits_stride,
                                  alignment_tokens, cu_seqlens, rows, batch, summary_index, temperature,
                                  importance, keep, cu_seqlens_out, source, merge_weight, threads));
}

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, int threads) {
  if (!valid(selection) || !is_matrix(x, dtype, selection.rows, channels) ||
      !is_matrix(out, dtype, selection.capacity, channels) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge(x, dtype, x_stride, channels, selection, out, threads));
}

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, int threads) {
  if (!valid(selection) || !is_matrix(x, dtype, selection.rows, channels) ||
      !is_matrix(grad, dtype, selection.capacity, channels) ||
      !is_matrix(grad_x, dtype, selection.rows, channels) || !is_present(grad_weight, selection.rows) ||
      threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge_backward(grad, grad_stride, x, dtype, x_stride, channels, selection, grad_x,
                                       grad_weight, threads));
}

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, int threads) {
  if (!valid(selection) || !is_matrix(x, dtype, selection.rows, channels) ||
      !is_matrix(x_out, dtype, selection.capacity, channels) ||
      !is_matrix(normed, dtype, selection.capacity, channels) || !is_present(weight, channels) ||
      !is_present(bias, channels) || (affine_dtype != dtype && affine_dtype != DType::float32) ||
      !(eps > 0 && std::isfinite(eps)) || !is_present(mean, selection.capacity) ||
      !is_present(rstd, selection.capacity) || threads < 1)
    return Status::invalid_argument;
  MADTP_DISPATCH(gather_merge_layernorm(x, dtype, x_stride, channels, selection, weight, bias, affine_dtype,
                                        eps, x_out, normed, mean, rstd, threads));
}

}  // namespace madtp::cpu
