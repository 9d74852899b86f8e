// SPDX-License-Identifier: Apache-2.0
#pragma once

// How single instructions run on a device, simulated or not.

#include <cuda_runtime.h>

#include <cstring>

#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace madtp::test {
namespace {

// launch(operands, result) on copies that the device can reach.
template <typename Operands, typename Result, typename Launch>
Status on_device(const Operands& operands, Result* result, Launch&& launch) {
  struct Both {
    Operands operands;
    Result result;
  }* both = nullptr;
  Status status = cuda::to_status(cudaMallocManaged(reinterpret_cast<void**>(&both), sizeof(Both)));
  if (status != Status::ok) return status;
  std::memset(static_cast<void*>(both), 0, sizeof(Both));
  both->operands = operands;
  status = launch(&both->operands, &both->result);
  const Status finished = cuda::to_status(cudaDeviceSynchronize());
  if (status == Status::ok) status = finished;
  if (status == Status::ok) *result = both->result;
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
