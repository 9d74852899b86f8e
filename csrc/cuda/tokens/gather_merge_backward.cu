// SPDX-License-Identifier: Apache-2.0
// gather_merge_backward: a warp takes an input row. A kept one takes the gradient of its output row, a pruned
// one its share of the gradient of the merged row, and its weight the inner product of that gradient with the
// row.
//
// Bound by memory. At B = 32, N = 577, C = 768, bfloat16, half of the rows kept, it reads 28.4 MB (of grad
// the kept rows, of x the pruned ones; the merged rows stay in cache) and writes 28.4 MB: 17 us at the 3.35
// TB/s of an H100. Blocks split the batch by rows, not by sequences, so that long sequences do not wait for
// each other: where a kept row went follows from the number of kept rows before it, which each block counts.

#include "cuda/launch.cuh"
#include "cuda/tokens/rows.cuh"
#include "cuda/tokens/selection.cuh"
#include "madtp/tokens.h"

namespace madtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// grad_x = weight * grad; returns <x, grad>.
template <bool kAligned, typename T>
__device__ float scale_row(const T* x, const T* grad, float weight, T* grad_x, std::int64_t channels,
                           int lane) {
  constexpr int kSize = Vector<T>::kSize, kAtOnce = kAligned ? 3 : 1, kStep = kWarp * kSize;
  float dot = 0;
  for (std::int64_t first = lane * kSize; first < channels; first += kAtOnce * kStep) {
    Vector<T> inputs[kAtOnce], grads[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      inputs[i] = load<kAligned>(x, first + i * kStep, channels);
      grads[i] = load<kAligned>(grad, first + i * kStep, channels);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float values[kSize], gradients[kSize];
      unpack(inputs[i], values);
      unpack(grads[i], gradients);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        dot = fmaf(values[e], gradients[e], dot);
        gradients[e] *= weight;
      }
      store<kAligned>(grad_x, first + i * kStep, channels, pack<T>(gradients));
    }
  }
  return warp_sum(dot);
}

// Blocks: kWarp input rows each; lane i of every warp finds where row first_row + i went.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    gather_merge_backward_kernel(Rows<const T> grad,  // (capacity, channels)
                                 Rows<const T> x,     // (tokens, channels)
                                 std::int64_t channels, const __grid_constant__ TokenSelection s,
                                 Rows<T> grad_x,        // (tokens, channels)
                                 float* grad_weight) {  // (tokens,)
  __shared__ int counts[kWarps];
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kWarp, row = first_row + lane;

  const bool exists = row < s.tokens;
  const std::int64_t b = exists ? sequence_of(s, row) : kNone;
  const bool is_kept = exists && s.keep[row] != 0;
  const float weight = exists && !is_kept ? s.merge_weight[row] : 0;
  const unsigned kept = __ballot_sync(kAllLanes, is_kept);

  // The kept rows of the first row's sequence that lie before this block.
  const std::int64_t begin = b != kNone ? span_of(s, b).begin : first_row;
  int count = 0;
  for (std::int64_t j = __shfl_sync(kAllLanes, begin, 0) + thread; j < first_row; j += kThreads)
    count += s.keep[j] != 0;
  count = __reduce_add_sync(kAllLanes, count);
  if (lane == 0) counts[warp] = count;
  __syncthreads();

  int target = -1;  // the output row whose gradient this row takes
  if (b != kNone) {
    const std::int64_t out_begin = s.cu_seqlens_out[b], out_end = s.cu_seqlens_out[b + 1];
    unsigned before = kept & ((1u << lane) - 1);
    int rank = 0;
    if (begin >= first_row) {
      before &= kAllLanes << (begin - first_row);
    } else {
      for (int w = 0; w < kWarps; ++w) rank += counts[w];
    }
    const std::int64_t out_row = is_kept ? out_begin + rank + __popc(before) : out_end - 1;
    if (out_row >= 0 && out_row < out_end && out_row < s.capacity) target = int(out_row);
  }

  for (int i = warp; i < kWarp && first_row + i < s.tokens; i += kWarps) {
    const int from = __shfl_sync(kAllLanes, target, i);
    const float share = __shfl_sync(kAllLanes, weight, i);
    float dot = 0;
    if (from < 0) {
      zero_row<kAligned>(grad_x[first_row + i], channels, lane);
    } else if (kept >> i & 1) {
      copy_row<kAligned>(grad[from], grad_x[first_row + i], channels, lane);
    } else {
      dot = scale_row<kAligned>(x[first_row + i], grad[from], share, grad_x[first_row + i], channels, lane);
    }
    if (lane == 0) grad_weight[first_row + i] = dot;
  }
}

template <typename T>
Status run(Rows<const T> grad, Rows<const T> x, std::int64_t channels, const TokenSelection& s,
           Rows<T> grad_x, float* grad_weight, void* stream) {
  const bool aligned = is_aligned(grad, channels) && is_aligned(x, channels) && is_aligned(grad_x, channels);
  const auto kernel =
      aligned ? gather_merge_backward_kernel<T, true> : gather_merge_backward_kernel<T, false>;
  return launch(kernel, (s.tokens + kWarp - 1) / kWarp, kThreads, stream, grad, x, channels, s, grad_x,
                grad_weight);
}

}  // namespace

Status gather_merge_backward(const void* grad, std::int64_t grad_stride, const void* x, DType dtype,
                             std::int64_t x_stride, std::int64_t channels, const TokenSelection& selection,
                             void* grad_x, float* grad_weight, void* stream) {
  if (!is_valid(selection) || !is_matrix(grad, dtype, selection.capacity, channels, grad_stride) ||
      !is_matrix(x, dtype, selection.tokens, channels, x_stride) ||
      !is_matrix(grad_x, dtype, selection.tokens, channels) || !is_present(grad_weight, selection.tokens))
    return Status::invalid_argument;
  if (selection.tokens == 0) return Status::ok;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return run(Rows<const T>{static_cast<const T*>(grad), grad_stride},
               Rows<const T>{static_cast<const T*>(x), x_stride}, channels, selection,
               Rows<T>{static_cast<T*>(grad_x), channels}, grad_weight, stream);
  });
}

}  // namespace madtp::cuda
