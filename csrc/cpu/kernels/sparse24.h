// SPDX-License-Identifier: Apache-2.0
// The 2:4 kernels of one instruction set: included once per set, with MADTP_ISA naming it, so there is no
// include guard. The contracts are those of madtp/sparse24.h; arguments have been checked.

#include "madtp/sparse24.h"

namespace madtp::cpu::MADTP_ISA {

Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes);

Status sparse24_pack(const Sparse24Weight& weight, void* layout, int threads);

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, int threads);

Status sparse24_linear(const Sparse24Linear& inputs, void* out, std::int64_t out_stride, int threads);

}  // namespace madtp::cpu::MADTP_ISA
