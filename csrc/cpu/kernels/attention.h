// SPDX-License-Identifier: Apache-2.0
// The attention kernel of one instruction set: included once per set, with MADTP_ISA naming it, so there is
// no include guard. The contract is that of madtp/attention.h; arguments have been checked.

#include "madtp/attention.h"

namespace madtp::cpu::MADTP_ISA {

Status varlen_attention(const AttentionInputs& inputs, void* out, float* lse, float* summary_attention,
                        float* received_attention, void* workspace, int threads);
Status varlen_attention_workspace(const AttentionInputs& inputs, bool statistics, int threads,
                                  std::int64_t* bytes);

}  // namespace madtp::cpu::MADTP_ISA
