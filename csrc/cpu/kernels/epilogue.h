// SPDX-License-Identifier: Apache-2.0
#pragma once

// What follows a product: sums of output features become x W^T, and get bias, activation, scale and residual.

#include <cstdint>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/dtype.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kMaxEpilogueFeatures = 256;  // at once

// M says what the sums are worth:
//   Inputs    the arguments: of Sparse24Linear, the members that are named here
//   T         the elements of the output and the residual
//   Vec value(sum, token, out_feature, load) const        sums of output features -> x W^T
//   static Vec rounded(v)                                 v; a sum of it may, or may not, be one FMA
template <typename M>
class Epilogue {
  using T = typename M::T;

 public:
  Epilogue(const M& method, const typename M::Inputs& inputs, void* out, std::int64_t out_stride)
      : method_(method), a_(inputs), out_(static_cast<T*>(out)), out_stride_(out_stride) {}

  // sums (count, stride) of the output features [first, first + out_features) -> rows of the output from
  // `token` on. Out of line, so that all kernels end in the same instructions.
  __attribute__((noinline)) void run(const float* sums, std::int64_t stride, std::int64_t token,
                                     std::int64_t count, std::int64_t first,
                                     std::int64_t out_features) const {
    float scratch[2][kMaxEpilogueFeatures];
    const float* const bias = part(a_.bias, a_.bias_dtype, first, out_features, scratch[0]);
    const float* const scale = part(a_.scale, a_.scale_dtype, first, out_features, scratch[1]);
    with_activation<T>(a_.activation, [&](auto activation) {
      for (std::int64_t t = 0; t < count; ++t) {
        const float* const row = sums + t * stride;
        T* const to = out_ + (token + t) * out_stride_ + first;
        const T* const residual = a_.residual == nullptr ? nullptr
                                                         : static_cast<const T*>(a_.residual) +
                                                               (token + t) * a_.residual_stride + first;
        for_each_vector(out_features, [&](std::int64_t i, auto load, auto store) {
          Vec y = method_.value(load(row + i), token + t, first + i, load);
          if (bias != nullptr) y += load(bias + i);
          y = activation(y);
          if (scale != nullptr) y = M::rounded(y * load(scale + i));
          if (residual != nullptr) y += load(residual + i);
          store(to + i, y);
        });
      }
    });
  }

 private:
  // A part of a vector of all output features, in float32; null where there is none.
  const float* part(const void* vector, DType dtype, std::int64_t first, std::int64_t count,
                    float* scratch) const {
    if (vector == nullptr || dtype == DType::float32)
      return vector == nullptr ? nullptr : static_cast<const float*>(vector) + first;
    for_each_vector(count, [&](std::int64_t i, auto load, auto store) {
      store(scratch + i, load(static_cast<const T*>(vector) + first + i));
    });
    return scratch;
  }

  const M& method_;
  const typename M::Inputs& a_;
  T* out_;
  std::int64_t out_stride_;
};

}  // namespace madtp::cpu::MADTP_ISA
