// SPDX-License-Identifier: Apache-2.0
// The layout of a 2:4 weight in floating point.

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/sparse24.h"

namespace madtp::cpu::MADTP_ISA {

Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes) {
  *bytes = Layout(out_features, in_features, step_of(weight_dtype)).bytes();
  return Status::ok;
}

Status sparse24_pack(const Sparse24Weight& weight, void* data, int threads) {
  const Layout layout(weight.out_features, weight.in_features, step_of(weight.dtype));
  if (layout.step.entries == 6) return pack_layout<std::uint32_t, 6>(weight, layout, data, threads);
  Status status = Status::ok;
  with_type(weight.dtype,
            [&](auto element) { status = pack_layout<decltype(element), 4>(weight, layout, data, threads); });
  return status;
}

}  // namespace madtp::cpu::MADTP_ISA
