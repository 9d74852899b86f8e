// SPDX-License-Identifier: Apache-2.0
#pragma once

// Element types on the device. Data moves as it is stored, 16 bytes at a time; arithmetic is float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "madtp/dtype.h"

namespace madtp::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;
struct E4M3 {  // torch.float8_e4m3fn
  std::uint8_t bits;
};

// 16 bytes of a row: what one lane moves in one access. Kept as words, since elements of 16 bits would take a
// register each.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);  // elements
  std::uint32_t words[4];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Float16 x) { return __half2float(x); }
// An instruction for each: __bfloat1622float2 takes three.
__device__ inline float2 to_float2(__nv_bfloat162 pair) {
  std::uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}
__device__ inline float2 to_float2(__half2 pair) { return __half22float2(pair); }
__device__ inline void round_to(float a, float b, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(a, b);
}
__device__ inline void round_to(float a, float b, __half2& pair) { pair = __floats2half2_rn(a, b); }

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, Float16>, __half2, __nv_bfloat162>;

template <typename T>
__device__ void unpack(const Vector<T>& vector, float (&values)[Vector<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(vector.words[i]);
    } else {
      Pair<T> pair;
      memcpy(&pair, &vector.words[i], sizeof pair);
      const float2 two = to_float2(pair);
      values[2 * i] = two.x;
      values[2 * i + 1] = two.y;
    }
  }
}

// Rounds to the nearest.
template <typename T>
__device__ Vector<T> pack(const float (&values)[Vector<T>::kSize]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      vector.words[i] = __float_as_uint(values[i]);
    } else {
      Pair<T> pair;
      round_to(values[2 * i], values[2 * i + 1], pair);
      memcpy(&vector.words[i], &pair, sizeof pair);
    }
  }
  return vector;
}

// with_type(dtype, body) calls body(T{}) with the element type of a checked dtype.
template <typename Body>
auto with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    default:
      return body(float{});
  }
}

}  // namespace madtp::cuda
