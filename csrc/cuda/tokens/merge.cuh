// SPDX-License-Identifier: Apache-2.0
#pragma once

// The merged row of a sequence: its pruned rows, summed with their weights by one block.
//
// The order of the sum is the same in every kernel, whatever the alignment and the batch. Rows are counted
// from the start of the sequence in stretches of kStretch; pruned row p of a stretch goes to slot p % kSlots;
// a slot adds its rows one after another; slots are added as (0 + 4) + (1 + 5) + (2 + 6) + (3 + 7).

#include <cstdint>

#include "cuda/tokens/rows.cuh"
#include "cuda/tokens/selection.cuh"

namespace madtp::cuda {

constexpr int kSlots = 8;
constexpr int kStretch = kWarp * kWarp;

// The pruned rows of one stretch, in order. Lives in shared memory.
struct PrunedRows {
  int per_warp[kWarp];  // in each 32 rows of the stretch
  int row[kStretch];    // from the start of the stretch
  float weight[kStretch];

  // Called by all kThreads of the block; returns the length of the list.
  template <int kThreads>
  __device__ int fill(const TokenSelection& s, std::int64_t begin, std::int64_t end) {
    constexpr int kRounds = kStretch / kThreads, kWarps = kThreads / kWarp;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    bool pruned[kRounds];
    float weights[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const std::int64_t j = begin + i * kThreads + thread;
      pruned[i] = j < end && s.keep[j] == 0;
      weights[i] = j < end ? s.merge_weight[j] : 0;
    }
    unsigned masks[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      masks[i] = __ballot_sync(kAllLanes, pruned[i]);
      if (lane == 0) per_warp[i * kWarps + warp] = __popc(masks[i]);
    }
    __syncthreads();
    const int count = per_warp[lane];
    int up_to = count;  // inclusive prefix sum, one lane for each 32 rows
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane >= distance) up_to += below;
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int before = __shfl_sync(kAllLanes, up_to - count, i * kWarps + warp);
      if (!pruned[i]) continue;
      const int place = before + __popc(masks[i] & ((1u << lane) - 1));
      row[place] = i * kThreads + thread;
      weight[place] = weights[i];
    }
    const int length = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    __syncthreads();
    return length;
  }
};

// Sums kChannels channels at a time: kLanes lanes per slot, kVectors vectors per lane. Lives in shared
// memory.
template <typename T, int kLanes, int kVectors>
struct Merger {
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr int kThreads = kSlots * kLanes;
  static constexpr int kSliceVectors = kLanes * kVectors;
  static constexpr int kChannels = kSliceVectors * kSize;

  static_assert(kSliceVectors <= kThreads, "a thread adds up one vector");

  PrunedRows list;
  float halves[kSlots / 2][kSize][kSliceVectors];

  // Writes channels [first, first + kChannels) of the merged row of sequence b. Called by all threads of the
  // block, which may read the row when it returns.
  template <bool kAligned>
  __device__ void run(Rows<const T> x, std::int64_t channels, const TokenSelection& s, std::int64_t b,
                      std::int64_t first, T* merged) {
    const int thread = threadIdx.x, lane = thread % kLanes, slot = thread / kLanes;
    float sums[kVectors][kSize] = {};
    const Span span = span_of(s, b);
    for (std::int64_t begin = span.begin; begin < span.end; begin += kStretch) {
      const int count = list.template fill<kThreads>(s, begin, span.end);
      constexpr int kRowsAtOnce = !kAligned ? 1 : kVectors == 1 ? 8 : 12 / kVectors;  // what registers hold
      for (int p = slot; p < count; p += kSlots * kRowsAtOnce)
        add_rows<kAligned, kRowsAtOnce>(x, channels, begin, first + lane * kSize, p, count, sums);
    }

    if (slot >= kSlots / 2) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
#pragma unroll
        for (int e = 0; e < kSize; ++e) halves[slot - kSlots / 2][e][i * kLanes + lane] = sums[i][e];
    }
    __syncthreads();
    if (slot < kSlots / 2) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
#pragma unroll
        for (int e = 0; e < kSize; ++e) halves[slot][e][i * kLanes + lane] += sums[i][e];
    }
    __syncthreads();
    if (thread < kSliceVectors) {
      float totals[kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        totals[e] = halves[0][e][thread] + halves[1][e][thread] + halves[2][e][thread] + halves[3][e][thread];
      store<kAligned>(merged, first + thread * kSize, channels, pack<T>(totals));
    }
    __syncthreads();
  }

 private:
  // Adds kRows rows of the list, p, p + kSlots, ...: all are loaded before the first is used. Nothing guards
  // the aligned loads: past the list the last row is read again and not added, past the channels channel 0 is
  // read and its sum not stored.
  template <bool kAligned, int kRows>
  __device__ void add_rows(Rows<const T> x, std::int64_t channels, std::int64_t begin, std::int64_t channel,
                           int p, int count, float (&sums)[kVectors][kSize]) const {
    Vector<T> loaded[kRows][kVectors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* const row = x[begin + list.row[min(p + r * kSlots, count - 1)]];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t c = channel + i * kLanes * kSize;
        loaded[r][i] = load<kAligned>(row, kAligned && c >= channels ? 0 : c, channels);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (p + r * kSlots >= count) break;
      const float weight = list.weight[p + r * kSlots];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float values[kSize];
        unpack(loaded[r][i], values);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[i][e] = fmaf(weight, values[e], sums[i][e]);
      }
    }
  }
};

}  // namespace madtp::cuda
