/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* The library from C, or from any language that calls C. Every function is its namesake of the C++ headers,
   with a prefix in place of the namespace: madtp_cpu_gather_merge is madtp::cpu::gather_merge. What one does,
   and asks of shapes, strides, pointers and sizes, is said there: madtp/attention.h, attention_rows.h,
   tokens.h, sparse24.h and quantized.h.

   A struct begins with its size, sizeof of the struct, which the caller sets: later versions add fields at
   the end, and a field that a caller does not know of counts as zero. Zero, and null, is the default of
   everything that has one, so a struct is made as in

       madtp_sparse24_linear inputs = {.struct_size = sizeof inputs, .dtype = MADTP_DTYPE_FLOAT32, ...};

   A null struct or another size of it is MADTP_STATUS_INVALID_ARGUMENT. No exception leaves a function, and
   nothing is printed. */

#include <stddef.h>
#include <stdint.h>

#include "madtp/export.h"
#include "madtp/version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The values of all enumerations are part of the ABI. Structs hold them as int32_t. */

typedef enum madtp_status {
  MADTP_STATUS_OK = 0,
  MADTP_STATUS_INVALID_ARGUMENT =
      1,                         /* a size, dtype or pointer breaks a documented rule; nothing was written */
  MADTP_STATUS_UNSUPPORTED = 2,  /* this build or this machine cannot run it */
  MADTP_STATUS_CUDA_ERROR = 3,   /* the CUDA runtime refused the launch */
  MADTP_STATUS_OUT_OF_MEMORY = 4 /* scratch memory could not be had; nothing was written */
} madtp_status;

typedef enum madtp_dtype {
  MADTP_DTYPE_FLOAT32 = 0,
  MADTP_DTYPE_BFLOAT16 = 1,
  MADTP_DTYPE_FLOAT16 = 2
} madtp_dtype;

typedef enum madtp_activation {
  MADTP_ACTIVATION_NONE = 0,
  MADTP_ACTIVATION_GELU = 1,
  MADTP_ACTIVATION_GELU_TANH = 2,
  MADTP_ACTIVATION_QUICK_GELU = 3,
  MADTP_ACTIVATION_RELU = 4
} madtp_activation;

/* Of the library that runs, which may be newer than this header: MADTP_VERSION and MADTP_VERSION_NUMBER are
   what the program was compiled with. */
MADTP_API const char* madtp_version(void);
MADTP_API int madtp_version_number(void); /* 10000 major + 100 minor + patch */
MADTP_API int madtp_has_cuda(void);       /* 1 where the library holds the functions madtp_cuda_... */

/* Never null. */
MADTP_API const char* madtp_status_string(madtp_status status);

/* madtp::AttentionInputs */
typedef struct madtp_attention_inputs {
  size_t struct_size;
  const void* q;        /* (tokens_q, heads, head_dim) */
  const void* k;        /* (tokens_k, key_heads, head_dim) */
  const void* v;        /* (tokens_k, key_heads, head_dim) */
  int64_t q_strides[2]; /* between rows, between heads */
  int64_t k_strides[2];
  int64_t v_strides[2];
  const int32_t* cu_seqlens_q; /* (batch + 1,) */
  const int32_t* cu_seqlens_k; /* (batch + 1,) */
  int64_t tokens_q, tokens_k, batch, heads, head_dim;
  int64_t key_heads;            /* 0: as many as heads */
  const int32_t* summary_index; /* (batch,), or null: row 0 of each */
  const float* alibi_slopes;    /* (heads,), or (batch, heads) with alibi_stride; or null */
  int64_t alibi_stride;
  int64_t window_left, window_right; /* read where `windowed` is not 0; -1: all on that side */
  int32_t dtype;
  int32_t causal;   /* not 0: a query sees no key after its position */
  int32_t windowed; /* not 0: a query sees the keys of its window alone */
  float softmax_scale;
  float softcap;    /* 0: none */
  int32_t reserved; /* 0 */
} madtp_attention_inputs;

/* madtp::AttentionGradients */
typedef struct madtp_attention_gradients {
  size_t struct_size;
  const void* out;
  const float* lse;
  const void* grad_out;
  const float* grad_summary_attention;
  const float* grad_received_attention;
  void* grad_q;
  void* grad_k;
  void* grad_v;
} madtp_attention_gradients;

/* madtp::AttentionRowsInputs */
typedef struct madtp_attention_rows_inputs {
  size_t struct_size;
  const void* q_rows;   /* (rows, heads, head_dim) */
  const void* k;        /* (tokens, key_heads, head_dim) */
  int64_t q_strides[2]; /* between rows, between heads */
  int64_t k_strides[2];
  const int32_t* cu_seqlens_q; /* (batch + 1,), of q_rows */
  const int32_t* cu_seqlens_k; /* (batch + 1,), of k */
  int64_t rows, tokens, batch;
  int64_t heads, key_heads, head_dim;
  const int32_t* row_position; /* (rows,), or null */
  int32_t dtype;
  float softmax_scale;
} madtp_attention_rows_inputs;

/* madtp::ScoreInputs */
typedef struct madtp_score_inputs {
  size_t struct_size;
  const void* mag_logits; /* (tokens, alignment_tokens) */
  int64_t logits_stride, alignment_tokens;
  const int32_t* cu_seqlens; /* (batch + 1,) */
  int64_t tokens, batch;
  const int32_t* summary_index;  /* (batch,), or null: row 0 of each */
  const uint8_t* protected_rows; /* (tokens,), or null */
  int32_t logits_dtype;
  int32_t reserved; /* 0 */
} madtp_score_inputs;

/* madtp::SelectionOutputs */
typedef struct madtp_selection_outputs {
  size_t struct_size;
  uint8_t* keep;           /* (tokens,) */
  int32_t* cu_seqlens_out; /* (batch + 1,) */
  int32_t* source;         /* (tokens,) */
  float* merge_weight;     /* (tokens,) */
} madtp_selection_outputs;

/* madtp::TokenSelection */
typedef struct madtp_token_selection {
  size_t struct_size;
  const uint8_t* keep;           /* (tokens,) */
  const int32_t* cu_seqlens_in;  /* (batch + 1,) */
  const int32_t* cu_seqlens_out; /* (batch + 1,) */
  const int32_t* source;         /* (capacity,) */
  const float* merge_weight;     /* (tokens,) */
  int64_t tokens, capacity, batch;
} madtp_token_selection;

/* madtp::Sparse24Weight */
typedef struct madtp_sparse24_weight {
  size_t struct_size;
  const void* values;     /* (out_features, in_features / 2) */
  const uint8_t* indices; /* (out_features, in_features / 8) */
  int64_t out_features, in_features;
  int32_t dtype;
  int32_t reserved; /* 0 */
} madtp_sparse24_weight;

/* madtp::Sparse24Dense */
typedef struct madtp_sparse24_dense {
  size_t struct_size;
  const void* weight; /* (out_features, in_features) */
  int64_t weight_stride;
  const float* score; /* (out_features, in_features), or null */
  int64_t score_stride;
  int64_t out_features, in_features;
  int32_t dtype;
  int32_t transposed;
} madtp_sparse24_dense;

/* madtp::Sparse24Linear */
typedef struct madtp_sparse24_linear {
  size_t struct_size;
  const void* x; /* (tokens, in_features) */
  int64_t x_stride, tokens;
  const void* layout;
  int64_t out_features, in_features;
  const void* bias;     /* (out_features,), or null */
  const void* scale;    /* (out_features,), or null */
  const void* residual; /* (tokens, out_features), or null */
  int64_t residual_stride;
  const int32_t* num_rows; /* one number, or null */
  int32_t dtype, weight_dtype, bias_dtype, scale_dtype;
  int32_t activation;
  int32_t reserved; /* 0 */
} madtp_sparse24_linear;

/* madtp::QuantizedWeight */
typedef struct madtp_quantized_weight {
  size_t struct_size;
  const int8_t* values;   /* (out_features, in_features), or with indices (out_features, in_features / 2) */
  const uint8_t* indices; /* (out_features, in_features / 8), or null: dense */
  int64_t out_features, in_features;
  int32_t many_rows; /* not 0: of a 2:4 weight, the layout for many rows of x */
  int32_t reserved;  /* 0 */
} madtp_quantized_weight;

/* madtp::QuantizedLinear */
typedef struct madtp_quantized_linear {
  size_t struct_size;
  const void* x; /* (tokens, in_features) */
  int64_t x_stride, tokens;
  const void* layout;
  const float* weight_scale; /* (out_features,) */
  int64_t out_features, in_features;
  const void* bias;     /* (out_features,), or null */
  const void* scale;    /* (out_features,), or null */
  const void* residual; /* (tokens, out_features), or null */
  int64_t residual_stride;
  const int32_t* num_rows; /* one number, or null */
  int32_t dtype, bias_dtype, scale_dtype;
  int32_t activation;
  int32_t sparse;    /* not 0: the weight was packed with indices */
  int32_t many_rows; /* not 0: and with many_rows */
} madtp_quantized_linear;

/* On the CPU: host memory, and a number of threads. */

MADTP_API madtp_status madtp_cpu_varlen_attention(const madtp_attention_inputs* inputs, void* out, float* lse,
                                                  float* summary_attention, float* received_attention,
                                                  void* workspace, int threads);
MADTP_API madtp_status madtp_cpu_varlen_attention_workspace(const madtp_attention_inputs* inputs,
                                                            int statistics, int threads, int64_t* bytes);
MADTP_API madtp_status madtp_cpu_varlen_attention_backward(const madtp_attention_inputs* inputs,
                                                           const madtp_attention_gradients* gradients,
                                                           void* workspace, int threads);
MADTP_API madtp_status madtp_cpu_varlen_attention_backward_workspace(const madtp_attention_inputs* inputs,
                                                                     int statistics, int threads,
                                                                     int64_t* bytes);

MADTP_API madtp_status madtp_cpu_attention_rows(const madtp_attention_rows_inputs* inputs, float* attention,
                                                void* workspace, int threads);
MADTP_API madtp_status madtp_cpu_attention_rows_workspace(const madtp_attention_rows_inputs* inputs,
                                                          int threads, int64_t* bytes);

MADTP_API madtp_status madtp_cpu_token_importance(const float* summary_attention,
                                                  const float* received_attention,
                                                  const madtp_score_inputs* inputs, float* importance,
                                                  int threads);
MADTP_API madtp_status madtp_cpu_select_tokens(const float* importance, const madtp_score_inputs* inputs,
                                               double temperature, const madtp_selection_outputs* selection,
                                               int threads);
MADTP_API madtp_status madtp_cpu_score_and_select(const float* summary_attention,
                                                  const float* received_attention,
                                                  const madtp_score_inputs* inputs, double temperature,
                                                  float* importance, const madtp_selection_outputs* selection,
                                                  int threads);
MADTP_API madtp_status madtp_cpu_gather_merge(const void* x, madtp_dtype dtype, int64_t x_stride,
                                              int64_t channels, const madtp_token_selection* selection,
                                              void* out, int threads);
MADTP_API madtp_status madtp_cpu_gather_merge_backward(const void* grad, int64_t grad_stride, const void* x,
                                                       madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                                       const madtp_token_selection* selection, void* grad_x,
                                                       float* grad_weight, int threads);
MADTP_API madtp_status madtp_cpu_gather_merge_layernorm(const void* x, madtp_dtype dtype, int64_t x_stride,
                                                        int64_t channels,
                                                        const madtp_token_selection* selection,
                                                        const void* weight, const void* bias,
                                                        madtp_dtype affine_dtype, double eps, void* x_out,
                                                        void* normed, float* mean, float* rstd, int threads);
MADTP_API madtp_status madtp_cpu_gather_merge_rmsnorm(const void* x, madtp_dtype dtype, int64_t x_stride,
                                                      int64_t channels,
                                                      const madtp_token_selection* selection,
                                                      const void* weight, madtp_dtype affine_dtype,
                                                      double eps, void* x_out, void* normed, int threads);

MADTP_API madtp_status madtp_cpu_sparse24_prune(const madtp_sparse24_dense* dense, void* values,
                                                uint8_t* indices, int threads);
MADTP_API madtp_status madtp_cpu_sparse24_layout_bytes(int64_t out_features, int64_t in_features,
                                                       madtp_dtype weight_dtype, int64_t* bytes);
MADTP_API madtp_status madtp_cpu_sparse24_pack(const madtp_sparse24_weight* weight, void* layout,
                                               int threads);
MADTP_API madtp_status madtp_cpu_sparse24_linear(const madtp_sparse24_linear* inputs, void* out,
                                                 int64_t out_stride, int threads);

/* sparse: 0 dense, 1 2:4, 2 2:4 for many rows of x */
MADTP_API madtp_status madtp_cpu_quantized_layout_bytes(int64_t out_features, int64_t in_features, int sparse,
                                                        int64_t* bytes);
MADTP_API madtp_status madtp_cpu_quantized_pack(const madtp_quantized_weight* weight, void* layout,
                                                int threads);
MADTP_API madtp_status madtp_cpu_quantized_linear(const madtp_quantized_linear* inputs, void* out,
                                                  int64_t out_stride, int threads);

#if MADTP_HAS_CUDA
/* On a GPU: device memory, and a cudaStream_t of the current device that the work is queued on. */

/* madtp::cuda::Sparse24Config */
typedef struct madtp_sparse24_config {
  size_t struct_size;
  int32_t architecture;
  int32_t tile_tokens;
  int32_t tile_out_features;
  int32_t cluster;
} madtp_sparse24_config;

/* madtp::cuda::QuantizedType */
typedef enum madtp_quantized_type {
  MADTP_QUANTIZED_TYPE_INT8 = 0,
  MADTP_QUANTIZED_TYPE_E4M3 = 1
} madtp_quantized_type;

/* madtp::cuda::QuantizedRows */
typedef struct madtp_quantized_rows {
  size_t struct_size;
  void* values; /* (tokens, in_features), 8 bits each */
  int64_t stride;
  float* scale; /* (tokens,) */
  int32_t type;
  int32_t reserved; /* 0 */
} madtp_quantized_rows;

MADTP_API madtp_status madtp_cuda_gather_merge(const void* x, madtp_dtype dtype, int64_t x_stride,
                                               int64_t channels, const madtp_token_selection* selection,
                                               void* out, void* stream);
MADTP_API madtp_status madtp_cuda_gather_merge_backward(const void* grad, int64_t grad_stride, const void* x,
                                                        madtp_dtype dtype, int64_t x_stride, int64_t channels,
                                                        const madtp_token_selection* selection, void* grad_x,
                                                        float* grad_weight, void* stream);
MADTP_API madtp_status madtp_cuda_gather_merge_layernorm(
    const void* x, madtp_dtype dtype, int64_t x_stride, int64_t channels,
    const madtp_token_selection* selection, const void* weight, const void* bias, madtp_dtype affine_dtype,
    double eps, void* x_out, void* normed, float* mean, float* rstd, void* stream);

/* By Triton kernels that were compiled with the library; in one that has none, MADTP_STATUS_UNSUPPORTED. */
MADTP_API madtp_status madtp_cuda_varlen_attention(const madtp_attention_inputs* inputs, int64_t max_seqlen_q,
                                                   int64_t max_seqlen_k, void* out, float* lse,
                                                   float* summary_attention, float* received_attention,
                                                   void* workspace, void* stream);
MADTP_API madtp_status madtp_cuda_varlen_attention_workspace(const madtp_attention_inputs* inputs,
                                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                             int statistics, int64_t* bytes);
MADTP_API madtp_status madtp_cuda_attention_rows(const madtp_attention_rows_inputs* inputs, float* attention,
                                                 void* workspace, void* stream);
MADTP_API madtp_status madtp_cuda_attention_rows_workspace(const madtp_attention_rows_inputs* inputs,
                                                           int64_t* bytes);
MADTP_API madtp_status madtp_cuda_token_importance(const float* summary_attention,
                                                   const float* received_attention,
                                                   const madtp_score_inputs* inputs, float* importance,
                                                   void* workspace, void* stream);
MADTP_API madtp_status madtp_cuda_select_tokens(const float* importance, const madtp_score_inputs* inputs,
                                                double temperature, const madtp_selection_outputs* selection,
                                                void* workspace, void* stream);
MADTP_API madtp_status madtp_cuda_score_and_select(const float* summary_attention,
                                                   const float* received_attention,
                                                   const madtp_score_inputs* inputs, double temperature,
                                                   float* importance,
                                                   const madtp_selection_outputs* selection, void* workspace,
                                                   void* stream);
MADTP_API madtp_status madtp_cuda_score_workspace(const madtp_score_inputs* inputs, int64_t* bytes);

MADTP_API madtp_status madtp_cuda_sparse24_prune(const madtp_sparse24_dense* dense, void* values,
                                                 uint8_t* indices, int32_t* has_nan, void* stream);
MADTP_API madtp_status madtp_cuda_sparse24_layout_bytes(int64_t out_features, int64_t in_features,
                                                        madtp_dtype weight_dtype, int64_t* bytes);
MADTP_API madtp_status madtp_cuda_sparse24_pack(const madtp_sparse24_weight* weight, void* layout,
                                                void* stream);
/* Writes at most `capacity` configurations, each with its struct_size, and how many there are to `count`. The
   first of them says its own struct_size, which is that of all; null where capacity is 0. */
MADTP_API madtp_status madtp_cuda_sparse24_linear_configs(const madtp_sparse24_linear* inputs,
                                                          madtp_sparse24_config* configs, int capacity,
                                                          int* count);
/* config: null is the one that should be fastest by a model of the device. */
MADTP_API madtp_status madtp_cuda_sparse24_linear(const madtp_sparse24_linear* inputs, void* out,
                                                  int64_t out_stride, void* stream,
                                                  const madtp_sparse24_config* config);

MADTP_API madtp_status madtp_cuda_quantize_rows(madtp_dtype dtype, const void* x, int64_t x_stride,
                                                int64_t tokens, int64_t in_features, const int32_t* num_rows,
                                                const madtp_quantized_rows* rows, void* stream);
MADTP_API madtp_status madtp_cuda_quantized_layout_bytes(int64_t out_features, int64_t in_features,
                                                         int64_t* bytes);
MADTP_API madtp_status madtp_cuda_quantized_pack(const madtp_quantized_weight* weight, void* layout,
                                                 void* stream);
/* As madtp_cuda_sparse24_linear_configs. */
MADTP_API madtp_status madtp_cuda_quantized_linear_configs(const madtp_quantized_linear* inputs,
                                                           const madtp_quantized_rows* rows,
                                                           madtp_sparse24_config* configs, int capacity,
                                                           int* count);
MADTP_API madtp_status madtp_cuda_quantized_linear(const madtp_quantized_linear* inputs,
                                                   const madtp_quantized_rows* rows, void* out,
                                                   int64_t out_stride, void* stream,
                                                   const madtp_sparse24_config* config);
#endif

#ifdef __cplusplus
}
#endif
