// SPDX-License-Identifier: Apache-2.0
#pragma once

// The structs of the C ABI as those of C++.

#include <cstddef>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/c_api.h"
#include "madtp/quantized.h"
#include "madtp/sparse24.h"
#include "madtp/tokens.h"

namespace madtp::c {

// The bytes that a struct had in the version that brought it: where one grows, this stays, in a
// specialisation.
template <class T>
constexpr std::size_t first_size = sizeof(T);
template <>
inline constexpr std::size_t first_size<madtp_quantized_weight> = offsetof(madtp_quantized_weight, many_rows);

template <class T, class = void>
struct HasReserved : std::false_type {};
template <class T>
struct HasReserved<T, std::void_t<decltype(T::reserved)>> : std::true_type {};

// Copies a struct; of one of an earlier version what it lacks is zeros. Whether it is of a size that is
// known.
template <class T>
bool read(const T* given, T* copy) {
  if (given == nullptr || given->struct_size < first_size<T> || given->struct_size > sizeof(T)) return false;
  std::memcpy(copy, given, given->struct_size);
  if constexpr (HasReserved<T>::value)
    if (copy->reserved != 0) return false;
  return true;
}

inline AttentionInputs converted(const madtp_attention_inputs& a) {
  AttentionInputs to{};
  to.dtype = DType(a.dtype);
  to.q = a.q, to.k = a.k, to.v = a.v;
  for (int i = 0; i < 2; ++i) {
    to.q_strides[i] = a.q_strides[i];
    to.k_strides[i] = a.k_strides[i];
    to.v_strides[i] = a.v_strides[i];
  }
  to.cu_seqlens_q = a.cu_seqlens_q, to.cu_seqlens_k = a.cu_seqlens_k;
  to.tokens_q = a.tokens_q, to.tokens_k = a.tokens_k;
  to.batch = a.batch, to.heads = a.heads, to.head_dim = a.head_dim;
  to.softmax_scale = a.softmax_scale;
  to.causal = a.causal != 0;
  to.summary_index = a.summary_index;
  to.key_heads = a.key_heads;
  if (a.windowed != 0) to.window_left = a.window_left, to.window_right = a.window_right;
  to.softcap = a.softcap;
  to.alibi_slopes = a.alibi_slopes, to.alibi_stride = a.alibi_stride;
  return to;
}

inline cpu::AttentionGradients converted(const madtp_attention_gradients& a) {
  return {a.out,    a.lse,    a.grad_out, a.grad_summary_attention, a.grad_received_attention,
          a.grad_q, a.grad_k, a.grad_v};
}

inline AttentionRowsInputs converted(const madtp_attention_rows_inputs& a) {
  return {DType(a.dtype),
          a.q_rows,
          a.k,
          {a.q_strides[0], a.q_strides[1]},
          {a.k_strides[0], a.k_strides[1]},
          a.cu_seqlens_q,
          a.cu_seqlens_k,
          a.rows,
          a.tokens,
          a.batch,
          a.heads,
          a.key_heads,
          a.head_dim,
          a.softmax_scale,
          a.row_position};
}

inline ScoreInputs converted(const madtp_score_inputs& a) {
  return {a.mag_logits, DType(a.logits_dtype), a.logits_stride, a.alignment_tokens, a.cu_seqlens, a.tokens,
          a.batch,      a.summary_index,       a.protected_rows};
}

inline SelectionOutputs converted(const madtp_selection_outputs& a) {
  return {a.keep, a.cu_seqlens_out, a.source, a.merge_weight};
}

inline TokenSelection converted(const madtp_token_selection& a) {
  return {a.keep, a.cu_seqlens_in, a.cu_seqlens_out, a.source, a.merge_weight, a.tokens, a.capacity, a.batch};
}

inline Sparse24Weight converted(const madtp_sparse24_weight& a) {
  return {DType(a.dtype), a.values, a.indices, a.out_features, a.in_features};
}

inline Sparse24Dense converted(const madtp_sparse24_dense& a) {
  return {DType(a.dtype), a.weight,       a.weight_stride, a.score,
          a.score_stride, a.out_features, a.in_features,   a.transposed != 0};
}

inline Sparse24Linear converted(const madtp_sparse24_linear& a) {
  return {DType(a.dtype),
          a.x,
          a.x_stride,
          a.tokens,
          a.layout,
          DType(a.weight_dtype),
          a.out_features,
          a.in_features,
          a.bias,
          DType(a.bias_dtype),
          Activation(a.activation),
          a.scale,
          DType(a.scale_dtype),
          a.residual,
          a.residual_stride,
          a.num_rows};
}

inline QuantizedWeight converted(const madtp_quantized_weight& a) {
  return {a.values, a.indices, a.out_features, a.in_features, a.many_rows != 0};
}

inline QuantizedLinear converted(const madtp_quantized_linear& a) {
  return {DType(a.dtype),
          a.x,
          a.x_stride,
          a.tokens,
          a.layout,
          a.sparse != 0,
          a.weight_scale,
          a.out_features,
          a.in_features,
          a.bias,
          DType(a.bias_dtype),
          Activation(a.activation),
          a.scale,
          DType(a.scale_dtype),
          a.residual,
          a.residual_stride,
          a.num_rows,
          a.many_rows != 0};
}

#if MADTP_HAS_CUDA
inline cuda::Sparse24Config converted(const madtp_sparse24_config& a) {
  return {a.architecture, a.tile_tokens, a.tile_out_features, a.cluster};
}

inline cuda::QuantizedRows converted(const madtp_quantized_rows& a) {
  return {cuda::QuantizedType(a.type), a.values, a.stride, a.scale};
}
#endif

// run(the C++ record of each struct that is given). What the standard library throws is a lack of memory.
template <class Run, class... Given>
madtp_status call(Run run, const Given*... given) noexcept {
  try {
    std::tuple<Given...> copies{};
    if (!(read(given, &std::get<Given>(copies)) && ...)) return MADTP_STATUS_INVALID_ARGUMENT;
    return madtp_status(run(converted(std::get<Given>(copies))...));
  } catch (...) {
    return MADTP_STATUS_OUT_OF_MEMORY;
  }
}

}  // namespace madtp::c
