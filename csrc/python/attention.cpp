// madtp/attention.h for Python: a tensor is (address, row stride, head stride).

#include "madtp/attention.h"

#include "python/common.h"

namespace madtp::python {
namespace {

using Address = std::uintptr_t;

void varlen_attention(int dtype, Address q, std::int64_t q_row, std::int64_t q_head, Address k,
                      std::int64_t k_row, std::int64_t k_head, Address v, std::int64_t v_row,
                      std::int64_t v_head, Address cu_seqlens_q, Address cu_seqlens_k, std::int64_t rows_q,
                      std::int64_t rows_k, std::int64_t batch, std::int64_t heads, std::int64_t head_dim,
                      float softmax_scale, bool causal, Address summary_index, Address out, Address summary,
                      Address received, int threads) {
  const AttentionInputs inputs{static_cast<DType>(dtype),
                               pointer<const void>(q),
                               pointer<const void>(k),
                               pointer<const void>(v),
                               {q_row, q_head},
                               {k_row, k_head},
                               {v_row, v_head},
                               pointer<const std::int32_t>(cu_seqlens_q),
                               pointer<const std::int32_t>(cu_seqlens_k),
                               rows_q,
                               rows_k,
                               batch,
                               heads,
                               head_dim,
                               softmax_scale,
                               causal,
                               pointer<const std::int32_t>(summary_index)};
  check(cpu::varlen_attention(inputs, pointer<void>(out), pointer<float>(summary), pointer<float>(received),
                              threads),
        "madtp::cpu::varlen_attention");
}

}  // namespace

void bind_attention(py::module_& cpu_module) {
  cpu_module.def("varlen_attention", &varlen_attention, py::call_guard<py::gil_scoped_release>());
}

}  // namespace madtp::python
