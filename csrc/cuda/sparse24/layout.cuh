// SPDX-License-Identifier: Apache-2.0
#pragma once

// The layout of a 2:4 weight on the device: the fragments of mma.sp and wgmma.sp in the order in which lanes
// hold them, so that a lane has its part of 16 rows and 32 columns in one load, of any architecture.
//
// A block is 16 rows (output features) times 64 columns (input features): for each of its two steps of 32
// columns the A fragment, 16 bytes a lane, then the metadata of both, 4 bytes a lane. With g = lane / 4 and t
// = lane % 4 the four words of a fragment are the kept values 2 t, 2 t + 1 of rows g and g + 8, then 2 t + 8,
// 2 t + 9 of both. The metadata of lane 4 g + c is the canonical indices of columns 16 c to 16 c + 15 of row
// g, and in the high half of row g + 8. Output and input features are padded with zeros to multiples of 64.

#include <cstdint>

#include "cuda/tokens/rows.cuh"

namespace madtp::cuda {

constexpr int kSlabRows = 16;
constexpr int kBlockColumns = 64;
constexpr int kTileFeatures = 64;  // output features are padded to a multiple: the rows of a wgmma

// One block of the layout.
struct alignas(16) WeightBlock {
  uint4 values[2][kWarp];  // of a 16-bit type
  std::uint32_t metadata[kWarp];
};
static_assert(sizeof(WeightBlock) == 1152);

// A nibble of the metadata must be valid where nothing is stored: columns 0 and 1.
constexpr std::uint32_t kPaddingMetadata = 0x44444444;

struct WeightLayout {
  std::int64_t slabs, blocks;  // slabs in all, and blocks of each

  __host__ __device__ WeightLayout(std::int64_t out_features, std::int64_t in_features)
      : slabs((out_features + kTileFeatures - 1) / kTileFeatures * (kTileFeatures / kSlabRows)),
        blocks((in_features + kBlockColumns - 1) / kBlockColumns) {}

  __host__ __device__ std::int64_t bytes() const {
    return slabs * blocks * std::int64_t(sizeof(WeightBlock));
  }
  // The blocks of a slab, from its first columns on.
  __host__ __device__ static const WeightBlock* slab(const void* layout, std::int64_t blocks,
                                                     std::int64_t slab) {
    return static_cast<const WeightBlock*>(layout) + slab * blocks;
  }
};

}  // namespace madtp::cuda
