// SPDX-License-Identifier: Apache-2.0
#pragma once

// From accumulators to rows of the output: y = residual + scale * activation(sum + bias), in float32, cast
// once. Of quantised operands the sum is first multiplied by the scale of its row of x, then by that of its
// row of the weight, and every operation rounds by itself, as on a CPU. In the accumulators of mma and wgmma
// a lane has two neighbouring tokens of a feature; staged in shared memory they come out as rows, 64 output
// features at a time, 128 bytes of a 16-bit type.

#include <cstdint>
#include <type_traits>

#include "cuda/dtype.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/layout.cuh"

namespace madtp::cuda {

constexpr int kFeaturesAtOnce = 4;  // output features of one token that one lane writes

// Floats between staged tokens: 4 modulo 16, so that the 32 words that a warp stages at once lie in 32 banks.
template <int kFeatures>
constexpr int kStride = kFeatures + 4;

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
  bool bias_is_float, scale_is_float;   // and not T
  const float *x_scale, *weight_scale;  // (tokens,), (out_features,), of quantised operands

  // How many tokens are computed: what num_rows says, and never more than there are.
  __device__ int valid_tokens() const {
    if (num_rows == nullptr) return tokens;
    const int valid = *num_rows;
    return valid < 0 ? 0 : valid < tokens ? valid : tokens;
  }
};

template <typename T>
Output<T> output_of(const LinearCall& a, void* out, std::int64_t out_stride) {
  return {static_cast<T*>(out),
          static_cast<const T*>(a.residual),
          a.bias,
          a.scale,
          out_stride,
          a.residual_stride,
          a.num_rows,
          int(a.tokens),
          int(a.out_features),
          a.activation,
          a.bias_dtype == DType::float32,
          a.scale_dtype == DType::float32,
          a.x_scale,
          a.weight_scale};
}

// Phi(-a) of a >= 0, the normal distribution's tail: exp(-a^2 / 2) Q(t) with t = 1 / (1 + 0.37 a) and Q of
// degree 5, the minimax fit on [0, 13]. Its relative error is at most 3.5e-5 everywhere, a fourteenth of what
// rounding to float16 costs, where normcdff takes four times the instructions for digits that are rounded
// off.
__device__ inline float normal_tail(float a) {
  const float t = ptx::rcp_approx(0.37f * a + 1);
  float q = -0.0903521040f * t + 0.209933160f;
  q = q * t + 0.0761382859f;
  q = q * t + 0.157376608f;
  q = q * t + 0.146919647f;
  constexpr float kHalfLog2E = 0.721347520f;
  return q * t * ptx::ex2_approx(-kHalfLog2E * a * a);
}

// x / (1 + exp(-z)), z to base 2.
__device__ inline float gated(float x, float z) { return x * ptx::rcp_approx(1 + ptx::ex2_approx(-z)); }

// NaN stays, and infinity becomes what the exact function makes of it.
template <Activation kActivation>
__device__ float activate(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (kActivation == Activation::gelu) {
    const float tail = normal_tail(fabsf(x));
    return x * (x < 0 ? tail : 1 - tail);
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    return gated(x, x * (0.0713548163f * kLog2E * x * x + 1.59576912f * kLog2E));
  } else if constexpr (kActivation == Activation::quick_gelu) {
    return gated(x, 1.702f * kLog2E * x);
  } else if constexpr (kActivation == Activation::relu) {
    return x < 0 ? 0 : x;
  } else {
    return x;
  }
}

// use(std::integral_constant) with an activation of a checked call.
template <typename Use>
__device__ void with_activation(Activation activation, Use&& use) {
  switch (activation) {
    case Activation::gelu:
      return use(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return use(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::quick_gelu:
      return use(std::integral_constant<Activation, Activation::quick_gelu>{});
    case Activation::relu:
      return use(std::integral_constant<Activation, Activation::relu>{});
    default:
      return use(std::integral_constant<Activation, Activation::none>{});
  }
}

// before + value * scale: one FMA where the compiler likes, but of quantised operands two roundings.
template <bool kIsQuantized>
__device__ float add_scaled(float before, float value, float scale) {
  if constexpr (kIsQuantized) return __fadd_rn(before, __fmul_rn(value, scale));
  return before + value * scale;
}

__device__ inline void load_four(const float* from, float (&values)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

// Four elements of T, as they move.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

template <typename T>
__device__ void unpack_four(const Four<T>& words, float (&values)[4]) {
  if constexpr (sizeof(T) == 4) {
    values[0] = __uint_as_float(words.x), values[1] = __uint_as_float(words.y);
    values[2] = __uint_as_float(words.z), values[3] = __uint_as_float(words.w);
  } else {
    Pair<T> pairs[2];
    memcpy(pairs, &words, sizeof words);
    const float2 low = to_float2(pairs[0]), high = to_float2(pairs[1]);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
  }
}

template <typename T>
__device__ Four<T> pack_four(const float (&values)[4]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
  } else {
    Pair<T> pairs[2];
    round_to(values[0], values[1], pairs[0]);
    round_to(values[2], values[3], pairs[1]);
    uint2 words;
    memcpy(&words, pairs, sizeof words);
    return words;
  }
}

// Stages the sums of 16 output features and 8 tokens, a fragment of d: those of slab `slab` and tokens 8
// `group` on.
template <int kFeatures = kTileFeatures, typename Sum>
__device__ void stage(float* staged, int slab, int group, const Sum (&d)[4], int lane) {
  constexpr int kNext = kStride<kFeatures>;
  float* const to = staged + (8 * group + lane % 4 * 2) * kNext + slab * kSlabRows + lane / 4;
  to[0] = float(d[0]);
  to[kNext] = float(d[1]);
  to[8] = float(d[2]);
  to[kNext + 8] = float(d[3]);
}

// One lane of those that write the rows of a tile of kFeatures output features from `first_feature` on.
template <typename T, bool kIsQuantized, int kFeatures = kTileFeatures>
class RowWriter {
 public:
  __device__ RowWriter(const Output<T>& output, int first_feature, int lane)
      : o_(output),
        token_(lane / kLanesPerToken),
        place_(lane % kLanesPerToken * kFeaturesAtOnce),
        feature_(first_feature + place_) {
    if (feature_ >= o_.out_features) return;
    load_vector(o_.bias, o_.bias_is_float, -0.0f, bias_);  // which leaves every sum as it is
    load_vector(o_.scale, o_.scale_is_float, 1, scale_);
    if constexpr (kIsQuantized) load_four(o_.weight_scale + feature_, weight_scale_);
  }

  // Writes `count` staged tokens from `first_token` on; those from `valid_tokens` on are zeros.
  // Called by kLanes lanes.
  template <int kLanes>
  __device__ void write(const float* staged, int first_token, int count, int valid_tokens) const {
    if (feature_ >= o_.out_features) return;
    with_activation(o_.activation, [&](auto activation) {  // one branch here, not one for each value
      write_as<kLanes, decltype(activation)::value>(staged, first_token, count, valid_tokens);
    });
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
  static constexpr int kTokensAtOnce = 4;  // loads under way; more would not fit beside the largest tile

  template <int kLanes, Activation kActivation>
  __device__ void write_as(const float* staged, int first_token, int count, int valid_tokens) const {
    constexpr int kStep = kLanes / kLanesPerToken;
    if (count > o_.tokens - first_token) count = o_.tokens - first_token;
    valid_tokens -= first_token;
#pragma unroll 1
    for (int first = token_; first < count; first += kTokensAtOnce * kStep) {
      Four<T> residuals[kTokensAtOnce] = {};
      float x_scales[kTokensAtOnce] = {};
      if (o_.residual != nullptr) {
#pragma unroll
        for (int k = 0; k < kTokensAtOnce; ++k) {
          const int i = first + k * kStep;
          if (i < count && i < valid_tokens)
            residuals[k] = *reinterpret_cast<const Four<T>*>(
                o_.residual + (first_token + i) * o_.residual_stride + feature_);
        }
      }
      if constexpr (kIsQuantized) {
#pragma unroll
        for (int k = 0; k < kTokensAtOnce; ++k) {
          const int i = first + k * kStep;
          if (i < count && i < valid_tokens) x_scales[k] = o_.x_scale[first_token + i];
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
          if (o_.residual != nullptr) {
            unpack_four<T>(residuals[k], y);
          } else {
            for (float& before : y) before = -0.0f;  // which leaves every sum as it is
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if constexpr (kIsQuantized)
              sums[c] = __fmul_rn(__fmul_rn(sums[c], x_scales[k]), weight_scale_[c]);
            const float biased = __fadd_rn(sums[c], bias_[c]);
            y[c] = add_scaled<kIsQuantized>(y[c], activate<kActivation>(biased), scale_[c]);
          }
        }
        store(first_token + i, y);
      }
    }
  }

  __device__ void store(int token, const float (&y)[4]) const {
    *reinterpret_cast<Four<T>*>(o_.out + token * o_.out_stride + feature_) = pack_four<T>(y);
  }

  // Four of the vector, or `otherwise` where there is none.
  __device__ void load_vector(const void* vector, bool is_float, float otherwise, float (&values)[4]) const {
    if (vector == nullptr) {
      for (float& value : values) value = otherwise;
    } else if (is_float) {
      load_four(static_cast<const float*>(vector) + feature_, values);
    } else {
      unpack_four<T>(*reinterpret_cast<const Four<T>*>(static_cast<const T*>(vector) + feature_), values);
    }
  }

  const Output<T>& o_;
  int token_, place_, feature_;
  float bias_[4], scale_[4], weight_scale_[4];
};

}  // namespace madtp::cuda
