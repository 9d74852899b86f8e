// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows of a matrix, read and written by the lanes of a warp in vectors of 16 bytes. kAligned says that every
// vector of every row is whole and on a 16-byte boundary; otherwise its elements move one by one. Either way
// the same lane has the same channels, so sums do not depend on it.

#include <cstdint>
#include <type_traits>

#include "cuda/dtype.cuh"

namespace madtp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;  // elements between rows
  __host__ __device__ T* operator[](std::int64_t row) const { return data + row * stride; }
};

// Whether 16-byte accesses can serve `channels` elements from `data` on.
inline bool is_aligned(const void* data, std::int64_t channels, std::int64_t element_size) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && channels * element_size % 16 == 0;
}

template <typename T>
bool is_aligned(Rows<T> rows, std::int64_t channels) {
  constexpr std::int64_t size = sizeof(T);
  return is_aligned(rows.data, channels, size) && rows.stride * size % 16 == 0;
}

// The vector of `row` from `channel` on; zeros past `channels`.
template <bool kAligned, typename T>
__device__ Vector<T> load(const T* row, std::int64_t channel, std::int64_t channels) {
  Vector<T> vector{};
  if constexpr (kAligned) {
    if (channel < channels) {
      const uint4 words = *reinterpret_cast<const uint4*>(row + channel);
      vector = {{words.x, words.y, words.z, words.w}};
    }
  } else {
    T elements[Vector<T>::kSize] = {};
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e)
      if (channel + e < channels) elements[e] = row[channel + e];
    memcpy(vector.words, elements, sizeof elements);
  }
  return vector;
}

template <bool kAligned, typename T>
__device__ void store(T* row, std::int64_t channel, std::int64_t channels, const Vector<T>& vector) {
  if constexpr (kAligned) {
    const std::uint32_t (&words)[4] = vector.words;
    if (channel < channels)
      *reinterpret_cast<uint4*>(row + channel) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    T elements[Vector<T>::kSize];
    memcpy(elements, vector.words, sizeof elements);
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e)
      if (channel + e < channels) row[channel + e] = elements[e];
  }
}

// What a row is copied in.
template <bool kAligned, typename T>
using Unit = std::conditional_t<kAligned, uint4, T>;

template <bool kAligned, typename T>
__device__ void copy_row(const T* from, T* to, std::int64_t channels, int lane) {
  using U = Unit<kAligned, T>;
  constexpr int kAtOnce = 4;
  const std::int64_t count = channels / std::int64_t(sizeof(U) / sizeof(T));
#pragma unroll 1
  for (std::int64_t first = lane; first < count; first += kAtOnce * kWarp) {
    U units[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarp < count) units[i] = reinterpret_cast<const U*>(from)[first + i * kWarp];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarp < count) reinterpret_cast<U*>(to)[first + i * kWarp] = units[i];
  }
}

template <bool kAligned, typename T>
__device__ void zero_row(T* to, std::int64_t channels, int lane) {
  using U = Unit<kAligned, T>;
  const std::int64_t count = channels / std::int64_t(sizeof(U) / sizeof(T));
#pragma unroll 4
  for (std::int64_t i = lane; i < count; i += kWarp) reinterpret_cast<U*>(to)[i] = U{};
}

// The sum over the lanes, the same bits in each.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

}  // namespace madtp::cuda
