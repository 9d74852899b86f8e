// SPDX-License-Identifier: Apache-2.0
// From the canonical form of a 2:4 weight to its layout: a warp makes a block of 16 rows and 64 columns, or
// 128 of 8-bit elements. Either way a row of it has 64 bytes of kept values.
//
// Bound by memory, once per weight: 1.125 bytes a dense element of 16 bits read, and as many written. A lane
// reads 8 bytes of a row four times, the words change lanes in shared memory, and a lane writes its two
// fragments.

#include "cuda/launch.cuh"
#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"

namespace madtp::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlockWords = 16;               // of the kept values of a row
constexpr int kWordStride = kBlockWords + 4;  // rows of 20 words: 8-byte stores, and reads in 32 banks
constexpr int kRowVectors = kBlockWords / 2;  // of 8 bytes

template <int kBytes>
__global__ void __launch_bounds__(kWarps* kWarp)
    sparse24_pack_kernel(const __grid_constant__ Sparse24Weight weight, WeightLayout<kBytes> layout,
                         WeightBlock<kBytes>* to) {
  alignas(16) __shared__ std::uint32_t tiles[kWarps][kSlabRows][kWordStride];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t index = std::int64_t(blockIdx.x) * kWarps + warp;
  if (index >= layout.slabs * layout.blocks) return;
  const std::int64_t first_row = index / layout.blocks * kSlabRows, block = index % layout.blocks;

  const std::int64_t row_vectors = weight.in_features / 16 * kBytes;
  const auto* const values = static_cast<const uint2*>(weight.values);
  auto& tile = tiles[warp];
#pragma unroll
  for (int i = lane; i < kSlabRows * kRowVectors; i += kWarp) {
    const int row = i / kRowVectors, vector = i % kRowVectors;
    const std::int64_t from = block * kRowVectors + vector;
    uint2 words = make_uint2(0, 0);
    if (first_row + row < weight.out_features && from < row_vectors)
      words = values[(first_row + row) * row_vectors + from];
    *reinterpret_cast<uint2*>(&tile[row][2 * vector]) = words;
  }
  __syncwarp();

  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int word = half * (kBlockWords / 2) + t;
    to[index].values[half][lane] =
        make_uint4(tile[g][word], tile[g + 8][word], tile[g][word + 4], tile[g + 8][word + 4]);
  }

  // Two bytes of indices are 16 columns; a word of metadata has them of both rows, or of one row twice.
  const auto* const indices = reinterpret_cast<const std::uint16_t*>(weight.indices);
  const std::int64_t row_indices = weight.in_features / 16;
#pragma unroll
  for (int i = 0; i < WeightBlock<kBytes>::kMetadata; ++i) {
    std::uint32_t metadata = 0;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const std::int64_t row = first_row + g + 8 * (kBytes == 2 ? high : t % 2);
      const std::int64_t columns =
          kBytes == 2 ? block * 4 + t : block * 8 + i * 4 + t / 2 * 2 + high;  // of 16
      const bool is_real = row < weight.out_features && columns < row_indices;
      const std::uint32_t bits = is_real ? indices[row * row_indices + columns] : kPaddingMetadata & 0xffff;
      metadata |= bits << (16 * high);
    }
    to[index].metadata[i][lane] = metadata;
  }
}

template <int kBytes>
Status pack(const Sparse24Weight& weight, void* layout, void* stream) {
  const WeightLayout<kBytes> shape(weight.out_features, weight.in_features);
  const std::int64_t blocks = (shape.slabs * shape.blocks + kWarps - 1) / kWarps;
  return launch(sparse24_pack_kernel<kBytes>, blocks, kWarps * kWarp, stream, weight, shape,
                static_cast<WeightBlock<kBytes>*>(layout));
}

}  // namespace

Status pack_weight(const Sparse24Weight& weight, int bytes, void* layout, void* stream) {
  return bytes == 1 ? pack<1>(weight, layout, stream) : pack<2>(weight, layout, stream);
}

}  // namespace madtp::cuda
