// SPDX-License-Identifier: Apache-2.0
// In a file of its own: each type takes a compiler minutes.

#include "cuda/sparse24/linear_sm90.cuh"

namespace madtp::cuda {

const LinearArchitecture kE4M3LinearSm90 = kArchitectureSm90<ByteTypes<E4M3>>;

}  // namespace madtp::cuda
