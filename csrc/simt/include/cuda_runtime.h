// SPDX-License-Identifier: Apache-2.0
#pragma once

// The part of the CUDA runtime that our kernels and their launches use, on the simulated machine.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "simt/builtins.h"
#include "simt/language.h"
#include "simt/machine.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
};
struct CUstream_st {
  int device;
};
using cudaStream_t = CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
// A machine that pretends to be something else is another device.
inline cudaError_t cudaGetDevice(int* device) {
  static std::vector<std::tuple<int, int, std::string>> seen;
  const madtp::simt::Options& o = madtp::simt::options;
  const std::tuple<int, int, std::string> now(o.capability, o.multiprocessors, o.archs);
  *device = int(std::find(seen.begin(), seen.end(), now) - seen.begin());
  if (std::size_t(*device) == seen.size()) seen.push_back(now);
  return o.device_error == cudaErrorNoDevice ? cudaErrorNoDevice : cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const madtp::simt::Options& o = madtp::simt::options;
  ++madtp::simt::questions;
  if (o.device_error != 0) return cudaError_t(o.device_error);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = o.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = o.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = o.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(madtp::simt::kMaxShared) + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(madtp::simt::kMaxShared);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaError_t(madtp::simt::options.error);
}
// Multiprocessors come in groups of 16, the last one smaller; a cluster lies in one group.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  const madtp::simt::Options& o = madtp::simt::options;
  if (o.error != 0) return cudaError_t(o.error);
  const int cluster = config->numAttrs == 0 ? 1 : int(config->attrs[0].val.clusterDim.x);
  *clusters = o.multiprocessors / 16 * (16 / cluster) + o.multiprocessors % 16 / cluster;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// Every thread gets parameters of its own, as it does on a device.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (madtp::simt::options.error != 0) return cudaError_t(madtp::simt::options.error);
  int device = 0;
  cudaGetDevice(&device);
  if (config->stream != nullptr && config->stream->device != device) return cudaErrorInvalidResourceHandle;
  const std::tuple<std::remove_cv_t<std::remove_reference_t<Parameters>>...> given(arguments...);
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = int(config->attrs[i].val.clusterDim.x);
  madtp::simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster,
                   [&] { std::apply(kernel, given); });
  return cudaSuccess;
}
