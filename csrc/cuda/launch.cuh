// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every kernel starts here.

#include <cuda_runtime.h>

#include <cstdint>

#include "madtp/status.h"
#include "sizes.h"

namespace madtp::cuda {

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes = 0;  // of MADTP_DYNAMIC_SHARED
  int cluster = 1;       // blocks
};

// Status::unsupported where the library has no code for the device, Status::invalid_argument for a stream of
// another device.
inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok;
  cudaGetLastError();  // the status says it; left behind, it would be blamed on the next call
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return Status::unsupported;
  return error == cudaErrorInvalidResourceHandle ? Status::invalid_argument : Status::cuda_error;
}

// Status::invalid_argument for more blocks than a grid can count.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
              const Arguments&... arguments) {
  if (!is_count(shape.blocks)) return Status::invalid_argument;
  constexpr int kUnasked = 48 * 1024;
  if (shape.shared_bytes > kUnasked) {
    const Status status = to_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes));
    if (status != Status::ok) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  if (shape.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return to_status(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
              const Arguments&... arguments) {
  return launch(kernel, LaunchShape{blocks, threads}, stream, arguments...);
}

}  // namespace madtp::cuda
