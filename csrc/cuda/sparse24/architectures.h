// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels of sparse24_linear, one for each architecture of GPUs. A new one is a file that defines its
// LinearArchitecture, and a row of the table below.

#include <cstdint>
#include <functional>

#include "cuda/device.h"
#include "madtp/sparse24.h"

namespace madtp::cuda {

using UseConfig = std::function<void(const Sparse24Config&)>;

// One kernel of sparse24_linear. Arguments have been checked; there are tokens and output features.
struct LinearArchitecture {
  int architecture;  // Sparse24Config::architecture of its configurations

  // use(config) for every configuration that can run the inputs on the device.
  void (*configs)(const Sparse24Linear& inputs, const Device& device, const UseConfig& use);

  // Of these, the one that runs where none is asked for; of architecture 0 where there is none.
  Sparse24Config (*default_config)(const Sparse24Linear& inputs, const Device& device);

  Status (*run)(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                const Sparse24Config& config, const Device& device, void* stream);
};

extern const LinearArchitecture kLinearSm80;  // linear_sm80.cu
extern const LinearArchitecture kLinearSm90;  // linear_sm90.cu

// The first that has a default for a call runs it: the newest comes first.
inline constexpr const LinearArchitecture* kLinearArchitectures[] = {
    &kLinearSm90,
    &kLinearSm80,
};

}  // namespace madtp::cuda
