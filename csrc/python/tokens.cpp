// SPDX-License-Identifier: Apache-2.0
// madtp/tokens.h for Python. A matrix is (address, dtype, row stride); the last argument is the number of
// threads on a CPU and the stream on a GPU.

#include "madtp/tokens.h"

#include <array>

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

DType dtype(int value) { return static_cast<DType>(value); }

// The fields of a struct of madtp/tokens.h in their order, as Python passes them: a tuple, since making an
// object would cost a small call more than the rest of it.
template <std::size_t kFields>
using Record = std::array<std::uintptr_t, kFields>;

std::int64_t size(std::uintptr_t value) { return static_cast<std::int64_t>(value); }

TokenSelection token_selection(const Record<8>& r) {
  return {pointer<const std::uint8_t>(r[0]),
          pointer<const std::int32_t>(r[1]),
          pointer<const std::int32_t>(r[2]),
          pointer<const std::int32_t>(r[3]),
          pointer<const float>(r[4]),
          size(r[5]),
          size(r[6]),
          size(r[7])};
}

SelectionOutputs selection_outputs(const Record<4>& r) {
  return {pointer<std::uint8_t>(r[0]), pointer<std::int32_t>(r[1]), pointer<std::int32_t>(r[2]),
          pointer<float>(r[3])};
}

ScoreInputs score_inputs(const Record<9>& r) {
  return {pointer<const void>(r[0]),
          dtype(static_cast<int>(r[1])),
          size(r[2]),
          size(r[3]),
          pointer<const std::int32_t>(r[4]),
          size(r[5]),
          size(r[6]),
          pointer<const std::int32_t>(r[7]),
          pointer<const std::uint8_t>(r[8])};
}

void token_importance(Address summary_attention, Address received_attention, const Record<9>& inputs,
                      Address importance, int threads) {
  check(
      cpu::token_importance(pointer<const float>(summary_attention), pointer<const float>(received_attention),
                            score_inputs(inputs), pointer<float>(importance), threads),
      "madtp::cpu::token_importance");
}

void select_tokens(Address importance, const Record<9>& inputs, double temperature,
                   const Record<4>& selection, int threads) {
  check(cpu::select_tokens(pointer<const float>(importance), score_inputs(inputs), temperature,
                           selection_outputs(selection), threads),
        "madtp::cpu::select_tokens");
}

void score_and_select(Address summary_attention, Address received_attention, const Record<9>& inputs,
                      double temperature, Address importance, const Record<4>& selection, int threads) {
  check(cpu::score_and_select(pointer<const float>(summary_attention),
                              pointer<const float>(received_attention), score_inputs(inputs), temperature,
                              pointer<float>(importance), selection_outputs(selection), threads),
        "madtp::cpu::score_and_select");
}

// The gathers are the same on both devices but for how they run.
template <typename Run, typename Function>
auto gather_merge(Function function, const char* name) {
  return [=](Address x, int x_dtype, std::int64_t x_stride, std::int64_t channels, const Record<8>& selection,
             Address out, Run run) {
    check(function(pointer<const void>(x), dtype(x_dtype), x_stride, channels, token_selection(selection),
                   pointer<void>(out), how(run)),
          name);
  };
}

template <typename Run, typename Function>
auto gather_merge_backward(Function function, const char* name) {
  return
      [=](Address grad, std::int64_t grad_stride, Address x, int x_dtype, std::int64_t x_stride,
          std::int64_t channels, const Record<8>& selection, Address grad_x, Address grad_weight, Run run) {
        check(function(pointer<const void>(grad), grad_stride, pointer<const void>(x), dtype(x_dtype),
                       x_stride, channels, token_selection(selection), pointer<void>(grad_x),
                       pointer<float>(grad_weight), how(run)),
              name);
      };
}

template <typename Run, typename Function>
auto gather_merge_layernorm(Function function, const char* name) {
  return [=](Address x, int x_dtype, std::int64_t x_stride, std::int64_t channels, const Record<8>& selection,
             Address weight, Address bias, int affine_dtype, double eps, Address x_out, Address normed,
             Address mean, Address rstd, Run run) {
    check(function(pointer<const void>(x), dtype(x_dtype), x_stride, channels, token_selection(selection),
                   pointer<const void>(weight), pointer<const void>(bias), dtype(affine_dtype), eps,
                   pointer<void>(x_out), pointer<void>(normed), pointer<float>(mean), pointer<float>(rstd),
                   how(run)),
          name);
  };
}

void gather_merge_rmsnorm(Address x, int x_dtype, std::int64_t x_stride, std::int64_t channels,
                          const Record<8>& selection, Address weight, int affine_dtype, double eps,
                          Address x_out, Address normed, int threads) {
  check(
      cpu::gather_merge_rmsnorm(pointer<const void>(x), dtype(x_dtype), x_stride, channels,
                                token_selection(selection), pointer<const void>(weight), dtype(affine_dtype),
                                eps, pointer<void>(x_out), pointer<void>(normed), threads),
      "madtp::cpu::gather_merge_rmsnorm");
}

}  // namespace

void bind_tokens(py::module_& cpu_module, [[maybe_unused]] py::module_* cuda_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  cpu_module.def("token_importance", &token_importance, unlocked);
  cpu_module.def("select_tokens", &select_tokens, unlocked);
  cpu_module.def("score_and_select", &score_and_select, unlocked);
  cpu_module.def("gather_merge", gather_merge<int>(&cpu::gather_merge, "madtp::cpu::gather_merge"), unlocked);
  cpu_module.def("gather_merge_backward",
                 gather_merge_backward<int>(&cpu::gather_merge_backward, "madtp::cpu::gather_merge_backward"),
                 unlocked);
  cpu_module.def(
      "gather_merge_layernorm",
      gather_merge_layernorm<int>(&cpu::gather_merge_layernorm, "madtp::cpu::gather_merge_layernorm"),
      unlocked);
  cpu_module.def("gather_merge_rmsnorm", &gather_merge_rmsnorm, unlocked);
#if MADTP_HAS_CUDA
  cuda_module->def("gather_merge", gather_merge<Address>(&cuda::gather_merge, "madtp::cuda::gather_merge"),
                   unlocked);
  cuda_module->def(
      "gather_merge_backward",
      gather_merge_backward<Address>(&cuda::gather_merge_backward, "madtp::cuda::gather_merge_backward"),
      unlocked);
  cuda_module->def(
      "gather_merge_layernorm",
      gather_merge_layernorm<Address>(&cuda::gather_merge_layernorm, "madtp::cuda::gather_merge_layernorm"),
      unlocked);
#endif
}

}  // namespace madtp::python
