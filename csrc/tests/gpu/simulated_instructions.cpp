// SPDX-License-Identifier: Apache-2.0
#include "tests/gpu/instructions.cuh"

namespace madtp::test {

Instructions simulated_instructions() { return kInstructions; }

}  // namespace madtp::test
