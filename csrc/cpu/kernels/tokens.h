// The token kernels of one instruction set: included once per set, with MADTP_ISA naming it, so there is no
// include guard. The contracts are those of madtp/tokens.h; arguments have been checked.

#include "madtp/tokens.h"

namespace madtp::cpu::MADTP_ISA {

Status token_importance(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t batch, const std::int32_t* summary_index,
                        float* importance, int threads);

Status select_tokens(const float* importance, const void* mag_logits, DType logits_dtype,
                     std::int64_t logits_stride, std::int64_t alignment_tokens,
                     const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                     const std::int32_t* summary_index, double temperature, std::uint8_t* keep,
                     std::int32_t* cu_seqlens_out, std::int32_t* source, float* merge_weight, int threads);

Status score_and_select(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                        const std::int32_t* summary_index, double temperature, float* importance,
                        std::uint8_t* keep, std::int32_t* cu_seqlens_out, std::int32_t* source,
                        float* merge_weight, int threads);

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, int threads);

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, int threads);

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, int threads);

}  // namespace madtp::cpu::MADTP_ISA
