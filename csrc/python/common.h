// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "madtp/status.h"

namespace py = pybind11;

namespace madtp::python {

// An address as Python passes it: tensor.data_ptr(), or 0 for null.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// How a kernel runs: on so many threads of the CPU, or on a stream of the GPU.
inline int how(int threads) { return threads; }
inline void* how(std::uintptr_t stream) { return pointer<void>(stream); }

// Turns a status into an exception: RuntimeError("madtp::cpu::select_tokens: invalid argument"), or
// ValueError when the cause is a MADTP_CPU_ISA that this build or this CPU lacks. Safe with the GIL released.
void check(Status status, const char* function);

}  // namespace madtp::python
