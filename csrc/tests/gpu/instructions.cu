// SPDX-License-Identifier: Apache-2.0
// By nvcc, into a library that shows nothing else: the simulated machine has the same names.

#include "tests/gpu/instructions.cuh"

namespace madtp::test {

Instructions gpu_instructions() { return kInstructions; }

bool has_gpu() {
  cuda::Device device;
  return cuda::current_device(&device) == Status::ok;
}

}  // namespace madtp::test
