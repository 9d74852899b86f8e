// SPDX-License-Identifier: Apache-2.0
// The token kernels of one instruction set: included once per set, with MADTP_ISA naming it, so there is no
// include guard. The contracts are those of madtp/tokens.h; arguments have been checked.

#include "madtp/tokens.h"

namespace madtp::cpu::MADTP_ISA {

Status token_importance(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, float* importance, int threads);

Status select_tokens(const float* importance, const ScoreInputs& inputs, double temperature,
                     const SelectionOutputs& selection, int threads);

Status score_and_select(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, double temperature, float* importance,
                        const SelectionOutputs& selection, int threads);

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, int threads);

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, int threads);

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, int threads);

Status gather_merge_rmsnorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                            const TokenSelection& selection, const void* weight, DType affine_dtype,
                            double eps, void* x_out, void* normed, int threads);

}  // namespace madtp::cpu::MADTP_ISA
