// SPDX-License-Identifier: Apache-2.0
#include "cuda/sparse24/linear_sm90.cuh"

namespace madtp::cuda {

const LinearArchitecture kInt8LinearSm90 = kArchitectureSm90<ByteTypes<std::int8_t>>;

}  // namespace madtp::cuda
