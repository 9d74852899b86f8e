// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels of sparse24_linear, one for each architecture of GPUs, and those of quantized_linear, which are
// the same templates. A new one is a file that defines its LinearArchitecture, and a row of the tables below.

#include <cstdint>
#include <functional>

#include "cuda/device.h"
#include "madtp/sparse24.h"

namespace madtp::cuda {

using UseConfig = std::function<void(const Sparse24Config&)>;

// A call. Of quantised operands x (tokens, in_features) and the weight have 8 bits, and dtype is that of the
// residual and the output.
struct LinearCall : Sparse24Linear {
  const float* x_scale = nullptr;       // (tokens,)
  const float* weight_scale = nullptr;  // (out_features,)
};

// One kernel. Arguments have been checked; there are tokens and output features.
struct LinearArchitecture {
  int architecture;  // Sparse24Config::architecture of its configurations

  // use(config) for every configuration that can run the inputs on the device.
  void (*configs)(const LinearCall& call, const Device& device, const UseConfig& use);

  // Of these, the one that runs where none is asked for; of architecture 0 where there is none.
  Sparse24Config (*default_config)(const LinearCall& call, const Device& device);

  Status (*run)(const LinearCall& call, void* out, std::int64_t out_stride, const Sparse24Config& config,
                const Device& device, void* stream);
};

extern const LinearArchitecture kLinearSm80, kInt8LinearSm80, kE4M3LinearSm80;  // linear_sm80.cu
extern const LinearArchitecture kLinearSm90, kInt8LinearSm90, kE4M3LinearSm90;  // linear_sm90.cu

// The first that has a default for a call runs it: the newest comes first.
using LinearArchitectures = const LinearArchitecture* const[2];
inline constexpr LinearArchitectures kLinearArchitectures = {&kLinearSm90, &kLinearSm80};
inline constexpr LinearArchitectures kInt8LinearArchitectures = {&kInt8LinearSm90, &kInt8LinearSm80};
inline constexpr LinearArchitectures kE4M3LinearArchitectures = {&kE4M3LinearSm90, &kE4M3LinearSm80};

}  // namespace madtp::cuda
