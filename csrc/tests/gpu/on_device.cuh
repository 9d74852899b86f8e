// SPDX-License-Identifier: Apache-2.0
#pragma once

// How single instructions run on a device, simulated or not.

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace madtp::test {
namespace {

// launch(operands, result) on copies in the memory of the device: copies by TMA from managed memory may
// fault.
template <typename Operands, typename Result, typename Launch>
Status on_device(const Operands& operands, Result* result, Launch&& launch) {
  struct Both {
    Operands operands;
    Result result;
  }* both = nullptr;
  Status status = cuda::to_status(cudaMalloc(reinterpret_cast<void**>(&both), sizeof(Both)));
  if (status != Status::ok) return status;
  *result = {};
  const auto copy = [&](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (status == Status::ok) status = cuda::to_status(cudaMemcpy(to, from, bytes, kind));
  };
  copy(&both->operands, &operands, sizeof(Operands), cudaMemcpyHostToDevice);
  copy(&both->result, result, sizeof(Result), cudaMemcpyHostToDevice);
  if (status == Status::ok) status = launch(&both->operands, &both->result);
  const Status finished = cuda::to_status(cudaDeviceSynchronize());
  if (status == Status::ok) status = finished;
  copy(result, &both->result, sizeof(Result), cudaMemcpyDeviceToHost);
  cudaFree(both);
  return status;
}

// Status::unsupported on a device that does not run the library's code of this specific_code; 0 runs on all.
Status needs(int specific_code) {
  cuda::Device device;
  const Status status = cuda::current_device(&device);
  const bool is_other = specific_code != 0 && device.specific_code != specific_code;
  return status == Status::ok && is_other ? Status::unsupported : status;
}

}  // namespace
}  // namespace madtp::test
