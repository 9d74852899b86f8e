// SPDX-License-Identifier: Apache-2.0
// gather_merge_layernorm: a block sums a merged row, a warp takes up rows, copies and normalises them.
//
// Bound by memory. At B = 32, N = 577, C = 768, bfloat16, half of the rows kept, it reads 28.4 MB and writes
// 28.5 MB: 17 us at the 3.35 TB/s of an H100. A row of up to 1024 channels stays in registers between its two
// passes of statistics, and a warp has two rows under way. The statistics of a merged row need all of it, so
// one block sums it: 0.44 MB at 48 KB in flight, an estimated 10 us, begun before the copies.

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/tokens/merge.cuh"
#include "madtp/tokens.h"

namespace madtp::cuda {
namespace {

constexpr int kThreads = kSlots * kWarp;
constexpr int kWarps = kThreads / kWarp;

// A row of A as the lanes of a warp see it, in blocks of kSize channels: kHeld blocks per lane, loaded at
// once and held in registers; or any number of them, read again at each use (kHeld 0).
template <typename A, int kSize, int kHeld, bool kAligned>
struct WarpRow {
  static constexpr int kVectorSize = Vector<A>::kSize, kVectors = kSize / kVectorSize;
  const A* row;
  std::int64_t channels;
  Vector<A> held[kHeld > 0 ? kHeld : 1][kVectors];

  WarpRow() = default;
  __device__ WarpRow(const A* row, std::int64_t channels, int lane) : row(row), channels(channels) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) held[i][v] = read((i * kWarp + lane) * kSize + v * kVectorSize);
  }

  __device__ Vector<A> read(std::int64_t c) const { return load<kAligned>(row, c, channels); }

  // Vector v of block i of this lane, which starts at channel c.
  __device__ Vector<A> vector(int i, std::int64_t c, int v = 0) const {
    if constexpr (kHeld > 0) return held[i][v];
    return read(c + v * kVectorSize);
  }

  __device__ void values(int i, std::int64_t c, float (&to)[kSize]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float part[kVectorSize];
      unpack(vector(i, c, v), part);
#pragma unroll
      for (int e = 0; e < kVectorSize; ++e) to[v * kVectorSize + e] = part[e];
    }
  }
};

// body(i, c) for each block of this lane: its number and its first channel.
template <int kSize, int kHeld, typename Body>
__device__ void for_each_block(std::int64_t channels, int lane, Body body) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if ((i * kWarp + lane) * kSize < channels) body(i, (i * kWarp + lane) * kSize);
  } else {
    for (std::int64_t c = lane * kSize; c < channels; c += kWarp * kSize) body(0, c);
  }
}

template <int kSize>
__device__ float sum(float (&values)[kSize]) {
#pragma unroll
  for (int n = kSize / 2; n > 0; n /= 2)
#pragma unroll
    for (int e = 0; e < n; ++e) values[e] += values[e + n];
  return values[0];
}

// Where the results go.
template <typename T>
struct Outputs {
  Rows<T> x_out, normed;  // (capacity, channels)
  float *mean, *rstd;     // (capacity,)
};

// Copies from[r] to output row rows[r] (unless it is there already) and writes its LayerNorm; nothing where
// from[r] is null. One warp, kRows rows in flight.
template <int kHeld, bool kAligned, int kRows, typename T, typename A>
__device__ void normalise(const T* const (&from)[kRows], const std::int64_t (&rows)[kRows],
                          std::int64_t channels, const A* weight, const A* bias, float eps,
                          const Outputs<T>& outputs, int lane) {
  bool any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) any |= from[r] != nullptr;
  if (!any) return;

  constexpr int kSize = Vector<T>::kSize;
  using Row = WarpRow<T, kSize, kHeld, kAligned>;
  using Parameters = WarpRow<A, kSize, kHeld, kAligned>;
  Row inputs[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) inputs[r] = Row(from[r], from[r] != nullptr ? channels : 0, lane);
  const Parameters weights(weight, channels, lane), biases(bias, channels, lane);

  const float per_channel = 1 / float(channels);
  float mean[kRows] = {}, rstd[kRows] = {};
  for_each_block<kSize, kHeld>(channels, lane, [&](int i, std::int64_t c) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float values[kSize];
      inputs[r].values(i, c, values);
      mean[r] += sum(values);
      T* const to = outputs.x_out[rows[r]];
      if (from[r] != to) store<kAligned>(to, c, inputs[r].channels, inputs[r].vector(i, c));
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    mean[r] = __fmul_rn(warp_sum(mean[r]), per_channel);  // never fused with what follows

  for_each_block<kSize, kHeld>(channels, lane, [&](int i, std::int64_t c) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float values[kSize];
      inputs[r].values(i, c, values);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float d = kAligned || c + e < channels ? values[e] - mean[r] : 0;
        rstd[r] = fmaf(d, d, rstd[r]);
      }
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) rstd[r] = rsqrtf(fmaf(warp_sum(rstd[r]), per_channel, eps));

  for_each_block<kSize, kHeld>(channels, lane, [&](int i, std::int64_t c) {
    float w[kSize], b[kSize];
    weights.values(i, c, w);
    biases.values(i, c, b);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float values[kSize];
      inputs[r].values(i, c, values);
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] = fmaf((values[e] - mean[r]) * rstd[r], w[e], b[e]);
      store<kAligned>(outputs.normed[rows[r]], c, inputs[r].channels, pack<T>(values));
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (lane == 0 && from[r] != nullptr) outputs.mean[rows[r]] = mean[r], outputs.rstd[rows[r]] = rstd[r];
}

// Vectors in so many channels.
template <typename T, int kChannels>
constexpr int kVectorsOf = kChannels / Vector<T>::kSize;

// Rows of T that a warp holds at once beside its part of the parameters: at most 72 registers.
template <typename T, typename A, int kChannels>
constexpr int kRowsOf = kChannels * (2 * sizeof(T) + 2 * sizeof(A)) <= 4 * 72 ? 2 : 1;

// Blocks: the merged row of `early` sequences, then kWarps * kRows output rows each.
template <typename T, typename A, int kHeld, bool kAligned, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    gather_merge_layernorm_kernel(Rows<const T> x,  // (tokens, channels)
                                  std::int64_t channels, const __grid_constant__ TokenSelection s,
                                  const A* weight, const A* bias,  // (channels,)
                                  float eps, const __grid_constant__ Outputs<T> outputs, int early) {
  __shared__ Merger<T, kWarp, kHeld == 0 ? kVectorsOf<T, 24> : kHeld> merger;
  __shared__ std::int64_t sequences[kRows * kWarps];  // to be merged here, into row first_row + place
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  const bool is_early = blockIdx.x < unsigned(early);
  const std::int64_t first_row =
      is_early ? merged_row(s, blockIdx.x) : std::int64_t(blockIdx.x - unsigned(early)) * (kRows * kWarps);
  std::int64_t rows[kRows], mine[kRows];
  const T* from[kRows];
  bool any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int place = r * kWarps + warp;
    rows[r] = first_row + place;
    mine[r] = kNone;
    from[r] = nullptr;
    if (is_early) {
      if (place == 0 && first_row != kNone) mine[r] = blockIdx.x;
    } else if (rows[r] < s.capacity) {
      const Origin origin = origin_of(s, rows[r]);
      if (origin.kept != kNone) {
        from[r] = x[origin.kept];
      } else if (origin.sequence == kNone) {
        zero_row<kAligned>(outputs.x_out[rows[r]], channels, lane);
        zero_row<kAligned>(outputs.normed[rows[r]], channels, lane);
        if (lane == 0) outputs.mean[rows[r]] = outputs.rstd[rows[r]] = 0;
      } else {
        mine[r] = late_sequence(s, origin, rows[r], early);
      }
    }
    any |= mine[r] != kNone;
    if (lane == 0) sequences[place] = mine[r];
  }

  if (__syncthreads_or(any)) {
    for (int place = 0; place < kRows * kWarps; ++place)
      if (sequences[place] != kNone)
        for (std::int64_t first = 0; first < channels; first += merger.kChannels)
          merger.template run<kAligned>(x, channels, s, sequences[place], first,
                                        outputs.x_out[first_row + place]);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (mine[r] != kNone) from[r] = outputs.x_out[rows[r]];
  }
  normalise<kHeld, kAligned>(from, rows, channels, weight, bias, eps, outputs, lane);
}

template <typename T, typename A>
Status run(Rows<const T> x, std::int64_t channels, const TokenSelection& s, const A* weight, const A* bias,
           float eps, const Outputs<T>& outputs, void* stream) {
  const bool aligned = is_aligned(x, channels) && is_aligned(outputs.x_out, channels) &&
                       is_aligned(outputs.normed, channels) && is_aligned(weight, channels, sizeof(A)) &&
                       is_aligned(bias, channels, sizeof(A));
  const auto start = [&](auto kernel, int rows_per_warp) {
    const std::int64_t early = early_sequences(s, 1), rows = rows_per_warp * kWarps;
    return launch(kernel, early + (s.capacity + rows - 1) / rows, kThreads, stream, x, channels, s, weight,
                  bias, eps, outputs, int(early));
  };
  constexpr int kRows24 = kRowsOf<T, A, 24>, kRows32 = kRowsOf<T, A, 32>;
  if (aligned && channels <= 24 * kWarp)
    return start(gather_merge_layernorm_kernel<T, A, kVectorsOf<T, 24>, true, kRows24>, kRows24);
  if (aligned && channels <= 32 * kWarp)
    return start(gather_merge_layernorm_kernel<T, A, kVectorsOf<T, 32>, true, kRows32>, kRows32);
  return aligned ? start(gather_merge_layernorm_kernel<T, A, 0, true, 1>, 1)
                 : start(gather_merge_layernorm_kernel<T, A, 0, false, 1>, 1);
}

}  // namespace

Status gather_merge_layernorm(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                              const TokenSelection& selection, const void* weight, const void* bias,
                              DType affine_dtype, double eps, void* x_out, void* normed, float* mean,
                              float* rstd, void* stream) {
  if (!is_valid(selection) || !is_matrix(x, dtype, selection.tokens, channels, x_stride) ||
      !is_matrix(x_out, dtype, selection.capacity, channels) ||
      !is_matrix(normed, dtype, selection.capacity, channels) || !is_present(weight, channels) ||
      !is_present(bias, channels) || (affine_dtype != dtype && affine_dtype != DType::float32) ||
      !(eps > 0 && std::isfinite(eps)) || !is_present(mean, selection.capacity) ||
      !is_present(rstd, selection.capacity))
    return Status::invalid_argument;
  if (selection.capacity == 0) return Status::ok;
  const float variance_floor = std::max(float(eps), FLT_MIN);  // positive in float32 too
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto with_affine = [&](auto affine_element) {
      using A = decltype(affine_element);
      return run(
          Rows<const T>{static_cast<const T*>(x), x_stride}, channels, selection,
          static_cast<const A*>(weight), static_cast<const A*>(bias), variance_floor,
          Outputs<T>{{static_cast<T*>(x_out), channels}, {static_cast<T*>(normed), channels}, mean, rstd},
          stream);
    };
    return affine_dtype == DType::float32 ? with_affine(float{}) : with_affine(element);
  });
}

}  // namespace madtp::cuda
