// SPDX-License-Identifier: Apache-2.0
// From the canonical form of a 2:4 weight to its layout: a warp makes a block of 16 rows and 64 columns.
//
// Bound by memory, once per weight: 1.125 bytes a dense element read, and as many written. A lane reads 16
// bytes of a row twice, the words change lanes in shared memory, and a lane writes its two fragments.

#include "cuda/launch.cuh"
#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"

namespace madtp::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlockWords = kBlockColumns / 4;  // of the kept values of a row
constexpr int kWordStride = kBlockWords + 4;    // rows of 20 words: 16-byte stores, and reads in 32 banks
constexpr int kRowVectors = kBlockWords / 4;

__global__ void __launch_bounds__(kWarps* kWarp)
    sparse24_pack_kernel(const __grid_constant__ Sparse24Weight weight, WeightLayout layout,
                         WeightBlock* to) {
  alignas(16) __shared__ std::uint32_t tiles[kWarps][kSlabRows][kWordStride];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t index = std::int64_t(blockIdx.x) * kWarps + warp;
  if (index >= layout.slabs * layout.blocks) return;
  const std::int64_t first_row = index / layout.blocks * kSlabRows, block = index % layout.blocks;

  const std::int64_t row_vectors = weight.in_features / 16;  // 8 kept values, of 16 columns, each
  const auto* const values = static_cast<const uint4*>(weight.values);
  auto& tile = tiles[warp];
#pragma unroll
  for (int i = lane; i < kSlabRows * kRowVectors; i += kWarp) {
    const int row = i / kRowVectors, vector = i % kRowVectors;
    const std::int64_t from = block * kRowVectors + vector;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (first_row + row < weight.out_features && from < row_vectors)
      words = values[(first_row + row) * row_vectors + from];
    *reinterpret_cast<uint4*>(&tile[row][4 * vector]) = words;
  }
  __syncwarp();

  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int word = half * (kBlockWords / 2) + t;
    to[index].values[half][lane] =
        make_uint4(tile[g][word], tile[g + 8][word], tile[g][word + 4], tile[g + 8][word + 4]);
  }

  // Two bytes of indices are 16 columns.
  const auto* const indices = reinterpret_cast<const std::uint16_t*>(weight.indices);
  const std::int64_t columns = block * kRowVectors + t;
  std::uint32_t metadata = 0;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const std::int64_t row = first_row + g + 8 * high;
    const bool is_real = row < weight.out_features && columns < row_vectors;
    const std::uint32_t bits = is_real ? indices[row * row_vectors + columns] : kPaddingMetadata & 0xffff;
    metadata |= bits << (16 * high);
  }
  to[index].metadata[lane] = metadata;
}

}  // namespace

Status pack_weight(const Sparse24Weight& weight, void* layout, void* stream) {
  const WeightLayout shape(weight.out_features, weight.in_features);
  const std::int64_t blocks = (shape.slabs * shape.blocks + kWarps - 1) / kWarps;
  return launch(sparse24_pack_kernel, blocks, kWarps * kWarp, stream, weight, shape,
                static_cast<WeightBlock*>(layout));
}

}  // namespace madtp::cuda
