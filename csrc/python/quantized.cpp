// SPDX-License-Identifier: Apache-2.0
// madtp/quantized.h for Python.

#include "madtp/quantized.h"

#include <optional>
#include <vector>

#include "python/common.h"
#include "python/configs.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

std::int64_t layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse, bool many_rows) {
  std::int64_t bytes = 0;
  check(cpu::quantized_layout_bytes(out_features, in_features, sparse, &bytes, many_rows),
        "madtp::cpu::quantized_layout_bytes");
  return bytes;
}

QuantizedWeight weight_of(Address values, Address indices, std::int64_t out_features,
                          std::int64_t in_features, bool many_rows = false) {
  return {pointer<const std::int8_t>(values), pointer<const std::uint8_t>(indices), out_features, in_features,
          many_rows};
}

void pack(Address values, Address indices, std::int64_t out_features, std::int64_t in_features,
          bool many_rows, Address layout, int threads) {
  check(cpu::quantized_pack(weight_of(values, indices, out_features, in_features, many_rows),
                            pointer<void>(layout), threads),
        "madtp::cpu::quantized_pack");
}

QuantizedLinear inputs(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens, Address layout,
                       bool sparse, Address weight_scale, std::int64_t out_features, std::int64_t in_features,
                       Address bias, int bias_dtype, int activation, Address scale, int scale_dtype,
                       Address residual, std::int64_t residual_stride, Address num_rows,
                       bool many_rows = false) {
  return {static_cast<DType>(dtype),
          pointer<const void>(x),
          x_stride,
          tokens,
          pointer<const void>(layout),
          sparse,
          pointer<const float>(weight_scale),
          out_features,
          in_features,
          pointer<const void>(bias),
          static_cast<DType>(bias_dtype),
          static_cast<Activation>(activation),
          pointer<const void>(scale),
          static_cast<DType>(scale_dtype),
          pointer<const void>(residual),
          residual_stride,
          pointer<const std::int32_t>(num_rows),
          many_rows};
}

void linear(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens, Address layout, bool sparse,
            Address weight_scale, std::int64_t out_features, std::int64_t in_features, Address bias,
            int bias_dtype, int activation, Address scale, int scale_dtype, Address residual,
            std::int64_t residual_stride, Address num_rows, bool many_rows, Address out, int threads) {
  check(cpu::quantized_linear(inputs(x, dtype, x_stride, tokens, layout, sparse, weight_scale, out_features,
                                     in_features, bias, bias_dtype, activation, scale, scale_dtype, residual,
                                     residual_stride, num_rows, many_rows),
                              pointer<void>(out), out_features, threads),
        "madtp::cpu::quantized_linear");
}

#if MADTP_HAS_CUDA
std::int64_t cuda_layout_bytes(std::int64_t out_features, std::int64_t in_features) {
  std::int64_t bytes = 0;
  check(cuda::quantized_layout_bytes(out_features, in_features, &bytes),
        "madtp::cuda::quantized_layout_bytes");
  return bytes;
}

void cuda_pack(Address values, Address indices, std::int64_t out_features, std::int64_t in_features,
               Address layout, Address stream) {
  check(cuda::quantized_pack(weight_of(values, indices, out_features, in_features), pointer<void>(layout),
                             pointer<void>(stream)),
        "madtp::cuda::quantized_pack");
}

cuda::QuantizedRows rows_of(Address values, int type, std::int64_t stride, Address scale) {
  return {static_cast<cuda::QuantizedType>(type), pointer<void>(values), stride, pointer<float>(scale)};
}

void cuda_quantize_rows(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens,
                        std::int64_t in_features, Address num_rows, Address values, int type,
                        std::int64_t stride, Address scale, Address stream) {
  check(cuda::quantize_rows(static_cast<DType>(dtype), pointer<const void>(x), x_stride, tokens, in_features,
                            pointer<const std::int32_t>(num_rows), rows_of(values, type, stride, scale),
                            pointer<void>(stream)),
        "madtp::cuda::quantize_rows");
}

// A layer of quantised rows: madtp::QuantizedLinear without its x.
struct QuantizedRowsLinear {
  QuantizedLinear inputs;
  cuda::QuantizedRows rows;
};

QuantizedRowsLinear rows_linear(Address values, int type, std::int64_t stride, Address x_scale, int dtype,
                                std::int64_t tokens, Address layout, Address weight_scale,
                                std::int64_t out_features, std::int64_t in_features, Address bias,
                                int bias_dtype, int activation, Address scale, int scale_dtype,
                                Address residual, std::int64_t residual_stride, Address num_rows) {
  return {inputs(0, dtype, 0, tokens, layout, true, weight_scale, out_features, in_features, bias, bias_dtype,
                 activation, scale, scale_dtype, residual, residual_stride, num_rows),
          rows_of(values, type, stride, x_scale)};
}

std::vector<Config> cuda_configs(const QuantizedRowsLinear& call) {
  return all_configs(
      "madtp::cuda::quantized_linear_configs", [&](cuda::Sparse24Config* configs, int capacity, int* count) {
        return cuda::quantized_linear_configs(call.inputs, call.rows, configs, capacity, count);
      });
}

void cuda_linear(const QuantizedRowsLinear& call, Address out, Address stream,
                 const std::optional<Config>& given) {
  const auto run = [&](const cuda::Sparse24Config* config) {
    return cuda::quantized_linear(call.inputs, call.rows, pointer<void>(out), call.inputs.out_features,
                                  pointer<void>(stream), config);
  };
  check(with_config(given, run), "madtp::cuda::quantized_linear");
}
#endif

}  // namespace

void bind_quantized(py::module_& cpu_module, [[maybe_unused]] py::module_* cuda_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  cpu_module.def("quantized_layout_bytes", &layout_bytes);
  cpu_module.def("quantized_pack", &pack, unlocked);
  cpu_module.def("quantized_linear", &linear, unlocked);
#if MADTP_HAS_CUDA
  cuda_module->def("quantized_layout_bytes", &cuda_layout_bytes);
  cuda_module->def("quantized_pack", &cuda_pack, unlocked);
  cuda_module->def("quantize_rows", &cuda_quantize_rows, unlocked);
  py::class_<QuantizedRowsLinear>(*cuda_module, "QuantizedRowsLinear").def(py::init(&rows_linear));
  cuda_module->def("quantized_linear_configs", &cuda_configs);
  cuda_module->def("quantized_linear", &cuda_linear, unlocked);
#endif
}

}  // namespace madtp::python
