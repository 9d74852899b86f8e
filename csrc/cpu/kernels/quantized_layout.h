// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels/layout.h"

// Whether there are dot products of bytes, and what picks their bytes: these have a layout of their own.
#if (defined(__AVX512VNNI__) && defined(__AVX512VBMI__)) || defined(__AVXVNNI__) || \
    defined(__ARM_FEATURE_DOTPROD)
#define MADTP_HAS_BYTE_DOTS 1
#else
#define MADTP_HAS_BYTE_DOTS 0
#endif

namespace madtp::cpu::MADTP_ISA {

// The layout of an int8 weight. A dense one may have any number of columns: its last group is filled up with
// zeros.
inline Layout quantized_layout(std::int64_t out_features, std::int64_t in_features, bool sparse) {
  return {out_features, (in_features + 3) / 4 * 4, sparse ? kInt8Pairs : kInt8DensePairs};
}

}  // namespace madtp::cpu::MADTP_ISA
