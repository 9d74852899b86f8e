// SPDX-License-Identifier: Apache-2.0
#pragma once

// The layout of a 2:4 weight on the device: the fragments of mma.sp and wgmma.sp in the order in which lanes
// hold them, so that a lane has its part of 16 rows and 32 columns in one load, of any architecture.
//
// A block is 16 rows (output features) times 64 columns (input features), or 128 of an 8-bit type: for each
// of its two halves of the columns the A fragment, 16 bytes a lane, and the metadata of both halves. With g =
// lane / 4, t = lane % 4 and w elements in a word, the four words of a fragment are the kept values w t on of
// rows g and g + 8, then 4 w + w t on of both. The metadata of lane 4 g + c is, of a 16-bit type, one word
// for both halves: the canonical indices of columns 16 c to 16 c + 15 of row g, and in the high half of row
// g + 8; of an 8-bit type a word for each half, of row g + 8 (c % 2) and columns 32 (c / 2) on of that half.
// Output features are padded with zeros to a multiple of 64, input features to whole blocks.

#include <cstdint>

#include "cuda/tokens/rows.cuh"

namespace madtp::cuda {

constexpr int kSlabRows = 16;
template <int kBytes>  // of an element
constexpr int kBlockColumns = 128 / kBytes;
constexpr int kTileFeatures = 64;  // output features are padded to a multiple: the rows of a wgmma

// One block of the layout, of elements of kBytes.
template <int kBytes>
struct alignas(16) WeightBlock {
  static constexpr int kMetadata = kBytes == 2 ? 1 : 2;
  uint4 values[2][kWarp];
  std::uint32_t metadata[kMetadata][kWarp];
};
static_assert(sizeof(WeightBlock<2>) == 1152 && sizeof(WeightBlock<1>) == 1280);

// A nibble of the metadata must be valid where nothing is stored: columns 0 and 1.
constexpr std::uint32_t kPaddingMetadata = 0x44444444;

template <int kBytes>
struct WeightLayout {
  using Block = WeightBlock<kBytes>;
  std::int64_t slabs, blocks;  // slabs in all, and blocks of each

  __host__ __device__ WeightLayout(std::int64_t out_features, std::int64_t in_features)
      : slabs((out_features + kTileFeatures - 1) / kTileFeatures * (kTileFeatures / kSlabRows)),
        blocks((in_features + kBlockColumns<kBytes> - 1) / kBlockColumns<kBytes>) {}

  __host__ __device__ std::int64_t bytes() const { return slabs * blocks * std::int64_t(sizeof(Block)); }
  // The blocks of a slab, from its first columns on.
  __host__ __device__ static const Block* slab(const void* layout, std::int64_t blocks, std::int64_t slab) {
    return static_cast<const Block*>(layout) + slab * blocks;
  }
};

}  // namespace madtp::cuda
