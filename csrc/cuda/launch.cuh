#pragma once

// Every kernel starts here.

#include <cuda_runtime.h>

#include <cstdint>

#include "madtp/status.h"

namespace madtp::cuda {

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
              const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  if (cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess) return Status::ok;
  cudaGetLastError();  // the status says it; left behind, it would be blamed on the next call
  return Status::cuda_error;
}

}  // namespace madtp::cuda
