// madtp/sparse24.h for Python.

#include "madtp/sparse24.h"

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

std::int64_t layout_bytes(std::int64_t features, std::int64_t channels, int weight_dtype) {
  std::int64_t bytes = 0;
  check(cpu::sparse24_layout_bytes(features, channels, static_cast<DType>(weight_dtype), &bytes),
        "madtp::cpu::sparse24_layout_bytes");
  return bytes;
}

void pack(Address values, int dtype, Address indices, std::int64_t features, std::int64_t channels,
          Address layout, int threads) {
  const Sparse24Weight weight{static_cast<DType>(dtype), pointer<const void>(values),
                              pointer<const std::uint8_t>(indices), features, channels};
  check(cpu::sparse24_pack(weight, pointer<void>(layout), threads), "madtp::cpu::sparse24_pack");
}

void prune(Address weight, int dtype, std::int64_t weight_stride, Address score, std::int64_t score_stride,
           std::int64_t features, std::int64_t channels, Address values, Address indices, int threads) {
  const Sparse24Dense dense{static_cast<DType>(dtype),
                            pointer<const void>(weight),
                            weight_stride,
                            pointer<const float>(score),
                            score_stride,
                            features,
                            channels};
  check(cpu::sparse24_prune(dense, pointer<void>(values), pointer<std::uint8_t>(indices), threads),
        "madtp::cpu::sparse24_prune");
}

void linear(Address x, int dtype, std::int64_t x_stride, std::int64_t rows, Address layout, int weight_dtype,
            std::int64_t features, std::int64_t channels, Address bias, int bias_dtype, int activation,
            Address scale, int scale_dtype, Address residual, std::int64_t residual_stride, Address total,
            Address out, int threads) {
  const Sparse24Linear inputs{static_cast<DType>(dtype),
                              pointer<const void>(x),
                              x_stride,
                              rows,
                              pointer<const void>(layout),
                              static_cast<DType>(weight_dtype),
                              features,
                              channels,
                              pointer<const void>(bias),
                              static_cast<DType>(bias_dtype),
                              static_cast<Activation>(activation),
                              pointer<const void>(scale),
                              static_cast<DType>(scale_dtype),
                              pointer<const void>(residual),
                              residual_stride,
                              pointer<const std::int32_t>(total)};
  check(cpu::sparse24_linear(inputs, pointer<void>(out), features, threads), "madtp::cpu::sparse24_linear");
}

}  // namespace

void bind_sparse24(py::module_& cpu_module) {
  const py::call_guard<py::gil_scoped_release> unlocked{};
  cpu_module.def("sparse24_layout_bytes", &layout_bytes);
  cpu_module.def("sparse24_pack", &pack, unlocked);
  cpu_module.def("sparse24_prune", &prune, unlocked);
  cpu_module.def("sparse24_linear", &linear, unlocked);
}

}  // namespace madtp::python
