// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse24/linear_sm90.cuh"

namespace madtp::cuda {

const LinearArchitecture kLinearSm90 = kArchitectureSm90<HalfTypes>;

}  // namespace madtp::cuda
