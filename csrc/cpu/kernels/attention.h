// The attention kernels of one instruction set: included once per set, with MADTP_ISA naming it, so there is
// no include guard. The contract is that of madtp/attention.h; arguments have been checked.

#include "madtp/attention.h"

namespace madtp::cpu::MADTP_ISA {

Status varlen_attention(const AttentionInputs& inputs, void* out, float* lse, float* summary, float* received,
                        int threads);

Status varlen_attention_backward(const AttentionInputs& inputs, const AttentionGradients& gradients,
                                 int threads);

}  // namespace madtp::cpu::MADTP_ISA
