// SPDX-License-Identifier: Apache-2.0
// Weights and x in floating point.

#include "cpu/kernels/linear.h"
#include "cpu/kernels/sparse24.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// How weights of type W multiply x of type T_: where the CPU has dot products of bfloat16, with these.
template <typename T_, typename W>
struct Steps {
  using Step = Product;
  using LookUp = ProductLookUp<W>;
};

#if defined(__AVX512BF16__)
template <>
struct Steps<BFloat16, BFloat16> {
  using Step = Dot;
  using LookUp = DotLookUp;
};
#endif

template <typename T_, typename W>
struct FloatMethod : Steps<T_, W> {
  using Inputs = Sparse24Linear;
  using T = T_;
  using X = T_;
  using Step = typename Steps<T_, W>::Step;
  static constexpr int kRowTokens = kMaxRowTokens;

  static const typename Step::Weight* weights(const Unit& unit, [[maybe_unused]] float* scratch) {
    using Weight = typename Step::Weight;
    if constexpr (sizeof(W) == sizeof(float) || !std::is_same_v<Weight, float>) {
      return static_cast<const Weight*>(unit.weights());
    } else {
      const W* const weights = static_cast<const W*>(unit.weights());
      for (int i = 0; i < unit.steps * kUnitRows; i += kWidth) store(scratch + i, load(weights + i));
      return scratch;
    }
  }
  template <typename Load>
  Vec value(Vec sum, std::int64_t, std::int64_t, Load) const {
    return sum;
  }
  static Vec rounded(Vec v) { return v; }
};

template <typename T, typename W>
Status run(const Sparse24Linear& a, void* out, std::int64_t out_stride, int threads) {
  const Layout layout(a.out_features, a.in_features, step_of(a.weight_dtype));
  return run_valid_rows<T>(a, out, out_stride, threads, [&](std::int64_t tokens, int threads) {
    const Rows<T> x{static_cast<const T*>(a.x), a.x_stride};
    return multiply(FloatMethod<T, W>(), a, layout, x, tokens, out, out_stride, threads);
  });
}

}  // namespace

Status sparse24_linear(const Sparse24Linear& a, void* out, std::int64_t out_stride, int threads) {
  Status status = Status::ok;
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    status = a.weight_dtype == DType::float32 ? run<T, float>(a, out, out_stride, threads)
                                              : run<T, T>(a, out, out_stride, threads);
  });
  return status;
}

}  // namespace madtp::cpu::MADTP_ISA
