// SPDX-License-Identifier: Apache-2.0
// madtp/quantized.h for Python.

#include "madtp/quantized.h"

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

std::int64_t layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse) {
  std::int64_t bytes = 0;
  check(cpu::quantized_layout_bytes(out_features, in_features, sparse, &bytes),
        "madtp::cpu::quantized_layout_bytes");
  return bytes;
}

void pack(Address values, Address indices, std::int64_t out_features, std::int64_t in_features,
          Address layout, int threads) {
  const QuantizedWeight weight{pointer<const std::int8_t>(values), pointer<const std::uint8_t>(indices),
                               out_features, in_features};
  check(cpu::quantized_pack(weight, pointer<void>(layout), threads), "madtp::cpu::quantized_pack");
}

void linear(Address x, int dtype, std::int64_t x_stride, std::int64_t tokens, Address layout, bool sparse,
            Address weight_scale, std::int64_t out_features, std::int64_t in_features, Address bias,
            int bias_dtype, int activation, Address scale, int scale_dtype, Address residual,
            std::int64_t residual_stride, Address num_rows, Address out, int threads) {
  const QuantizedLinear inputs{static_cast<DType>(dtype),
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
                               pointer<const std::int32_t>(num_rows)};
  check(cpu::quantized_linear(inputs, pointer<void>(out), out_features, threads),
        "madtp::cpu::quantized_linear");
}

}  // namespace

void bind_quantized(py::module_& cpu_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  cpu_module.def("quantized_layout_bytes", &layout_bytes);
  cpu_module.def("quantized_pack", &pack, unlocked);
  cpu_module.def("quantized_linear", &linear, unlocked);
}

}  // namespace madtp::python
