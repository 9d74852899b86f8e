/* SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What the C++ API writes, for the program in C to compare with. Each returns the status of the last call,
   which allocates what it needs beside its results. float32, packed rows, one thread. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  TOKENS = 23,
  BATCH = 2,
  HEADS = 2,
  HEAD_DIM = 16,
  CHANNELS = HEADS * HEAD_DIM,
  K = 5,
  OUT = 24,
  ROWS = 3
};

typedef struct attention_results {
  float out[TOKENS * CHANNELS], lse[HEADS * TOKENS], summary[TOKENS], received[TOKENS];
  float grad_q[TOKENS * CHANNELS], grad_k[TOKENS * CHANNELS], grad_v[TOKENS * CHANNELS];
} attention_results;

/* Forward with statistics, and its backward. window_left: -1 is none. */
int expected_attention(const float* q, const float* k, const float* v, const float* grad,
                       const int32_t* cu_seqlens, float scale, int64_t window_left, attention_results* to);
int expected_attention_rows(const float* q_rows, const float* k, const int32_t* cu_seqlens_q,
                            const int32_t* cu_seqlens_k, float scale, float* attention);

typedef struct token_results {
  float importance[TOKENS], merge_weight[TOKENS];
  uint8_t keep[TOKENS];
  int32_t cu_seqlens_out[BATCH + 1], source[TOKENS];
  int64_t capacity;
  float out[TOKENS * CHANNELS], normed[TOKENS * CHANNELS], rms[TOKENS * CHANNELS], mean[TOKENS], rstd[TOKENS];
  float grad_x[TOKENS * CHANNELS], grad_weight[TOKENS];
} token_results;

int expected_tokens(const float* x, const float* summary, const float* received, const float* logits,
                    const int32_t* cu_seqlens, double temperature, const float* weight, const float* bias,
                    token_results* to);

typedef struct linear_results {
  float values[OUT * CHANNELS / 2];
  uint8_t indices[OUT * CHANNELS / 8];
  float out[TOKENS * OUT];
} linear_results;

/* Prunes, packs, multiplies with GELU, scale and residual. */
int expected_sparse24(const float* x, const float* weight, const float* bias, const float* scale,
                      const float* residual, linear_results* to);
/* values: of OUT rows; indices: null where the weight is dense. */
int expected_quantized(const float* x, const int8_t* values, const uint8_t* indices,
                       const float* weight_scale, const float* bias, float* out);

#ifdef __cplusplus
}
#endif
