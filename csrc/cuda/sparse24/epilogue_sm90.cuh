// SPDX-License-Identifier: Apache-2.0
#pragma once

// The epilogue on accumulators, where epilogue.cuh has it on staged rows: a lane has two output features of a
// slab, so their bias and scale are four registers, and values are rounded before they are moved. stmatrix
// turns the fragments over into rows of 16 output features, and ldmatrix turns those of the residual.
//
// A warp writes by itself: nobody waits for another warp.

#include "cuda/ptx_sm90.cuh"
#include "cuda/sparse24/epilogue.cuh"

namespace madtp::cuda {

// One lane of a warp that writes the rows of a slab of output features, kTokens tokens at a time.
template <typename T, bool kIsQuantized, int kTokens_ = 32>
class SlabWriter {
 public:
  static constexpr int kTokens = kTokens_, kGroups = kTokens / 16;  // in groups of 16, four matrices
  static constexpr int kSums = kTokens / 2;                         // that a lane has of them
  static constexpr bool kLoadsScales = kTokens == 32;               // ahead; else there is no register for it
  static constexpr int kRowBytes = kSlabRows * 2, kGroupBytes = 16 * kRowBytes;
  static constexpr int kStagedBytes = kGroups * kGroupBytes;

  // From (`first_token`, `first_feature`) on. `staged`: kStagedBytes of shared memory of this warp.
  __device__ SlabWriter(const Output<T>& output, int first_token, int first_feature, unsigned char* staged,
                        int lane)
      : o_(&output),
        token_(first_token + lane / 2),
        fragment_(ptx::shared_address(staged) + offset(lane / 16 * 8 + lane % 8, lane / 8 % 2)),
        row_(staged + offset(lane / 2, lane % 2)) {
    const int feature = first_feature + lane % 2 * 8;
    out_ = output.out + token_ * output.out_stride + feature;
    if (output.residual != nullptr) residual_ = output.residual + token_ * output.residual_stride + feature;
    if (feature >= output.out_features) token_ = kNowhere;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_feature + half * 8 + lane / 4;
      const bool is_there = row < output.out_features;
      bias_[half] =
          is_there ? one_of(output.bias, output.bias_is_float, row, -0.0f) : 0;  // -0 changes no sum
      scale_[half] = is_there ? one_of(output.scale, output.scale_is_float, row, 1) : 0;
      if constexpr (kIsQuantized) weight_scale_[half] = is_there ? output.weight_scale[row] : 0;
    }
  }

  // Asks for what the next kTokens tokens, from `first_token` on, need: the scales of rows of x, and the
  // residual.
  __device__ void load(int first_token, int valid_tokens) {
    if constexpr (kIsQuantized && kLoadsScales) next_x_scale_ = x_scale_of(first_token, valid_tokens);
    if (residual_ == nullptr) return;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const T* const from = residual_ + group * 16 * o_->residual_stride;
      residuals_[group] =
          token_ + group * 16 < valid_tokens ? *reinterpret_cast<const uint4*>(from) : uint4{};
    }
  }

  // What is done to the sums of kTokens tokens in the branch that calls it: their bias is added, or of
  // quantised operands they become float32.
  template <typename Sum>
  __device__ void take(const Sum* sums, float (&taken)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if constexpr (kIsQuantized) {
        taken[i] = ptx::to_float_here(sums[i]);
      } else {
        taken[i] = ptx::add_here(sums[i], bias_[i / 2 % 2]);
      }
    }
  }

  // Writes the next kTokens tokens, from `first_token` on, of which `take` has taken the sums; those from
  // `valid_tokens` on are zeros. Asks for what those after them need.
  template <Activation kActivation>
  __device__ void write(const float (&taken)[kSums], int first_token, int valid_tokens, bool has_next) {
    __syncwarp();  // what was staged before was read
    if (residual_ != nullptr) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) staged(group) = residuals_[group];
      __syncwarp();
      residual_ += kTokens * o_->residual_stride;
    }
    const int token = token_;
    token_ += kTokens;
    const float x_scale =
        kIsQuantized && !kLoadsScales ? x_scale_of(first_token, valid_tokens) : next_x_scale_;
    if (has_next) load(first_token + kTokens, valid_tokens);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const std::uint32_t at = fragment_ + std::uint32_t(group * kGroupBytes);
      std::uint32_t words[4] = {kNoResidual, kNoResidual, kNoResidual, kNoResidual};
      if (residual_ != nullptr) ptx::ldmatrix_x4_trans(words, at);
      float2 scales = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // two tokens of a feature
        if (kIsQuantized && i % 2 == 0) scales = scales_of(x_scale, group * 2 + i / 2);
        const float2 before = two_of(words[i]);
        const float* const sums = taken + (group * 4 + i) * 2;
        words[i] = rounded(finish<kActivation>(before.x, sums[0], scales.x, i % 2),
                           finish<kActivation>(before.y, sums[1], scales.y, i % 2));
      }
      ptx::stmatrix_x4_trans(at, words);
    }
    __syncwarp();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const bool is_valid = token + group * 16 < valid_tokens;
      store(token, group, is_valid ? staged(group) : uint4{});
    }
    out_ += kTokens * o_->out_stride;
  }

  // Zeros in the next kTokens tokens.
  __device__ void clear() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) store(token_, group, {});
    token_ += kTokens;
    out_ += kTokens * o_->out_stride;
  }

 private:
  static constexpr std::uint32_t kNoResidual = 0x80008000;  // -0 twice, which leaves every sum as it is
  static constexpr int kNowhere = 1 << 30;  // past every token, and far from where a sum would overflow

  // Of 16 bytes of a row: chunks trade places every four rows, so that the 8 rows of a matrix lie in all
  // banks.
  __device__ static int offset(int token, int chunk) {
    return token * kRowBytes + (chunk ^ (token / 4 % 2)) * 16;
  }

  __device__ uint4& staged(int group) const { return *reinterpret_cast<uint4*>(row_ + group * kGroupBytes); }

  __device__ void store(int token, int group, const uint4& words) const {
    if (token + group * 16 < o_->tokens)
      *reinterpret_cast<uint4*>(out_ + group * 16 * o_->out_stride) = words;
  }

  // That of a row, of those from `first_token` on, for each lane.
  __device__ float x_scale_of(int first_token, int valid_tokens) const {
    const int token = first_token + int(threadIdx.x) % kTokens;
    return token < valid_tokens ? o_->x_scale[token] : 0;
  }

  // Of the two tokens of the `eight`-th eight whose sums this lane has; each lane has loaded that of one
  // token.
  __device__ static float2 scales_of(float x_scale, int eight) {
    const int first = eight * 8 + int(threadIdx.x) % 4 * 2;
    return make_float2(__shfl_sync(kAllLanes, x_scale, first), __shfl_sync(kAllLanes, x_scale, first + 1));
  }

  template <Activation kActivation>
  __device__ float finish(float before, float taken, float x_scale, int half) const {
    if constexpr (kIsQuantized)
      taken = __fadd_rn(__fmul_rn(__fmul_rn(taken, x_scale), weight_scale_[half]), bias_[half]);
    return add_scaled<kIsQuantized>(before, activate<kActivation>(taken), scale_[half]);
  }

  __device__ static float one_of(const void* vector, bool is_float, int feature, float otherwise) {
    if (vector == nullptr) return otherwise;
    return is_float ? static_cast<const float*>(vector)[feature]
                    : to_float(static_cast<const T*>(vector)[feature]);
  }

  __device__ static float2 two_of(std::uint32_t word) {
    Pair<T> pair;
    memcpy(&pair, &word, sizeof pair);
    return to_float2(pair);
  }

  __device__ static std::uint32_t rounded(float a, float b) {
    Pair<T> pair;
    round_to(a, b, pair);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }

  const Output<T>* o_;
  T* out_;                       // 8 output features of the token that this lane stores next
  const T* residual_ = nullptr;  // likewise, what it loads; null where there is none
  int token_;
  std::uint32_t fragment_;
  unsigned char* row_;
  float bias_[2], scale_[2], weight_scale_[2];  // of the output features whose sums it has
  float next_x_scale_ = 0;                      // of one of the tokens that it writes next, by lane
  uint4 residuals_[kGroups] = {};
};

}  // namespace madtp::cuda
