// By nvcc, into a library that shows nothing else: the simulated machine has the same names.

#include "tests/gpu/instructions.cuh"

namespace madtp::test {

Instructions gpu_instructions() { return kInstructions; }

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

}  // namespace madtp::test
