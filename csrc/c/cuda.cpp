// SPDX-License-Identifier: Apache-2.0
// madtp/c_api.h on a GPU.

#include "c/records.h"

#if MADTP_HAS_CUDA
#include <algorithm>
#include <vector>

namespace cuda = madtp::cuda;
using madtp::DType;
using madtp::c::call;

namespace {

// Writes the first of all configurations that find(to, room, found, records...) knows, and how many there
// are.
template <class Find, class... Given>
madtp_status list_configs(madtp_sparse24_config* configs, int capacity, int* count, Find find,
                          const Given*... given) {
  if (capacity < 0 || count == nullptr) return MADTP_STATUS_INVALID_ARGUMENT;
  if (capacity > 0 && (configs == nullptr || configs->struct_size != sizeof *configs))
    return MADTP_STATUS_INVALID_ARGUMENT;
  return call(
      [&](const auto&... a) {
        int found = 0;
        madtp::Status status = find(nullptr, 0, &found, a...);
        if (status != madtp::Status::ok) return status;
        std::vector<cuda::Sparse24Config> all(std::max(found, 1));
        status = find(all.data(), found, &found, a...);
        if (status != madtp::Status::ok) return status;
        for (int i = 0; i < std::min(capacity, found); ++i)
          configs[i] = {sizeof *configs, all[i].architecture, all[i].tile_tokens, all[i].tile_out_features,
                        all[i].cluster};
        *count = found;
        return status;
      },
      given...);
}

}  // namespace

madtp_status madtp_cuda_gather_merge(const void* x, madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                     const madtp_token_selection* selection, void* out, void* stream) {
  return call(
      [&](const auto& s) { return cuda::gather_merge(x, DType(dtype), x_stride, channels, s, out, stream); },
      selection);
}

madtp_status madtp_cuda_gather_merge_backward(const void* grad, int64_t grad_stride, const void* x,
                                              madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                              const madtp_token_selection* selection, void* grad_x,
                                              float* grad_weight, void* stream) {
  return call(
      [&](const auto& s) {
        return cuda::gather_merge_backward(grad, grad_stride, x, DType(dtype), x_stride, channels, s, grad_x,
                                           grad_weight, stream);
      },
      selection);
}

madtp_status madtp_cuda_gather_merge_layernorm(const void* x, madtp_dtype dtype, int64_t x_stride,
                                               int64_t channels, const madtp_token_selection* selection,
                                               const void* weight, const void* bias, madtp_dtype affine_dtype,
                                               double eps, void* x_out, void* normed, float* mean,
                                               float* rstd, void* stream) {
  return call(
      [&](const auto& s) {
        return cuda::gather_merge_layernorm(x, DType(dtype), x_stride, channels, s, weight, bias,
                                            DType(affine_dtype), eps, x_out, normed, mean, rstd, stream);
      },
      selection);
}

madtp_status madtp_cuda_varlen_attention(const madtp_attention_inputs* inputs, int64_t max_seqlen_q,
                                         int64_t max_seqlen_k, void* out, float* lse,
                                         float* summary_attention, float* received_attention, void* workspace,
                                         void* stream) {
  return call(
      [&](const auto& a) {
        return cuda::varlen_attention(a, max_seqlen_q, max_seqlen_k, out, lse, summary_attention,
                                      received_attention, workspace, stream);
      },
      inputs);
}

madtp_status madtp_cuda_varlen_attention_workspace(const madtp_attention_inputs* inputs, int64_t max_seqlen_q,
                                                   int64_t max_seqlen_k, int statistics, int64_t* bytes) {
  return call(
      [&](const auto& a) {
        return cuda::varlen_attention_workspace(a, max_seqlen_q, max_seqlen_k, statistics != 0, bytes);
      },
      inputs);
}

madtp_status madtp_cuda_attention_rows(const madtp_attention_rows_inputs* inputs, float* attention,
                                       void* workspace, void* stream) {
  return call([&](const auto& a) { return cuda::attention_rows(a, attention, workspace, stream); }, inputs);
}

madtp_status madtp_cuda_attention_rows_workspace(const madtp_attention_rows_inputs* inputs, int64_t* bytes) {
  return call([&](const auto& a) { return cuda::attention_rows_workspace(a, bytes); }, inputs);
}

madtp_status madtp_cuda_token_importance(const float* summary_attention, const float* received_attention,
                                         const madtp_score_inputs* inputs, float* importance, void* workspace,
                                         void* stream) {
  return call(
      [&](const auto& a) {
        return cuda::token_importance(summary_attention, received_attention, a, importance, workspace,
                                      stream);
      },
      inputs);
}

madtp_status madtp_cuda_select_tokens(const float* importance, const madtp_score_inputs* inputs,
                                      double temperature, const madtp_selection_outputs* selection,
                                      void* workspace, void* stream) {
  return call(
      [&](const auto& a, const auto& s) {
        return cuda::select_tokens(importance, a, temperature, s, workspace, stream);
      },
      inputs, selection);
}

madtp_status madtp_cuda_score_and_select(const float* summary_attention, const float* received_attention,
                                         const madtp_score_inputs* inputs, double temperature,
                                         float* importance, const madtp_selection_outputs* selection,
                                         void* workspace, void* stream) {
  return call(
      [&](const auto& a, const auto& s) {
        return cuda::score_and_select(summary_attention, received_attention, a, temperature, importance, s,
                                      workspace, stream);
      },
      inputs, selection);
}

madtp_status madtp_cuda_score_workspace(const madtp_score_inputs* inputs, int64_t* bytes) {
  return call([&](const auto& a) { return cuda::score_workspace(a, bytes); }, inputs);
}

madtp_status madtp_cuda_sparse24_prune(const madtp_sparse24_dense* dense, void* values, uint8_t* indices,
                                       int32_t* has_nan, void* stream) {
  return call([&](const auto& a) { return cuda::sparse24_prune(a, values, indices, has_nan, stream); },
              dense);
}

madtp_status madtp_cuda_sparse24_layout_bytes(int64_t out_features, int64_t in_features,
                                              madtp_dtype weight_dtype, int64_t* bytes) {
  return call(
      [&] { return cuda::sparse24_layout_bytes(out_features, in_features, DType(weight_dtype), bytes); });
}

madtp_status madtp_cuda_sparse24_pack(const madtp_sparse24_weight* weight, void* layout, void* stream) {
  return call([&](const auto& a) { return cuda::sparse24_pack(a, layout, stream); }, weight);
}

madtp_status madtp_cuda_sparse24_linear_configs(const madtp_sparse24_linear* inputs,
                                                madtp_sparse24_config* configs, int capacity, int* count) {
  return list_configs(
      configs, capacity, count,
      [](cuda::Sparse24Config* to, int room, int* found, const auto&... a) {
        return cuda::sparse24_linear_configs(a..., to, room, found);
      },
      inputs);
}

madtp_status madtp_cuda_sparse24_linear(const madtp_sparse24_linear* inputs, void* out, int64_t out_stride,
                                        void* stream, const madtp_sparse24_config* config) {
  if (config == nullptr)
    return call([&](const auto& a) { return cuda::sparse24_linear(a, out, out_stride, stream, nullptr); },
                inputs);
  return call(
      [&](const auto& a, const cuda::Sparse24Config& c) {
        return cuda::sparse24_linear(a, out, out_stride, stream, &c);
      },
      inputs, config);
}

madtp_status madtp_cuda_quantize_rows(madtp_dtype dtype, const void* x, int64_t x_stride, int64_t tokens,
                                      int64_t in_features, const int32_t* num_rows,
                                      const madtp_quantized_rows* rows, void* stream) {
  return call(
      [&](const auto& r) {
        return cuda::quantize_rows(DType(dtype), x, x_stride, tokens, in_features, num_rows, r, stream);
      },
      rows);
}

madtp_status madtp_cuda_quantized_layout_bytes(int64_t out_features, int64_t in_features, int64_t* bytes) {
  return call([&] { return cuda::quantized_layout_bytes(out_features, in_features, bytes); });
}

madtp_status madtp_cuda_quantized_pack(const madtp_quantized_weight* weight, void* layout, void* stream) {
  return call([&](const auto& a) { return cuda::quantized_pack(a, layout, stream); }, weight);
}

madtp_status madtp_cuda_quantized_linear_configs(const madtp_quantized_linear* inputs,
                                                 const madtp_quantized_rows* rows,
                                                 madtp_sparse24_config* configs, int capacity, int* count) {
  return list_configs(
      configs, capacity, count,
      [](cuda::Sparse24Config* to, int room, int* found, const auto&... a) {
        return cuda::quantized_linear_configs(a..., to, room, found);
      },
      inputs, rows);
}

madtp_status madtp_cuda_quantized_linear(const madtp_quantized_linear* inputs,
                                         const madtp_quantized_rows* rows, void* out, int64_t out_stride,
                                         void* stream, const madtp_sparse24_config* config) {
  if (config == nullptr)
    return call([&](const auto& a,
                    const auto& r) { return cuda::quantized_linear(a, r, out, out_stride, stream, nullptr); },
                inputs, rows);
  return call(
      [&](const auto& a, const auto& r, const cuda::Sparse24Config& c) {
        return cuda::quantized_linear(a, r, out, out_stride, stream, &c);
      },
      inputs, rows, config);
}
#endif
