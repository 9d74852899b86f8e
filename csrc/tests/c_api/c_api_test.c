/* SPDX-License-Identifier: Apache-2.0 */
/* The C ABI from a program in C: every family has the bits of the C++ API, and what is refused writes
 * nothing. */
#include <madtp/c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "expected.h"

static int failures = 0;

#define EXPECT(condition)                                             \
  do {                                                                \
    if (!(condition)) {                                               \
      ++failures;                                                     \
      printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
    }                                                                 \
  } while (0)
#define EXPECT_OK(call) EXPECT((call) == MADTP_STATUS_OK)
#define EXPECT_REFUSED(call) EXPECT((call) == MADTP_STATUS_INVALID_ARGUMENT)
#define SAME(a, b, bytes) EXPECT(memcmp(a, b, bytes) == 0)

/* What programs were compiled with stays: a field more must come at the end. */
#if UINTPTR_MAX == UINT64_MAX
_Static_assert(sizeof(madtp_attention_inputs) == 208, "attention_inputs");
_Static_assert(sizeof(madtp_attention_gradients) == 72, "attention_gradients");
_Static_assert(sizeof(madtp_attention_rows_inputs) == 136, "attention_rows_inputs");
_Static_assert(sizeof(madtp_score_inputs) == 80, "score_inputs");
_Static_assert(sizeof(madtp_selection_outputs) == 40, "selection_outputs");
_Static_assert(sizeof(madtp_token_selection) == 72, "token_selection");
_Static_assert(sizeof(madtp_sparse24_weight) == 48, "sparse24_weight");
_Static_assert(sizeof(madtp_sparse24_dense) == 64, "sparse24_dense");
_Static_assert(sizeof(madtp_sparse24_linear) == 120, "sparse24_linear");
_Static_assert(sizeof(madtp_quantized_weight) == 48, "quantized_weight");
_Static_assert(sizeof(madtp_quantized_linear) == 128, "quantized_linear");
#endif

static const int32_t cu_seqlens[BATCH + 1] = {0, 14, TOKENS};

static float* numbers(size_t count, unsigned seed) {
  float* to = malloc(count * sizeof *to);
  if (to == NULL) abort();
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    to[i] = (float)(seed >> 8) / (1 << 23) - 1.0f;
  }
  return to;
}

static void* zeros(size_t bytes) {
  void* to = calloc(bytes + 1, 1);
  if (to == NULL) abort();
  return to;
}

static madtp_attention_inputs attention_inputs(const float* q, const float* k, const float* v) {
  madtp_attention_inputs inputs = {.struct_size = sizeof inputs, .dtype = MADTP_DTYPE_FLOAT32};
  inputs.q = q, inputs.k = k, inputs.v = v;
  inputs.q_strides[0] = inputs.k_strides[0] = inputs.v_strides[0] = CHANNELS;
  inputs.q_strides[1] = inputs.k_strides[1] = inputs.v_strides[1] = HEAD_DIM;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu_seqlens;
  inputs.tokens_q = inputs.tokens_k = TOKENS;
  inputs.batch = BATCH, inputs.heads = HEADS, inputs.head_dim = HEAD_DIM;
  inputs.softmax_scale = 0.25f;
  return inputs;
}

static void test_attention(void) {
  float *q = numbers(TOKENS * CHANNELS, 1), *k = numbers(TOKENS * CHANNELS, 2),
        *v = numbers(TOKENS * CHANNELS, 3);
  float* grad = numbers(TOKENS * CHANNELS, 4);
  attention_results *ours = zeros(sizeof *ours), *theirs = zeros(sizeof *theirs);
  for (int windowed = 0; windowed < 2; ++windowed) {
    madtp_attention_inputs inputs = attention_inputs(q, k, v);
    inputs.windowed = windowed, inputs.window_left = 3, inputs.window_right = -1;
    int64_t bytes = 0, backward_bytes = 0;
    EXPECT_OK(madtp_cpu_varlen_attention_workspace(&inputs, 1, 1, &bytes));
    EXPECT_OK(madtp_cpu_varlen_attention_backward_workspace(&inputs, 1, 1, &backward_bytes));
    void *workspace = zeros((size_t)bytes), *backward = zeros((size_t)backward_bytes);
    EXPECT_OK(madtp_cpu_varlen_attention(&inputs, ours->out, ours->lse, ours->summary, ours->received,
                                         workspace, 1));
    madtp_attention_gradients gradients = {sizeof gradients, ours->out,      ours->lse,    grad,
                                           ours->summary,    ours->received, ours->grad_q, ours->grad_k,
                                           ours->grad_v};
    EXPECT_OK(madtp_cpu_varlen_attention_backward(&inputs, &gradients, backward, 1));
    EXPECT(expected_attention(q, k, v, grad, cu_seqlens, 0.25f, windowed ? 3 : -1, theirs) == 0);
    SAME(ours, theirs, sizeof *ours);

    float before[TOKENS * CHANNELS];
    memcpy(before, ours->out, sizeof before);
    EXPECT_REFUSED(madtp_cpu_varlen_attention(NULL, ours->out, NULL, NULL, NULL, workspace, 1));
    EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, NULL, NULL, NULL, NULL, workspace, 1));
    EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, ours->out, NULL, NULL, NULL, workspace, 0));
    EXPECT_REFUSED(madtp_cpu_varlen_attention_workspace(&inputs, 1, 1, NULL));
    EXPECT_REFUSED(madtp_cpu_varlen_attention_backward(&inputs, NULL, backward, 1));
    inputs.head_dim = 7;
    EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, ours->out, NULL, NULL, NULL, workspace, 1));
    inputs = attention_inputs(q, k, v), inputs.reserved = 1;
    EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, ours->out, NULL, NULL, NULL, workspace, 1));
    inputs.reserved = 0, inputs.dtype = 3;
    EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, ours->out, NULL, NULL, NULL, workspace, 1));
    const size_t wrong[] = {0, sizeof inputs - 1, sizeof inputs + 1, SIZE_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
      inputs = attention_inputs(q, k, v), inputs.struct_size = wrong[i];
      EXPECT_REFUSED(madtp_cpu_varlen_attention(&inputs, ours->out, NULL, NULL, NULL, workspace, 1));
    }
    SAME(ours->out, before, sizeof before);
    free(workspace), free(backward);
  }
  free(q), free(k), free(v), free(grad), free(ours), free(theirs);
}

static void test_attention_rows(void) {
  float *q = numbers(ROWS * CHANNELS, 5), *k = numbers(TOKENS * CHANNELS, 6);
  const int32_t cu_seqlens_q[BATCH + 1] = {0, 1, ROWS};
  madtp_attention_rows_inputs inputs = {.struct_size = sizeof inputs, .dtype = MADTP_DTYPE_FLOAT32};
  inputs.q_rows = q, inputs.k = k;
  inputs.q_strides[0] = inputs.k_strides[0] = CHANNELS, inputs.q_strides[1] = inputs.k_strides[1] = HEAD_DIM;
  inputs.cu_seqlens_q = cu_seqlens_q, inputs.cu_seqlens_k = cu_seqlens;
  inputs.rows = ROWS, inputs.tokens = TOKENS, inputs.batch = BATCH;
  inputs.heads = inputs.key_heads = HEADS, inputs.head_dim = HEAD_DIM;
  inputs.softmax_scale = 0.25f;
  float ours[TOKENS] = {0}, theirs[TOKENS] = {0};
  int64_t bytes = 0;
  EXPECT_OK(madtp_cpu_attention_rows_workspace(&inputs, 1, &bytes));
  void* workspace = zeros((size_t)bytes);
  EXPECT_OK(madtp_cpu_attention_rows(&inputs, ours, workspace, 1));
  EXPECT(expected_attention_rows(q, k, cu_seqlens_q, cu_seqlens, 0.25f, theirs) == 0);
  SAME(ours, theirs, sizeof ours);
  EXPECT_REFUSED(madtp_cpu_attention_rows(NULL, ours, workspace, 1));
  EXPECT_REFUSED(madtp_cpu_attention_rows(&inputs, NULL, workspace, 1));
  EXPECT_REFUSED(madtp_cpu_attention_rows_workspace(&inputs, 1, NULL));
  inputs.struct_size = 8;
  EXPECT_REFUSED(madtp_cpu_attention_rows(&inputs, ours, workspace, 1));
  SAME(ours, theirs, sizeof ours);
  free(q), free(k), free(workspace);
}

static void test_tokens(void) {
  float *x = numbers(TOKENS * CHANNELS, 7), *summary = numbers(TOKENS, 8), *received = numbers(TOKENS, 9);
  float *logits = numbers(TOKENS * K, 10), *weight = numbers(CHANNELS, 11), *bias = numbers(CHANNELS, 12);
  for (int i = 0; i < TOKENS; ++i) summary[i] += 1, received[i] += 1;
  token_results *ours = zeros(sizeof *ours), *theirs = zeros(sizeof *theirs);
  EXPECT(expected_tokens(x, summary, received, logits, cu_seqlens, 0.5, weight, bias, theirs) == 0);
  EXPECT(theirs->capacity < TOKENS); /* some tokens were pruned */

  madtp_score_inputs scores = {.struct_size = sizeof scores, .logits_dtype = MADTP_DTYPE_FLOAT32};
  scores.mag_logits = logits, scores.logits_stride = scores.alignment_tokens = K;
  scores.cu_seqlens = cu_seqlens, scores.tokens = TOKENS, scores.batch = BATCH;
  madtp_selection_outputs outputs = {sizeof outputs, ours->keep, ours->cu_seqlens_out, ours->source,
                                     ours->merge_weight};
  EXPECT_OK(madtp_cpu_token_importance(summary, received, &scores, ours->importance, 1));
  EXPECT_OK(madtp_cpu_select_tokens(ours->importance, &scores, 0.5, &outputs, 1));
  ours->capacity = ours->cu_seqlens_out[BATCH];
  SAME(ours->keep, theirs->keep, sizeof ours->keep);
  SAME(ours->importance, theirs->importance, sizeof ours->importance);
  memset(ours->keep, 7, sizeof ours->keep);
  EXPECT_OK(madtp_cpu_score_and_select(summary, received, &scores, 0.5, ours->importance, &outputs, 1));

  madtp_token_selection selection = {.struct_size = sizeof selection};
  selection.keep = ours->keep, selection.cu_seqlens_in = cu_seqlens,
  selection.cu_seqlens_out = ours->cu_seqlens_out;
  selection.source = ours->source, selection.merge_weight = ours->merge_weight;
  selection.tokens = TOKENS, selection.capacity = ours->capacity, selection.batch = BATCH;
  EXPECT_OK(madtp_cpu_gather_merge(x, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, &selection, ours->out, 1));
  SAME(ours->out, theirs->out, sizeof ours->out);
  EXPECT_OK(madtp_cpu_gather_merge_rmsnorm(x, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, &selection, weight,
                                           MADTP_DTYPE_FLOAT32, 1e-6, ours->out, ours->rms, 1));
  EXPECT_OK(madtp_cpu_gather_merge_layernorm(x, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, &selection, weight,
                                             bias, MADTP_DTYPE_FLOAT32, 1e-5, ours->out, ours->normed,
                                             ours->mean, ours->rstd, 1));
  EXPECT_OK(madtp_cpu_gather_merge_backward(ours->normed, CHANNELS, x, MADTP_DTYPE_FLOAT32, CHANNELS,
                                            CHANNELS, &selection, ours->grad_x, ours->grad_weight, 1));
  SAME(ours, theirs, sizeof *ours);

  EXPECT_REFUSED(madtp_cpu_gather_merge(x, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, NULL, ours->out, 1));
  EXPECT_REFUSED(madtp_cpu_gather_merge(x, (madtp_dtype)9, CHANNELS, CHANNELS, &selection, ours->out, 1));
  EXPECT_REFUSED(
      madtp_cpu_gather_merge(NULL, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, &selection, ours->out, 1));
  EXPECT_REFUSED(madtp_cpu_gather_merge(x, MADTP_DTYPE_FLOAT32, CHANNELS, -1, &selection, ours->out, 1));
  EXPECT_REFUSED(madtp_cpu_select_tokens(ours->importance, &scores, -1, &outputs, 1));
  EXPECT_REFUSED(madtp_cpu_select_tokens(ours->importance, &scores, 0.5, NULL, 1));
  outputs.struct_size += 8;
  EXPECT_REFUSED(madtp_cpu_select_tokens(ours->importance, &scores, 0.5, &outputs, 1));
  selection.tokens = TOKENS + 1; /* the sequences end before */
  EXPECT_REFUSED(
      madtp_cpu_gather_merge(x, MADTP_DTYPE_FLOAT32, CHANNELS, CHANNELS, &selection, ours->out, 1));
  SAME(ours, theirs, sizeof *ours);
  free(x), free(summary), free(received), free(logits), free(weight), free(bias), free(ours), free(theirs);
}

static void test_sparse24(void) {
  float *x = numbers(TOKENS * CHANNELS, 13), *weight = numbers(OUT * CHANNELS, 14), *bias = numbers(OUT, 15);
  float *scale = numbers(OUT, 16), *residual = numbers(TOKENS * OUT, 17);
  linear_results *ours = zeros(sizeof *ours), *theirs = zeros(sizeof *theirs);
  madtp_sparse24_dense dense = {.struct_size = sizeof dense, .weight = weight, .weight_stride = CHANNELS};
  dense.out_features = OUT, dense.in_features = CHANNELS;
  EXPECT_OK(madtp_cpu_sparse24_prune(&dense, ours->values, ours->indices, 1));
  int64_t bytes = 0;
  EXPECT_OK(madtp_cpu_sparse24_layout_bytes(OUT, CHANNELS, MADTP_DTYPE_FLOAT32, &bytes));
  void* layout = zeros((size_t)bytes);
  madtp_sparse24_weight pruned = {
      .struct_size = sizeof pruned, .values = ours->values, .indices = ours->indices};
  pruned.out_features = OUT, pruned.in_features = CHANNELS;
  EXPECT_OK(madtp_cpu_sparse24_pack(&pruned, layout, 1));
  madtp_sparse24_linear inputs = {
      .struct_size = sizeof inputs, .x = x, .x_stride = CHANNELS, .tokens = TOKENS};
  inputs.layout = layout, inputs.out_features = OUT, inputs.in_features = CHANNELS;
  inputs.bias = bias, inputs.scale = scale, inputs.residual = residual, inputs.residual_stride = OUT;
  inputs.activation = MADTP_ACTIVATION_GELU;
  EXPECT_OK(madtp_cpu_sparse24_linear(&inputs, ours->out, OUT, 1));
  EXPECT(expected_sparse24(x, weight, bias, scale, residual, theirs) == 0);
  SAME(ours, theirs, sizeof *ours);

  EXPECT_REFUSED(madtp_cpu_sparse24_prune(NULL, ours->values, ours->indices, 1));
  EXPECT_REFUSED(madtp_cpu_sparse24_layout_bytes(OUT, CHANNELS, MADTP_DTYPE_FLOAT32, NULL));
  EXPECT_REFUSED(madtp_cpu_sparse24_layout_bytes(OUT + 1, CHANNELS, MADTP_DTYPE_FLOAT32, &bytes));
  EXPECT_REFUSED(madtp_cpu_sparse24_pack(&pruned, NULL, 1));
  EXPECT_REFUSED(madtp_cpu_sparse24_linear(&inputs, NULL, OUT, 1));
  inputs.activation = 5;
  EXPECT_REFUSED(madtp_cpu_sparse24_linear(&inputs, ours->out, OUT, 1));
  inputs.activation = MADTP_ACTIVATION_NONE, inputs.struct_size = sizeof inputs - 8;
  EXPECT_REFUSED(madtp_cpu_sparse24_linear(&inputs, ours->out, OUT, 1));
  SAME(ours, theirs, sizeof *ours);
  free(x), free(weight), free(bias), free(scale), free(residual), free(ours), free(theirs), free(layout);
}

static void test_quantized(void) {
  float *x = numbers(TOKENS * CHANNELS, 18), *weight = numbers(OUT * CHANNELS, 19), *bias = numbers(OUT, 20);
  float *weight_scale = numbers(OUT, 21), ours[TOKENS * OUT] = {0}, theirs[TOKENS * OUT] = {0};
  int8_t values[OUT * CHANNELS];
  uint8_t indices[OUT * CHANNELS / 8];
  for (int i = 0; i < OUT * CHANNELS; ++i) values[i] = (int8_t)(weight[i] * 127);
  for (int i = 0; i < OUT; ++i) weight_scale[i] = 0.01f + weight_scale[i] * weight_scale[i];
  memset(indices, 0xd8, sizeof indices);       /* columns 0 and 2 of a group, 1 and 3 of the next */
  for (int sparse = 0; sparse < 4; ++sparse) { /* dense, 2:4, 2:4 for many rows; 2:4 in the struct of 0.2 */
    const int many_rows = sparse == 2;
    madtp_quantized_weight packed = {sizeof packed, values, sparse ? indices : NULL, OUT, CHANNELS,
                                     many_rows,     0};
    if (sparse == 3) packed.struct_size = offsetof(madtp_quantized_weight, many_rows);
    int64_t bytes = 0;
    EXPECT_OK(madtp_cpu_quantized_layout_bytes(OUT, CHANNELS, sparse, &bytes));
    void* layout = zeros((size_t)bytes);
    EXPECT_OK(madtp_cpu_quantized_pack(&packed, layout, 1));
    madtp_quantized_linear inputs = {
        .struct_size = sizeof inputs, .x = x, .x_stride = CHANNELS, .tokens = TOKENS};
    inputs.layout = layout, inputs.sparse = sparse != 0, inputs.many_rows = many_rows;
    inputs.weight_scale = weight_scale;
    inputs.out_features = OUT, inputs.in_features = CHANNELS;
    inputs.bias = bias, inputs.activation = MADTP_ACTIVATION_RELU;
    EXPECT_OK(madtp_cpu_quantized_linear(&inputs, ours, OUT, 1));
    EXPECT(expected_quantized(x, values, packed.indices, weight_scale, bias, theirs) == 0);
    SAME(ours, theirs, sizeof ours);

    EXPECT_REFUSED(madtp_cpu_quantized_layout_bytes(OUT, CHANNELS, sparse, NULL));
    EXPECT_REFUSED(madtp_cpu_quantized_pack(NULL, layout, 1));
    EXPECT_REFUSED(madtp_cpu_quantized_linear(&inputs, NULL, OUT, 1));
    inputs.weight_scale = NULL;
    EXPECT_REFUSED(madtp_cpu_quantized_linear(&inputs, ours, OUT, 1));
    inputs.weight_scale = weight_scale, inputs.struct_size = 0;
    EXPECT_REFUSED(madtp_cpu_quantized_linear(&inputs, ours, OUT, 1));
    SAME(ours, theirs, sizeof ours);
    free(layout);
  }
  free(x), free(weight), free(bias), free(weight_scale);
}

static void test_library(void) {
  EXPECT(strcmp(madtp_version(), MADTP_VERSION) == 0);
  EXPECT(madtp_version_number() == MADTP_VERSION_NUMBER);
  EXPECT(madtp_has_cuda() == MADTP_HAS_CUDA);
  EXPECT(strcmp(madtp_status_string(MADTP_STATUS_OK), "ok") == 0);
  EXPECT(strcmp(madtp_status_string(MADTP_STATUS_INVALID_ARGUMENT), "invalid argument") == 0);
  EXPECT(strcmp(madtp_status_string((madtp_status)99), "unknown status") == 0);
}

int main(void) {
  test_library();
  test_attention();
  test_attention_rows();
  test_tokens();
  test_sparse24();
  test_quantized();
  printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
