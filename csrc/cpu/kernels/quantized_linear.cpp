// SPDX-License-Identifier: Apache-2.0
// Weights and x in int8: the rows of x are rounded first, all of them, since every span of output features
// packs panels of them.

#include "cpu/kernels/linear.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/quantized_layout.h"
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/quantized_step.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

template <typename T_, typename Step_>
struct Int8Method {
  using Inputs = QuantizedLinear;
  using T = T_;
  using X = std::int8_t;
  using Step = Step_;
  static constexpr int kRowTokens = 0;

  const float *x_scale, *weight_scale;

  static const std::uint32_t* weights(const Unit& unit, float* scratch) {
    const std::int8_t* const bytes = static_cast<const std::int8_t*>(unit.weights());
    std::int16_t* const wide = reinterpret_cast<std::int16_t*>(scratch);
    for (int i = 0; i < unit.steps * kUnitRows * 2; ++i) wide[i] = bytes[i];
    return reinterpret_cast<const std::uint32_t*>(scratch);
  }
  template <typename Load>
  Vec value(Vec sum, std::int64_t token, std::int64_t out_feature, Load load) const {
    const Vec sums = __builtin_convertvector(bit_cast<IntVec>(sum), Vec);
    return rounded(rounded(sums * x_scale[token]) * load(weight_scale + out_feature));
  }
  static Vec rounded(Vec v) { return MADTP_ISA::rounded(v); }
};

template <typename T, typename Step>
Status run(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  const Layout layout = quantized_layout(a.out_features, a.in_features, a.sparse);
  return run_valid_rows<T>(a, out, out_stride, threads, [&](std::int64_t tokens, int threads) {
    const std::int64_t stride =
        ceil_div(a.in_features, kBlock) * kBlock + 64;  // off the strides that alias in L1
    const std::int64_t scales = ceil_div(tokens * std::int64_t(sizeof(float)), 64) * 64;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::size_t(scales + tokens * stride)) != 0) return Status::out_of_memory;
    float* const scale = static_cast<float*>(memory);
    std::int8_t* const rows = static_cast<std::int8_t*>(memory) + scales;
    constexpr std::int64_t kRowsOfTask = 8;
    for_each_task(ceil_div(tokens, kRowsOfTask), threads, [&](std::int64_t task, int) {
      const std::int64_t end = tokens < (task + 1) * kRowsOfTask ? tokens : (task + 1) * kRowsOfTask;
      for (std::int64_t t = task * kRowsOfTask; t < end; ++t)
        scale[t] = quantize_row(static_cast<const T*>(a.x) + t * a.x_stride, a.in_features, stride,
                                rows + t * stride);
    });
    const Int8Method<T, Step> method{scale, a.weight_scale};
    const Status status =
        multiply(method, a, layout, Rows<std::int8_t>{rows, stride}, tokens, out, out_stride, threads);
    std::free(memory);
    return status;
  });
}

}  // namespace

Status quantized_linear(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  Status status = Status::ok;
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    status = a.sparse ? run<T, Int8Pairs>(a, out, out_stride, threads)
                      : run<T, Int8DensePairs>(a, out, out_stride, threads);
  });
  return status;
}

}  // namespace madtp::cpu::MADTP_ISA
