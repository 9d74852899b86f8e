// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse24/linear_sm80.cuh"

namespace madtp::cuda {

const LinearArchitecture kLinearSm80 = kArchitectureSm80<HalfTypes>;

}  // namespace madtp::cuda
