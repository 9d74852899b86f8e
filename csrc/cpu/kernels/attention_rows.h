// SPDX-License-Identifier: Apache-2.0
// The kernel of attention_rows of one instruction set: included once per set, with MADTP_ISA naming it, so
// there is no include guard. The contract is that of madtp/attention_rows.h; arguments have been checked.

#include "madtp/attention_rows.h"

namespace madtp::cpu::MADTP_ISA {

Status attention_rows(const AttentionRowsInputs& inputs, float* attention, void* workspace, int threads);
Status attention_rows_workspace(const AttentionRowsInputs& inputs, int threads, std::int64_t* bytes);

}  // namespace madtp::cpu::MADTP_ISA
