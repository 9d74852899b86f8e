// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse24/linear_sm80.cuh"

namespace madtp::cuda {

const LinearArchitecture kInt8LinearSm80 = kArchitectureSm80<ByteTypes<std::int8_t>>;
const LinearArchitecture kE4M3LinearSm80 = kArchitectureSm80<ByteTypes<E4M3>>;

}  // namespace madtp::cuda
