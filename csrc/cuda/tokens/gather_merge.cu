// SPDX-License-Identifier: Apache-2.0
// gather_merge: a warp copies a kept row, a block sums a slice of a merged row.
//
// Bound by memory. At B = 32, N = 577, C = 768, bfloat16, half of the rows kept, it reads 28.4 MB and writes
// 14.2 MB: 13 us at the 3.35 TB/s of an H100. The copies need no help; the 288 rows of a merged row would
// keep one block about as long. So it is split over channels (six blocks of 256 bytes per row, 16 KB in
// flight in each), and its blocks come first, to run under the copies.

#include "cuda/launch.cuh"
#include "cuda/tokens/merge.cuh"
#include "madtp/tokens.h"

namespace madtp::cuda {
namespace {

constexpr int kLanes = 16;  // 128 channels of 16 bits, 64 of float32
constexpr int kThreads = kSlots * kLanes;
constexpr int kWarps = kThreads / kWarp;

// Blocks: `early` sequences times `slices` of their merged row, then kWarps output rows each.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 7)
    gather_merge_kernel(Rows<const T> x,  // (tokens, channels)
                        Rows<T> out,      // (capacity, channels)
                        std::int64_t channels, const __grid_constant__ TokenSelection s, int early,
                        int slices) {
  __shared__ Merger<T, kLanes, 1> merger;
  __shared__ std::int64_t sequences[kWarps];  // to be merged here, into row first_row + warp
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  std::int64_t first_row, mine = kNone;
  int slice = 0, end_slice = slices;
  if (blockIdx.x < unsigned(early) * unsigned(slices)) {
    const int b = int(blockIdx.x / unsigned(slices));
    slice = int(blockIdx.x % unsigned(slices));
    end_slice = slice + 1;
    first_row = merged_row(s, b);
    if (warp == 0 && first_row != kNone) mine = b;
  } else {
    first_row = std::int64_t(blockIdx.x - unsigned(early) * unsigned(slices)) * kWarps;
    const std::int64_t row = first_row + warp;
    if (row < s.capacity) {
      const Origin origin = origin_of(s, row);
      if (origin.kept != kNone) {
        copy_row<kAligned>(x[origin.kept], out[row], channels, lane);
      } else if (origin.sequence == kNone) {
        zero_row<kAligned>(out[row], channels, lane);
      } else {
        mine = late_sequence(s, origin, row, early);
      }
    }
  }

  if (lane == 0) sequences[warp] = mine;
  if (!__syncthreads_or(mine != kNone)) return;
  for (int w = 0; w < kWarps; ++w) {
    if (sequences[w] == kNone) continue;
    for (int i = slice; i < end_slice; ++i)
      merger.template run<kAligned>(x, channels, s, sequences[w], std::int64_t(i) * merger.kChannels,
                                    out[first_row + w]);
  }
}

template <typename T>
Status run(Rows<const T> x, Rows<T> out, std::int64_t channels, const TokenSelection& s, void* stream) {
  constexpr int kChannels = Merger<T, kLanes, 1>::kChannels;
  const std::int64_t slices = (channels + kChannels - 1) / kChannels, early = early_sequences(s, slices);
  const std::int64_t blocks = early * slices + (s.capacity + kWarps - 1) / kWarps;
  const auto kernel = is_aligned(x, channels) && is_aligned(out, channels) ? gather_merge_kernel<T, true>
                                                                           : gather_merge_kernel<T, false>;
  return launch(kernel, blocks, kThreads, stream, x, out, channels, s, int(early), int(slices));
}

}  // namespace

Status gather_merge(const void* x, DType dtype, std::int64_t x_stride, std::int64_t channels,
                    const TokenSelection& selection, void* out, void* stream) {
  if (!is_valid(selection) || !is_matrix(x, dtype, selection.tokens, channels, x_stride) ||
      !is_matrix(out, dtype, selection.capacity, channels))
    return Status::invalid_argument;
  if (selection.capacity == 0 || channels == 0) return Status::ok;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return run(Rows<const T>{static_cast<const T*>(x), x_stride}, Rows<T>{static_cast<T*>(out), channels},
               channels, selection, stream);
  });
}

}  // namespace madtp::cuda
