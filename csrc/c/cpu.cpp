// SPDX-License-Identifier: Apache-2.0
// madtp/c_api.h on the CPU, and what it says of the library.

#include "c/records.h"

namespace cpu = madtp::cpu;
using madtp::DType;
using madtp::c::call;

const char* madtp_version() { return MADTP_VERSION; }

int madtp_version_number() { return MADTP_VERSION_NUMBER; }

int madtp_has_cuda() { return MADTP_HAS_CUDA; }

const char* madtp_status_string(madtp_status status) { return to_string(madtp::Status(status)); }

madtp_status madtp_cpu_varlen_attention(const madtp_attention_inputs* inputs, void* out, float* lse,
                                        float* summary_attention, float* received_attention, void* workspace,
                                        int threads) {
  return call(
      [&](const auto& a) {
        return cpu::varlen_attention(a, out, lse, summary_attention, received_attention, workspace, threads);
      },
      inputs);
}

madtp_status madtp_cpu_varlen_attention_workspace(const madtp_attention_inputs* inputs, int statistics,
                                                  int threads, int64_t* bytes) {
  return call(
      [&](const auto& a) { return cpu::varlen_attention_workspace(a, statistics != 0, threads, bytes); },
      inputs);
}

madtp_status madtp_cpu_varlen_attention_backward(const madtp_attention_inputs* inputs,
                                                 const madtp_attention_gradients* gradients, void* workspace,
                                                 int threads) {
  return call(
      [&](const auto& a, const auto& g) { return cpu::varlen_attention_backward(a, g, workspace, threads); },
      inputs, gradients);
}

madtp_status madtp_cpu_varlen_attention_backward_workspace(const madtp_attention_inputs* inputs,
                                                           int statistics, int threads, int64_t* bytes) {
  return call(
      [&](const auto& a) {
        return cpu::varlen_attention_backward_workspace(a, statistics != 0, threads, bytes);
      },
      inputs);
}

madtp_status madtp_cpu_attention_rows(const madtp_attention_rows_inputs* inputs, float* attention,
                                      void* workspace, int threads) {
  return call([&](const auto& a) { return cpu::attention_rows(a, attention, workspace, threads); }, inputs);
}

madtp_status madtp_cpu_attention_rows_workspace(const madtp_attention_rows_inputs* inputs, int threads,
                                                int64_t* bytes) {
  return call([&](const auto& a) { return cpu::attention_rows_workspace(a, threads, bytes); }, inputs);
}

madtp_status madtp_cpu_token_importance(const float* summary_attention, const float* received_attention,
                                        const madtp_score_inputs* inputs, float* importance, int threads) {
  return call(
      [&](const auto& a) {
        return cpu::token_importance(summary_attention, received_attention, a, importance, threads);
      },
      inputs);
}

madtp_status madtp_cpu_select_tokens(const float* importance, const madtp_score_inputs* inputs,
                                     double temperature, const madtp_selection_outputs* selection,
                                     int threads) {
  return call([&](const auto& a,
                  const auto& s) { return cpu::select_tokens(importance, a, temperature, s, threads); },
              inputs, selection);
}

madtp_status madtp_cpu_score_and_select(const float* summary_attention, const float* received_attention,
                                        const madtp_score_inputs* inputs, double temperature,
                                        float* importance, const madtp_selection_outputs* selection,
                                        int threads) {
  return call(
      [&](const auto& a, const auto& s) {
        return cpu::score_and_select(summary_attention, received_attention, a, temperature, importance, s,
                                     threads);
      },
      inputs, selection);
}

madtp_status madtp_cpu_gather_merge(const void* x, madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                    const madtp_token_selection* selection, void* out, int threads) {
  return call(
      [&](const auto& s) { return cpu::gather_merge(x, DType(dtype), x_stride, channels, s, out, threads); },
      selection);
}

madtp_status madtp_cpu_gather_merge_backward(const void* grad, int64_t grad_stride, const void* x,
                                             madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                             const madtp_token_selection* selection, void* grad_x,
                                             float* grad_weight, int threads) {
  return call(
      [&](const auto& s) {
        return cpu::gather_merge_backward(grad, grad_stride, x, DType(dtype), x_stride, channels, s, grad_x,
                                          grad_weight, threads);
      },
      selection);
}

madtp_status madtp_cpu_gather_merge_layernorm(const void* x, madtp_dtype dtype, int64_t x_stride,
                                              int64_t channels, const madtp_token_selection* selection,
                                              const void* weight, const void* bias, madtp_dtype affine_dtype,
                                              double eps, void* x_out, void* normed, float* mean, float* rstd,
                                              int threads) {
  return call(
      [&](const auto& s) {
        return cpu::gather_merge_layernorm(x, DType(dtype), x_stride, channels, s, weight, bias,
                                           DType(affine_dtype), eps, x_out, normed, mean, rstd, threads);
      },
      selection);
}

madtp_status madtp_cpu_gather_merge_rmsnorm(const void* x, madtp_dtype dtype, int64_t x_stride,
                                            int64_t channels, const madtp_token_selection* selection,
                                            const void* weight, madtp_dtype affine_dtype, double eps,
                                            void* x_out, void* normed, int threads) {
  return call(
      [&](const auto& s) {
        return cpu::gather_merge_rmsnorm(x, DType(dtype), x_stride, channels, s, weight, DType(affine_dtype),
                                         eps, x_out, normed, threads);
      },
      selection);
}

madtp_status madtp_cpu_sparse24_prune(const madtp_sparse24_dense* dense, void* values, uint8_t* indices,
                                      int threads) {
  return call([&](const auto& a) { return cpu::sparse24_prune(a, values, indices, threads); }, dense);
}

madtp_status madtp_cpu_sparse24_layout_bytes(int64_t out_features, int64_t in_features,
                                             madtp_dtype weight_dtype, int64_t* bytes) {
  return call(
      [&] { return cpu::sparse24_layout_bytes(out_features, in_features, DType(weight_dtype), bytes); });
}

madtp_status madtp_cpu_sparse24_pack(const madtp_sparse24_weight* weight, void* layout, int threads) {
  return call([&](const auto& a) { return cpu::sparse24_pack(a, layout, threads); }, weight);
}

madtp_status madtp_cpu_sparse24_linear(const madtp_sparse24_linear* inputs, void* out, int64_t out_stride,
                                       int threads) {
  return call([&](const auto& a) { return cpu::sparse24_linear(a, out, out_stride, threads); }, inputs);
}

madtp_status madtp_cpu_quantized_layout_bytes(int64_t out_features, int64_t in_features, int sparse,
                                              int64_t* bytes) {
  return call([&] {
    return cpu::quantized_layout_bytes(out_features, in_features, sparse != 0, bytes, sparse == 2);
  });
}

madtp_status madtp_cpu_quantized_pack(const madtp_quantized_weight* weight, void* layout, int threads) {
  return call([&](const auto& a) { return cpu::quantized_pack(a, layout, threads); }, weight);
}

madtp_status madtp_cpu_quantized_linear(const madtp_quantized_linear* inputs, void* out, int64_t out_stride,
                                        int threads) {
  return call([&](const auto& a) { return cpu::quantized_linear(a, out, out_stride, threads); }, inputs);
}
