// SPDX-License-Identifier: Apache-2.0
#pragma once

// From accumulators to rows of the output: y = residual + scale * activation(sum + bias), in float32, cast
// once. In the accumulators of mma and wgmma a lane has two neighbouring tokens of a feature; staged in
// shared memory they come out as rows, 64 output features at a time, 128 bytes of a 16-bit type.

#include <cstdint>

#include "cuda/dtype.cuh"
#include "cuda/sparse24/layout.cuh"
#include "madtp/sparse24.h"

namespace madtp::cuda {

constexpr int kFeaturesAtOnce = 4;  // output features of one token that one lane writes

// Floats between staged tokens: 4 modulo 16, so that the 32 words that a warp stages at once lie in 32 banks.
template <int kFeatures>
constexpr int kStride = kFeatures + 4;
constexpr int kStagedStride = kStride<kTileFeatures>;

// What the epilogue needs of a call.
template <typename T>
struct Output {
  T* out;             // (tokens, out_features)
  const T* residual;  // (tokens, out_features), or null
  const void* bias;   // (out_features,), or null
  const void* scale;  // (out_features,), or null
  std::int64_t out_stride, residual_stride;
  const std::int32_t* num_rows;  // rows from it on are zeros; null: every row is computed
  int tokens, out_features;
  Activation activation;
  bool bias_is_float, scale_is_float;  // and not T

  // How many tokens are computed: what num_rows says, and never more than there are.
  __device__ int valid_tokens() const {
    if (num_rows == nullptr) return tokens;
    const int valid = *num_rows;
    return valid < 0 ? 0 : valid < tokens ? valid : tokens;
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

__device__ inline void load_four(const float* from, float (&values)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

template <typename T>
__device__ void unpack_four(const uint2& words, float (&values)[4]) {
  Pair<T> pairs[2];
  memcpy(pairs, &words, sizeof words);
  const float2 low = to_float2(pairs[0]), high = to_float2(pairs[1]);
  values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
}

template <typename T>
__device__ uint2 pack_four(const float (&values)[4]) {
  Pair<T> pairs[2];
  round_to(values[0], values[1], pairs[0]);
  round_to(values[2], values[3], pairs[1]);
  uint2 words;
  memcpy(&words, pairs, sizeof words);
  return words;
}

// Stages the sums of 16 output features and 8 tokens, a fragment of d: those of slab `slab` and tokens 8
// `group` on.
template <int kFeatures = kTileFeatures>
__device__ void stage(float* staged, int slab, int group, const float* d, int lane) {
  constexpr int kNext = kStride<kFeatures>;
  float* const to = staged + (8 * group + lane % 4 * 2) * kNext + slab * kSlabRows + lane / 4;
  to[0] = d[0];
  to[kNext] = d[1];
  to[8] = d[2];
  to[kNext + 8] = d[3];
}

// One lane of those that write the rows of a tile of kFeatures output features from `first_feature` on.
template <typename T, int kFeatures = kTileFeatures>
class RowWriter {
 public:
  __device__ RowWriter(const Output<T>& output, int first_feature, int lane)
      : o_(output),
        token_(lane / kLanesPerToken),
        place_(lane % kLanesPerToken * kFeaturesAtOnce),
        feature_(first_feature + place_) {
    if (feature_ >= o_.out_features) return;
    load_vector(o_.bias, o_.bias_is_float, bias_);
    load_vector(o_.scale, o_.scale_is_float, scale_);
  }

  // Writes `count` staged tokens from `first_token` on; those from `valid_tokens` on are zeros.
  // Called by kLanes lanes.
  template <int kLanes>
  __device__ void write(const float* staged, int first_token, int count, int valid_tokens) const {
    constexpr int kStep = kLanes / kLanesPerToken;
    if (feature_ >= o_.out_features) return;
    if (count > o_.tokens - first_token) count = o_.tokens - first_token;
    valid_tokens -= first_token;
#pragma unroll 1
    for (int first = token_; first < count; first += kTokensAtOnce * kStep) {
      uint2 residuals[kTokensAtOnce] = {};
      if (o_.residual != nullptr) {
#pragma unroll
        for (int k = 0; k < kTokensAtOnce; ++k) {
          const int i = first + k * kStep;
          if (i < count && i < valid_tokens)
            residuals[k] = *reinterpret_cast<const uint2*>(o_.residual +
                                                           (first_token + i) * o_.residual_stride + feature_);
        }
      }
#pragma unroll
      for (int k = 0; k < kTokensAtOnce; ++k) {
        const int i = first + k * kStep;
        if (i >= count) continue;
        float y[4] = {};
        if (i < valid_tokens) {
          float sums[4];
          load_four(staged + i * kStride<kFeatures> + place_, sums);
          if (o_.residual != nullptr) unpack_four<T>(residuals[k], y);
          add(sums, y);
        }
        store(first_token + i, y);
      }
    }
  }

  // Zeros in `count` tokens from `first_token` on. Called by kLanes lanes.
  template <int kLanes>
  __device__ void clear(int first_token, int count) const {
    if (feature_ >= o_.out_features) return;
    if (count > o_.tokens - first_token) count = o_.tokens - first_token;
    for (int i = token_; i < count; i += kLanes / kLanesPerToken) store(first_token + i, {});
  }

 private:
  static constexpr int kLanesPerToken = kFeatures / kFeaturesAtOnce;
  static constexpr int kTokensAtOnce = 8;  // loads under way: the latency of the residual is paid so seldom

  __device__ void add(const float (&sums)[4], float (&y)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = activate(o_.bias == nullptr ? sums[i] : sums[i] + bias_[i], o_.activation);
      y[i] += o_.scale == nullptr ? a : a * scale_[i];
    }
  }

  __device__ void store(int token, const float (&y)[4]) const {
    *reinterpret_cast<uint2*>(o_.out + token * o_.out_stride + feature_) = pack_four<T>(y);
  }

  __device__ void load_vector(const void* vector, bool is_float, float (&values)[4]) const {
    if (vector == nullptr) return;
    if (is_float) {
      load_four(static_cast<const float*>(vector) + feature_, values);
    } else {
      unpack_four<T>(*reinterpret_cast<const uint2*>(static_cast<const T*>(vector) + feature_), values);
    }
  }

  const Output<T>& o_;
  int token_, place_, feature_;
  float bias_[4], scale_[4];
};

}  // namespace madtp::cuda
