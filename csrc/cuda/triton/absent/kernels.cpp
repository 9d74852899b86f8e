// SPDX-License-Identifier: Apache-2.0
// Of a library that is built without Triton: no kernels.

#include "cuda/triton/kernels.h"

namespace madtp::cuda::triton {

const Family attention_kernels{}, attention_rows_kernels{}, tokens_kernels{};

}  // namespace madtp::cuda::triton
