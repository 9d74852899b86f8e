// SPDX-License-Identifier: Apache-2.0
// The int8 kernels of one instruction set: included once per set, with MADTP_ISA naming it, so there is no
// include guard. The contracts are those of madtp/quantized.h; arguments have been checked.

#include "madtp/quantized.h"

namespace madtp::cpu::MADTP_ISA {

Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse,
                              bool many_rows, std::int64_t* bytes);

Status quantized_pack(const QuantizedWeight& weight, void* layout, int threads);

Status quantized_linear(const QuantizedLinear& inputs, void* out, std::int64_t out_stride, int threads);

}  // namespace madtp::cpu::MADTP_ISA
