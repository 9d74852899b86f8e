// SPDX-License-Identifier: Apache-2.0
// Rows in floating point -> int8 or e4m3 with a scale each, as madtp/quantized.h says: a warp has a row.
//
// Bound by memory: a row is read twice, the second time from L1. At 18464 rows of 768 in bfloat16, 28.4 MB
// are read and 14.3 MB written: 13 us at the 3.35 TB/s of an H100.

#include "cuda/launch.cuh"
#include "cuda/quantized/kernels.h"
#include "cuda/tokens/rows.cuh"

namespace madtp::cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
struct Params {
  const T* x;  // (tokens, in_features)
  std::int64_t x_stride;
  unsigned char* values;  // (tokens, in_features)
  std::int64_t stride;
  float* scale;  // (tokens,)
  const std::int32_t* num_rows;
  int tokens, in_features;
};

// The largest value of a type, below which amax a row counts as zeros, and a value in its range to the
// nearest of the type, as its 8 bits in the lowest byte; ties to even.
struct Int8Rounding {
  static constexpr float kMax = 127, kMinAmax = 1.504632769052528e-36f;  // 2^-119
  __device__ static std::uint32_t bits(float x) {
    constexpr float kMagic = 12582912;  // 1.5 * 2^23: a sum with it is rounded to an integer
    return __float_as_uint(__fadd_rn(x, kMagic)) & 0xff;
  }
};
struct E4M3Rounding {
  static constexpr float kMax = 448, kMinAmax = 6.018531076210112e-36f;  // 2^-117
  __device__ static std::uint32_t bits(float x) {
    const std::uint32_t word = __float_as_uint(x), magnitude = word & 0x7fffffff;
    // Below 2^-6 in steps of 2^-9, which a sum with 2^14 has; above, the exponent with a bias of 7 in place
    // of 127, and three bits of the fraction.
    constexpr std::uint32_t kSmallest = 121u << 23, kBias = 120u << 3;
    constexpr float kMagic = 16384;
    const std::uint32_t small =
        __float_as_uint(__fadd_rn(__uint_as_float(magnitude), kMagic)) - __float_as_uint(kMagic);
    const std::uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - kBias;
    return (magnitude < kSmallest ? small : normal) | (word >> 24 & 0x80);
  }
};

template <typename T, typename Rounding>
__global__ void __launch_bounds__(kWarps* kWarp) quantize_rows_kernel(const __grid_constant__ Params<T> p) {
  constexpr int kSize = Vector<T>::kSize;
  const int token = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  int valid_tokens = p.tokens;
  if (p.num_rows != nullptr) valid_tokens = min(valid_tokens, *p.num_rows);
  if (token >= valid_tokens) return;
  const T* const x = p.x + token * p.x_stride;
  unsigned char* const to = p.values + token * p.stride;

  // The bits of magnitudes are in the order of these, infinities and NaN above all.
  std::uint32_t most = 0;
#pragma unroll 4
  for (int c = lane * kSize; c < p.in_features; c += kWarp * kSize) {
    float values[kSize];
    unpack<T>(load<true>(x, c, p.in_features), values);
#pragma unroll
    for (float value : values) most = max(most, __float_as_uint(value) & 0x7fffffff);
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    most = max(most, __shfl_xor_sync(kAllLanes, most, distance));

  const float amax = __uint_as_float(most);
  const bool is_finite = most < 0x7f800000, is_usable = is_finite && amax >= Rounding::kMinAmax;
  if (lane == 0) {
    const float nothing = is_finite ? 0.0f : __uint_as_float(0x7fc00000);
    p.scale[token] = is_usable ? amax / Rounding::kMax : nothing;
  }
  const float inverse = Rounding::kMax / amax;
#pragma unroll 4
  for (int c = lane * kSize; c < p.in_features; c += kWarp * kSize) {
    std::uint32_t words[kSize / 4] = {};
    if (is_usable) {
      float values[kSize];
      unpack<T>(load<true>(x, c, p.in_features), values);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        words[i / 4] |= Rounding::bits(__fmul_rn(values[i], inverse)) << (8 * (i % 4));
    }
    if constexpr (kSize == 8) {
      *reinterpret_cast<uint2*>(to + c) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<std::uint32_t*>(to + c) = words[0];
    }
  }
}

}  // namespace

Status quantize(DType dtype, const void* x, std::int64_t x_stride, std::int64_t tokens,
                std::int64_t in_features, const std::int32_t* num_rows, const QuantizedRows& rows,
                void* stream) {
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Params<T> params{static_cast<const T*>(x),
                           x_stride,
                           static_cast<unsigned char*>(rows.values),
                           rows.stride,
                           rows.scale,
                           num_rows,
                           int(tokens),
                           int(in_features)};
    const auto kernel = rows.type == QuantizedType::int8 ? quantize_rows_kernel<T, Int8Rounding>
                                                         : quantize_rows_kernel<T, E4M3Rounding>;
    return launch(kernel, quotient_up(tokens, kWarps), kWarps * kWarp, stream, params);
  });
}

}  // namespace madtp::cuda
