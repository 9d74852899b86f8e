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

// A launch as the runtime wants it. Not to be copied: it points into itself.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  LaunchConfig(const LaunchShape& shape, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    if (shape.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <typename... Parameters>
Status allow_shared_bytes(void (*kernel)(Parameters...), int bytes) {
  constexpr int kUnasked = 48 * 1024;
  if (bytes <= kUnasked) return Status::ok;
  return to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Status::invalid_argument for more blocks than a grid can count.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
              const Arguments&... arguments) {
  if (!is_count(shape.blocks)) return Status::invalid_argument;
  const Status status = allow_shared_bytes(kernel, shape.shared_bytes);
  if (status != Status::ok) return status;
  const LaunchConfig launch(shape, stream);
  return to_status(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

// How many clusters of a launch the current device runs at once: fewer than its multiprocessors have room
// for, where groups of these are no multiple of a cluster. 0 where it does not say.
template <typename... Parameters>
int resident_clusters(void (*kernel)(Parameters...), const LaunchShape& shape) {
  int clusters = 0;
  const LaunchConfig launch(shape, nullptr);
  if (allow_shared_bytes(kernel, shape.shared_bytes) != Status::ok ||
      to_status(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config)) != Status::ok)
    return 0;
  return clusters;
}

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
              const Arguments&... arguments) {
  return launch(kernel, LaunchShape{blocks, threads}, stream, arguments...);
}

}  // namespace madtp::cuda
