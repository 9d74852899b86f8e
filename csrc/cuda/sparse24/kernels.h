// SPDX-License-Identifier: Apache-2.0
#pragma once

// What runs behind the entry points of madtp/sparse24.h, which have checked the arguments; the linear layer
// is in architectures.h.

#include <cstdint>

#include "madtp/sparse24.h"

namespace madtp::cuda {

Status prune_weight(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                    void* stream);

// Of elements of so many bytes, 2 or 1, whatever its dtype says.
Status pack_weight(const Sparse24Weight& weight, int bytes, void* layout, void* stream);

}  // namespace madtp::cuda
