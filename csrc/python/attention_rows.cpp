// SPDX-License-Identifier: Apache-2.0
// madtp/attention_rows.h for Python: a tensor is (address, row stride, head stride).

#include "madtp/attention_rows.h"

#include <array>

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;
using Strided = std::array<std::uintptr_t, 3>;  // address, row stride, head stride

AttentionRowsInputs inputs(int dtype, const Strided& q_rows, const Strided& k, Address cu_seqlens_q,
                           Address cu_seqlens_k, std::int64_t rows, std::int64_t tokens, std::int64_t batch,
                           std::int64_t heads, std::int64_t key_heads, std::int64_t head_dim,
                           float softmax_scale, Address row_position) {
  const auto stride = [](std::uintptr_t value) { return static_cast<std::int64_t>(value); };
  return {static_cast<DType>(dtype),
          pointer<const void>(q_rows[0]),
          pointer<const void>(k[0]),
          {stride(q_rows[1]), stride(q_rows[2])},
          {stride(k[1]), stride(k[2])},
          pointer<const std::int32_t>(cu_seqlens_q),
          pointer<const std::int32_t>(cu_seqlens_k),
          rows,
          tokens,
          batch,
          heads,
          key_heads,
          head_dim,
          softmax_scale,
          pointer<const std::int32_t>(row_position)};
}

void attention_rows(const AttentionRowsInputs& inputs, Address attention, Address workspace, int threads) {
  check(cpu::attention_rows(inputs, pointer<float>(attention), pointer<void>(workspace), threads),
        "madtp::cpu::attention_rows");
}

std::int64_t workspace(const AttentionRowsInputs& inputs, int threads) {
  std::int64_t bytes = 0;
  check(cpu::attention_rows_workspace(inputs, threads, &bytes), "madtp::cpu::attention_rows");
  return bytes;
}

}  // namespace

void bind_attention_rows(py::module_& cpu_module) {
  py::class_<AttentionRowsInputs>(cpu_module, "AttentionRowsInputs").def(py::init(&inputs));
  cpu_module.def("attention_rows", &attention_rows, py::call_guard<py::gil_scoped_release>());
  cpu_module.def("attention_rows_workspace", &workspace);
}

}  // namespace madtp::python
