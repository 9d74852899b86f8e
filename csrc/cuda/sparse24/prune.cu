// SPDX-License-Identifier: Apache-2.0
// From a dense weight to 2:4 in one read: a lane has 16 columns of a row, and every group of 4 in registers.
//
// Bound by memory: at 3072 x 768 in bfloat16 4.7 MB read (9.4 more with a score) and 2.7 written, 4 us at the
// 2 TB/s of an A100. A warp has a row. A weight that lies transposed goes through shared memory in tiles of
// 64 x 64, so that reads are rows of it and writes rows of the result.

#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/sparse24/kernels.h"
#include "cuda/tokens/rows.cuh"

namespace madtp::cuda {
namespace {

constexpr int kUnit = 16;  // columns that a lane prunes at a time
constexpr int kWarps = 4, kThreads = kWarps * kWarp;

template <typename T>
struct Pruned {
  T* values;              // (out_features, in_features / 2)
  std::uint8_t* indices;  // (out_features, in_features / 8)
  std::int32_t* has_nan;  // (1,)
  std::int64_t in_features;
};

// Which two of four keys fewer than two others beat, earlier ones by being equal: a bit each.
__device__ inline unsigned two_largest(const float (&key)[4]) {
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int beaten = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) beaten += j < i ? !(key[i] > key[j]) : j > i ? key[j] > key[i] : 0;
    kept |= unsigned(beaten < 2) << i;
  }
  return kept;
}

// What is kept of a group, and its nibble. score may be null.
__device__ inline unsigned prune_group(float (&w)[4], const float* score, float& first, float& second) {
  if (score != nullptr) {  // what it does not keep is zero; where the zeros stand is the magnitudes' choice
    const unsigned chosen = two_largest({score[0], score[1], score[2], score[3]});
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = chosen >> i & 1 ? w[i] : 0;
  }
  const unsigned kept = two_largest({fabsf(w[0]), fabsf(w[1]), fabsf(w[2]), fabsf(w[3])});
  const bool is0 = kept & 1, is1 = kept & 2, is2 = kept & 4, is3 = kept & 8;
  first = (is0 ? w[0] : is1 ? w[1] : w[2]) + 0.0f;  // -0 becomes 0
  second = (is3 ? w[3] : is2 ? w[2] : w[1]) + 0.0f;
  const unsigned column0 = is0 ? 0 : is1 ? 1 : 2, column1 = is3 ? 3 : is2 ? 2 : 1;
  return column0 | column1 << 2;
}

// Prunes and writes the unit of `row` that starts at `channel`. Returns whether there is a NaN in it.
template <typename T>
__device__ bool prune_unit(const Pruned<T>& to, std::int64_t row, std::int64_t channel,
                           float (&weight)[kUnit], const float (*score)[kUnit]) {
  constexpr int kSize = Vector<T>::kSize;
  bool nan = false;
  float kept[kUnit / 2];
  unsigned nibbles = 0;
#pragma unroll
  for (int i = 0; i < kUnit; i += 4) {
    float group[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      group[k] = weight[i + k];
      nan |= isnan(group[k]) || (score != nullptr && isnan((*score)[i + k]));
    }
    nibbles |= prune_group(group, score == nullptr ? nullptr : *score + i, kept[i / 2], kept[i / 2 + 1]) << i;
  }
  T* const values = to.values + row * (to.in_features / 2) + channel / 2;
#pragma unroll
  for (int i = 0; i < kUnit / 2; i += kSize) {
    float part[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) part[k] = kept[i + k];
    store<true>(values, i, kUnit / 2, pack<T>(part));
  }
  std::uint8_t* const indices = to.indices + row * (to.in_features / 8) + channel / 8;
  *reinterpret_cast<std::uint16_t*>(indices) = std::uint16_t(nibbles);
  return nan;
}

// 16 columns in vectors of 16 bytes.
template <typename T>
__device__ void load_unit(const T* from, float (&values)[kUnit]) {
  constexpr int kSize = Vector<T>::kSize;
#pragma unroll
  for (int i = 0; i < kUnit; i += kSize) {
    float part[kSize];
    unpack(load<true>(from, i, kUnit), part);
#pragma unroll
    for (int k = 0; k < kSize; ++k) values[i + k] = part[k];
  }
}

template <typename T, bool kScored>
__global__ void __launch_bounds__(kThreads)
    sparse24_prune_kernel(Rows<const T> weight, Rows<const float> score, std::int64_t out_features,
                          const Pruned<T> to) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= out_features) return;
  bool nan = false;
#pragma unroll 1
  for (std::int64_t channel = lane * kUnit; channel < to.in_features; channel += kWarp * kUnit) {
    float values[kUnit], scores[kUnit];
    load_unit(weight[row] + channel, values);
    if constexpr (kScored) load_unit(score[row] + channel, scores);
    nan |= prune_unit(to, row, channel, values, kScored ? &scores : nullptr);
  }
  if (nan) *to.has_nan = 1;
}

constexpr int kTile = 64;  // features along both sides
constexpr int kTileUnits = kTile * kTile / kUnit;

// A tile of (in_features, out_features), rows of it 16 bytes further apart.
template <typename T>
using TransposedTile = T[kTile][kTile + Vector<T>::kSize];

// Zeros past the features of either side.
template <typename T>
__device__ void load_tile(Rows<const T> from, std::int64_t first_channel, std::int64_t first_feature,
                          std::int64_t in_features, std::int64_t out_features, TransposedTile<T>& tile) {
  constexpr int kSize = Vector<T>::kSize, kRowVectors = kTile / kSize;
  for (int i = threadIdx.x; i < kTile * kRowVectors; i += kThreads) {
    const int row = i / kRowVectors, column = i % kRowVectors * kSize;
    Vector<T> vector{};
    if (first_channel + row < in_features)
      vector = load<true>(from[first_channel + row], first_feature + column, out_features);
    store<true>(tile[row], column, kTile, vector);
  }
}

template <typename T, bool kScored>
__global__ void __launch_bounds__(kThreads)
    sparse24_prune_transposed_kernel(Rows<const T> weight,     // (in_features, out_features)
                                     Rows<const float> score,  // (in_features, out_features)
                                     std::int64_t out_features, const Pruned<T> to,
                                     std::int64_t channel_tiles) {
  alignas(16) __shared__ TransposedTile<T> values;
  alignas(16) __shared__ TransposedTile<std::conditional_t<kScored, float, T>> scores;
  const std::int64_t first_feature = std::int64_t(blockIdx.x) / channel_tiles * kTile;
  const std::int64_t first_channel = std::int64_t(blockIdx.x) % channel_tiles * kTile;
  load_tile(weight, first_channel, first_feature, to.in_features, out_features, values);
  if constexpr (kScored) load_tile(score, first_channel, first_feature, to.in_features, out_features, scores);
  __syncthreads();
  bool nan = false;
  for (int i = threadIdx.x; i < kTileUnits; i += kThreads) {
    const int feature = i % kTile, channel = i / kTile * kUnit;
    if (first_feature + feature >= out_features || first_channel + channel >= to.in_features) continue;
    float unit[kUnit], unit_score[kUnit];
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      unit[k] = to_float(values[channel + k][feature]);
      if constexpr (kScored) unit_score[k] = scores[channel + k][feature];
    }
    nan |= prune_unit(to, first_feature + feature, first_channel + channel, unit,
                      kScored ? &unit_score : nullptr);
  }
  if (nan) *to.has_nan = 1;
}

std::int64_t blocks_of(const Sparse24Dense& dense) {
  if (!dense.transposed) return quotient_up(dense.out_features, kWarps);
  return quotient_up(dense.out_features, kTile) * quotient_up(dense.in_features, kTile);
}

template <typename T, bool kScored>
Status run(const Sparse24Dense& dense, const Pruned<T>& to, void* stream) {
  const Rows<const T> weight{static_cast<const T*>(dense.weight), dense.weight_stride};
  const Rows<const float> score{dense.score, dense.score_stride};
  if (!dense.transposed)
    return launch(sparse24_prune_kernel<T, kScored>, blocks_of(dense), kThreads, stream, weight, score,
                  dense.out_features, to);
  return launch(sparse24_prune_transposed_kernel<T, kScored>, blocks_of(dense), kThreads, stream, weight,
                score, dense.out_features, to, quotient_up(dense.in_features, kTile));
}

}  // namespace

Status prune_weight(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                    void* stream) {
  if (!is_count(blocks_of(dense))) return Status::invalid_argument;  // before anything is written
  const Status cleared =
      to_status(cudaMemsetAsync(has_nan, 0, sizeof *has_nan, static_cast<cudaStream_t>(stream)));
  if (cleared != Status::ok || dense.out_features == 0 || dense.in_features == 0) return cleared;
  return with_type(dense.dtype, [&](auto element) {
    using T = decltype(element);
    const Pruned<T> to{static_cast<T*>(values), indices, has_nan, dense.in_features};
    return dense.score == nullptr ? run<T, false>(dense, to, stream) : run<T, true>(dense, to, stream);
  });
}

}  // namespace madtp::cuda
