#pragma once

// From accumulators to rows of the output: y = residual + scale * activation(sum + bias), in float32, cast
// once. In the accumulators of mma and wgmma a lane has two neighbouring tokens of a feature; staged in
// shared memory they come out as rows, 64 features at a time, 128 bytes of a 16-bit type.

#include <cstdint>

#include "cuda/dtype.cuh"
#include "cuda/sparse24_layout.cuh"
#include "madtp/sparse24.h"

namespace madtp::cuda {

// Floats between staged tokens. 4 modulo 16: the 32 words that a warp stages at once lie in 32 banks.
constexpr int kStagedStride = kTileFeatures + 4;
constexpr int kFeaturesAtOnce = 4;  // of one token, by one lane
constexpr int kLanesPerToken = kTileFeatures / kFeaturesAtOnce;

// What the epilogue needs of the problem.
template <typename T>
struct Output {
  T* out;             // (rows, features)
  const T* residual;  // (rows, features), or null
  const void* bias;   // (features,), or null
  const void* scale;  // (features,), or null
  std::int64_t out_stride, residual_stride;
  const std::int32_t* total;  // rows from it on are zeros; null: there are none
  int rows, features;
  Activation activation;
  bool bias_is_float, scale_is_float;  // and not T

  // Rows that are computed.
  __device__ int real_rows() const {
    if (total == nullptr) return rows;
    const int most = *total;
    return most < 0 ? 0 : most < rows ? most : rows;
  }
};

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return x * normcdff(x);
    case Activation::gelu_tanh:
      return x / (1 + expf(-x * (0.0713548163f * x * x + 1.59576912f)));
    case Activation::quick_gelu:
      return x / (1 + expf(-1.702f * x));
    case Activation::relu:
      return x < 0 ? 0 : x;  // NaN stays
    default:
      return x;
  }
}

template <typename T>
__device__ void load_four(const T* from, float (&values)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    Pair<T> pairs[2];
    memcpy(pairs, &words, sizeof words);
    const float2 low = to_float2(pairs[0]), high = to_float2(pairs[1]);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
  }
}

template <typename T>
__device__ void store_four(T* to, const float (&values)[4]) {
  Pair<T> pairs[2];
  round_to(values[0], values[1], pairs[0]);
  round_to(values[2], values[3], pairs[1]);
  uint2 words;
  memcpy(&words, pairs, sizeof words);
  *reinterpret_cast<uint2*>(to) = words;
}

// Stages the sums of 16 features and 8 tokens, a fragment of d: those of slab `slab` and tokens 8 `group` on.
__device__ inline void stage(float* staged, int slab, int group, const float* d, int lane) {
  float* const to = staged + (8 * group + lane % 4 * 2) * kStagedStride + slab * kSlabRows + lane / 4;
  to[0] = d[0];
  to[kStagedStride] = d[1];
  to[8] = d[2];
  to[kStagedStride + 8] = d[3];
}

// One lane of those that write the rows of a tile of 64 features from `first_feature` on.
template <typename T>
class RowWriter {
 public:
  __device__ RowWriter(const Output<T>& output, int first_feature, int lane)
      : o_(output), lane_(lane), feature_(first_feature + lane % kLanesPerToken * kFeaturesAtOnce) {
    if (feature_ >= o_.features) return;
    load_vector(o_.bias, o_.bias_is_float, bias_);
    load_vector(o_.scale, o_.scale_is_float, scale_);
  }

  // Writes `count` staged tokens, the first of them row `first_row`; rows from `real_rows` on are zeros.
  // Called by kLanes lanes.
  template <int kLanes>
  __device__ void write(const float* staged, int first_row, int count, int real_rows) const {
    if (feature_ >= o_.features) return;
#pragma unroll 1
    for (int i = lane_ / kLanesPerToken; i < count; i += kLanes / kLanesPerToken) {
      const int row = first_row + i;
      if (row >= o_.rows) return;
      float sums[4];
      load_four(staged + i * kStagedStride + lane_ % kLanesPerToken * kFeaturesAtOnce, sums);
      write_four(row, sums, row < real_rows);
    }
  }

  // Four features of a row from their sums, or zeros.
  __device__ void write_four(int row, const float (&sums)[4], bool is_real) const {
    float y[4] = {};
    if (is_real) {
      if (o_.residual != nullptr) load_four(o_.residual + row * o_.residual_stride + feature_, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = activate(o_.bias == nullptr ? sums[i] : sums[i] + bias_[i], o_.activation);
        y[i] += o_.scale == nullptr ? a : a * scale_[i];
      }
    }
    store_four(o_.out + row * o_.out_stride + feature_, y);
  }

 private:
  __device__ void load_vector(const void* vector, bool is_float, float (&values)[4]) const {
    if (vector == nullptr) return;
    if (is_float) {
      load_four(static_cast<const float*>(vector) + feature_, values);
    } else {
      load_four(static_cast<const T*>(vector) + feature_, values);
    }
  }

  const Output<T>& o_;
  int lane_, feature_;
  float bias_[4], scale_[4];
};

}  // namespace madtp::cuda
