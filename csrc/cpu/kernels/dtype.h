// SPDX-License-Identifier: Apache-2.0
#pragma once

// From the run-time DType to the element type of a kernel.

#include "cpu/kernels/vec.h"
#include "madtp/dtype.h"

namespace madtp::cpu::MADTP_ISA {

// with_type(dtype, body) calls body(T{}) with the element type of a checked dtype.
template <typename Body>
inline void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
  }
}

}  // namespace madtp::cpu::MADTP_ISA
