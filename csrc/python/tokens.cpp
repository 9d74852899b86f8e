// madtp/tokens.h for Python. A matrix is (address, dtype, row stride); the last argument is the number of
// threads on a CPU and the stream on a GPU.

#include "madtp/tokens.h"

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

DType dtype(int value) { return static_cast<DType>(value); }

TokenSelection token_selection(Address keep, Address cu_seqlens_in, Address cu_seqlens_out, Address source,
                               Address merge_weight, std::int64_t tokens, std::int64_t capacity,
                               std::int64_t batch) {
  return {pointer<const std::uint8_t>(keep),
          pointer<const std::int32_t>(cu_seqlens_in),
          pointer<const std::int32_t>(cu_seqlens_out),
          pointer<const std::int32_t>(source),
          pointer<const float>(merge_weight),
          tokens,
          capacity,
          batch};
}

SelectionOutputs selection_outputs(Address keep, Address cu_seqlens_out, Address source,
                                   Address merge_weight) {
  return {pointer<std::uint8_t>(keep), pointer<std::int32_t>(cu_seqlens_out), pointer<std::int32_t>(source),
          pointer<float>(merge_weight)};
}

ScoreInputs score_inputs(Address mag_logits, int logits_dtype, std::int64_t logits_stride,
                         std::int64_t alignment_tokens, Address cu_seqlens, std::int64_t tokens,
                         std::int64_t batch, Address summary_index) {
  return {pointer<const void>(mag_logits),
          dtype(logits_dtype),
          logits_stride,
          alignment_tokens,
          pointer<const std::int32_t>(cu_seqlens),
          tokens,
          batch,
          pointer<const std::int32_t>(summary_index)};
}

void token_importance(Address summary_attention, Address received_attention, const ScoreInputs& inputs,
                      Address importance, int threads) {
  check(
      cpu::token_importance(pointer<const float>(summary_attention), pointer<const float>(received_attention),
                            inputs, pointer<float>(importance), threads),
      "madtp::cpu::token_importance");
}

void select_tokens(Address importance, const ScoreInputs& inputs, double temperature,
                   const SelectionOutputs& selection, int threads) {
  check(cpu::select_tokens(pointer<const float>(importance), inputs, temperature, selection, threads),
        "madtp::cpu::select_tokens");
}

void score_and_select(Address summary_attention, Address received_attention, const ScoreInputs& inputs,
                      double temperature, Address importance, const SelectionOutputs& selection,
                      int threads) {
  check(
      cpu::score_and_select(pointer<const float>(summary_attention), pointer<const float>(received_attention),
                            inputs, temperature, pointer<float>(importance), selection, threads),
      "madtp::cpu::score_and_select");
}

// The gathers are the same on both devices but for how they run.
template <typename Run, typename Function>
auto gather_merge(Function function, const char* name) {
  return [=](Address x, int x_dtype, std::int64_t x_stride, std::int64_t channels,
             const TokenSelection& selection, Address out, Run run) {
    check(function(pointer<const void>(x), dtype(x_dtype), x_stride, channels, selection, pointer<void>(out),
                   how(run)),
          name);
  };
}

template <typename Run, typename Function>
auto gather_merge_backward(Function function, const char* name) {
  return [=](Address grad, std::int64_t grad_stride, Address x, int x_dtype, std::int64_t x_stride,
             std::int64_t channels, const TokenSelection& selection, Address grad_x, Address grad_weight,
             Run run) {
    check(function(pointer<const void>(grad), grad_stride, pointer<const void>(x), dtype(x_dtype), x_stride,
                   channels, selection, pointer<void>(grad_x), pointer<float>(grad_weight), how(run)),
          name);
  };
}

template <typename Run, typename Function>
auto gather_merge_layernorm(Function function, const char* name) {
  return [=](Address x, int x_dtype, std::int64_t x_stride, std::int64_t channels,
             const TokenSelection& selection, Address weight, Address bias, int affine_dtype, double eps,
             Address x_out, Address normed, Address mean, Address rstd, Run run) {
    check(function(pointer<const void>(x), dtype(x_dtype), x_stride, channels, selection,
                   pointer<const void>(weight), pointer<const void>(bias), dtype(affine_dtype), eps,
                   pointer<void>(x_out), pointer<void>(normed), pointer<float>(mean), pointer<float>(rstd),
                   how(run)),
          name);
  };
}

}  // namespace

void bind_tokens(py::module_& cpu_module, [[maybe_unused]] py::module_* cuda_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  // The records serve the functions of both devices.
  py::class_<TokenSelection>(cpu_module, "TokenSelection").def(py::init(&token_selection));
  py::class_<SelectionOutputs>(cpu_module, "SelectionOutputs").def(py::init(&selection_outputs));
  py::class_<ScoreInputs>(cpu_module, "ScoreInputs").def(py::init(&score_inputs));
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
