// SPDX-License-Identifier: Apache-2.0
// madtp/sparse24.h for Python.

#include "madtp/sparse24.h"

#include <optional>
#include <vector>

#include "python/common.h"
#include "python/configs.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

template <typename Function>
auto layout_bytes(Function function, const char* name) {
  return [=](std::int64_t out_features, std::int64_t in_features, int weight_dtype) {
    std::int64_t bytes = 0;
    check(function(out_features, in_features, static_cast<DType>(weight_dtype), &bytes), name);
    return bytes;
  };
}

template <typename Run, typename Function>
auto pack(Function function, const char* name) {
  return [=](Address values, int dtype, Address indices, std::int64_t out_features, std::int64_t in_features,
             Address layout, Run run) {
    const Sparse24Weight weight{static_cast<DType>(dtype), pointer<const void>(values),
                                pointer<const std::uint8_t>(indices), out_features, in_features};
    check(function(weight, pointer<void>(layout), how(run)), name);
  };
}

Sparse24Dense dense(Address weight, int dtype, std::int64_t weight_stride, Address score,
                    std::int64_t score_stride, std::int64_t out_features, std::int64_t in_features,
                    bool transposed) {
  return {static_cast<DType>(dtype),
          pointer<const void>(weight),
          weight_stride,
          pointer<const float>(score),
          score_stride,
          out_features,
          in_features,
          transposed};
}

void prune(Address weight, int dtype, std::int64_t weight_stride, Address score, std::int64_t score_stride,
           std::int64_t out_features, std::int64_t in_features, Address values, Address indices,
           int threads) {
  check(cpu::sparse24_prune(
            dense(weight, dtype, weight_stride, score, score_stride, out_features, in_features, false),
            pointer<void>(values), pointer<std::uint8_t>(indices), threads),
        "madtp::cpu::sparse24_prune");
}

Sparse24Linear inputs(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens, Address layout,
                      int weight_dtype, std::int64_t out_features, std::int64_t in_features, Address bias,
                      int bias_dtype, int activation, Address scale, int scale_dtype, Address residual,
                      std::int64_t residual_stride, Address num_rows) {
  return {static_cast<DType>(dtype),
          pointer<const void>(x),
          x_stride,
          tokens,
          pointer<const void>(layout),
          static_cast<DType>(weight_dtype),
          out_features,
          in_features,
          pointer<const void>(bias),
          static_cast<DType>(bias_dtype),
          static_cast<Activation>(activation),
          pointer<const void>(scale),
          static_cast<DType>(scale_dtype),
          pointer<const void>(residual),
          residual_stride,
          pointer<const std::int32_t>(num_rows)};
}

void linear(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens, Address layout,
            int weight_dtype, std::int64_t out_features, std::int64_t in_features, Address bias,
            int bias_dtype, int activation, Address scale, int scale_dtype, Address residual,
            std::int64_t residual_stride, Address num_rows, Address out, int threads) {
  check(cpu::sparse24_linear(
            inputs(x, dtype, x_stride, tokens, layout, weight_dtype, out_features, in_features, bias,
                   bias_dtype, activation, scale, scale_dtype, residual, residual_stride, num_rows),
            pointer<void>(out), out_features, threads),
        "madtp::cpu::sparse24_linear");
}

#if MADTP_HAS_CUDA
void cuda_prune(Address weight, int dtype, std::int64_t weight_stride, Address score,
                std::int64_t score_stride, std::int64_t out_features, std::int64_t in_features,
                bool transposed, Address values, Address indices, Address has_nan, Address stream) {
  check(cuda::sparse24_prune(
            dense(weight, dtype, weight_stride, score, score_stride, out_features, in_features, transposed),
            pointer<void>(values), pointer<std::uint8_t>(indices), pointer<std::int32_t>(has_nan),
            pointer<void>(stream)),
        "madtp::cuda::sparse24_prune");
}

std::vector<Config> cuda_configs(const Sparse24Linear& inputs) {
  return all_configs("madtp::cuda::sparse24_linear_configs",
                     [&](cuda::Sparse24Config* configs, int capacity, int* count) {
                       return cuda::sparse24_linear_configs(inputs, configs, capacity, count);
                     });
}

void cuda_linear(const Sparse24Linear& inputs, Address out, Address stream,
                 const std::optional<Config>& given) {
  const auto run = [&](const cuda::Sparse24Config* config) {
    return cuda::sparse24_linear(inputs, pointer<void>(out), inputs.out_features, pointer<void>(stream),
                                 config);
  };
  check(with_config(given, run), "madtp::cuda::sparse24_linear");
}
#endif

}  // namespace

void bind_sparse24(py::module_& cpu_module, [[maybe_unused]] py::module_* cuda_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  cpu_module.def("sparse24_layout_bytes",
                 layout_bytes(&cpu::sparse24_layout_bytes, "madtp::cpu::sparse24_layout_bytes"));
  cpu_module.def("sparse24_pack", pack<int>(&cpu::sparse24_pack, "madtp::cpu::sparse24_pack"), unlocked);
  cpu_module.def("sparse24_prune", &prune, unlocked);
  cpu_module.def("sparse24_linear", &linear, unlocked);
#if MADTP_HAS_CUDA
  cuda_module->def("sparse24_layout_bytes",
                   layout_bytes(&cuda::sparse24_layout_bytes, "madtp::cuda::sparse24_layout_bytes"));
  cuda_module->def("sparse24_pack", pack<Address>(&cuda::sparse24_pack, "madtp::cuda::sparse24_pack"),
                   unlocked);
  cuda_module->def("sparse24_prune", &cuda_prune, unlocked);
  py::class_<Sparse24Linear>(*cuda_module, "Sparse24Linear").def(py::init(&inputs));
  cuda_module->def("sparse24_linear_configs", &cuda_configs);
  cuda_module->def("sparse24_linear", &cuda_linear, unlocked);
#endif
}

}  // namespace madtp::python
