// SPDX-License-Identifier: Apache-2.0
// madtp/attention.h for Python: a tensor is (address, row stride, head stride).

#include "madtp/attention.h"

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;
using Strided = std::array<std::uintptr_t, 3>;  // address, row stride, head stride

AttentionInputs inputs(int dtype, const Strided& q, const Strided& k, const Strided& v, Address cu_seqlens_q,
                       Address cu_seqlens_k, std::int64_t tokens_q, std::int64_t tokens_k, std::int64_t batch,
                       std::int64_t heads, std::int64_t head_dim, float softmax_scale, bool causal,
                       Address summary_index, std::int64_t key_heads, std::int64_t window_left,
                       std::int64_t window_right, float softcap, Address alibi_slopes,
                       std::int64_t alibi_stride) {
  const auto stride = [](std::uintptr_t value) { return static_cast<std::int64_t>(value); };
  return {static_cast<DType>(dtype),
          pointer<const void>(q[0]),
          pointer<const void>(k[0]),
          pointer<const void>(v[0]),
          {stride(q[1]), stride(q[2])},
          {stride(k[1]), stride(k[2])},
          {stride(v[1]), stride(v[2])},
          pointer<const std::int32_t>(cu_seqlens_q),
          pointer<const std::int32_t>(cu_seqlens_k),
          tokens_q,
          tokens_k,
          batch,
          heads,
          head_dim,
          softmax_scale,
          causal,
          pointer<const std::int32_t>(summary_index),
          key_heads,
          window_left,
          window_right,
          softcap,
          pointer<const float>(alibi_slopes),
          alibi_stride};
}

void varlen_attention(const AttentionInputs& inputs, Address out, Address lse, Address summary_attention,
                      Address received_attention, Address workspace, int threads) {
  check(cpu::varlen_attention(inputs, pointer<void>(out), pointer<float>(lse),
                              pointer<float>(summary_attention), pointer<float>(received_attention),
                              pointer<void>(workspace), threads),
        "madtp::cpu::varlen_attention");
}

void varlen_attention_backward(const AttentionInputs& inputs, Address out, Address lse, Address grad_out,
                               Address grad_summary_attention, Address grad_received_attention,
                               Address grad_q, Address grad_k, Address grad_v, Address workspace,
                               int threads) {
  const cpu::AttentionGradients gradients{pointer<const void>(out),
                                          pointer<const float>(lse),
                                          pointer<const void>(grad_out),
                                          pointer<const float>(grad_summary_attention),
                                          pointer<const float>(grad_received_attention),
                                          pointer<void>(grad_q),
                                          pointer<void>(grad_k),
                                          pointer<void>(grad_v)};
  check(cpu::varlen_attention_backward(inputs, gradients, pointer<void>(workspace), threads),
        "madtp::cpu::varlen_attention_backward");
}

template <Status (*size)(const AttentionInputs&, bool, int, std::int64_t*)>
std::int64_t workspace(const AttentionInputs& inputs, bool statistics, int threads) {
  std::int64_t bytes = 0;
  check(size(inputs, statistics, threads, &bytes), "madtp::cpu::varlen_attention");
  return bytes;
}

}  // namespace

void bind_attention(py::module_& cpu_module) {
  py::class_<AttentionInputs>(cpu_module, "AttentionInputs").def(py::init(&inputs));
  cpu_module.def("varlen_attention", &varlen_attention, py::call_guard<py::gil_scoped_release>());
  cpu_module.def("varlen_attention_backward", &varlen_attention_backward,
                 py::call_guard<py::gil_scoped_release>());
  cpu_module.def("varlen_attention_workspace", &workspace<cpu::varlen_attention_workspace>);
  cpu_module.def("varlen_attention_backward_workspace", &workspace<cpu::varlen_attention_backward_workspace>);
}

}  // namespace madtp::python
