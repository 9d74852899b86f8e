// SPDX-License-Identifier: Apache-2.0
// The entry points that launch Triton kernels: their arguments, devices without a kernel, errors of the
// driver, calls from many threads, and the C ABI. Which launches they make is compared with Python in
// triton_launches.py.

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <limits>
#include <thread>
#include <vector>

#include "cuda/triton/kernels.h"
#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/c_api.h"
#include "madtp/tokens.h"
#include "simt/driver.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

std::atomic<int> launches{0};

// Memory that launches point to, and which none of them reads: 2 sequences of 5 tokens, 2 heads of 64.
struct Problem {
  static constexpr std::int64_t tokens = 10, heads = 2, head_dim = 64, width = heads * head_dim,
                                alignment = 7;
  alignas(16) float x[tokens * width * 3] = {}, out[tokens * width] = {}, lse[heads * tokens] = {};
  float summary[tokens] = {}, received[tokens] = {}, importance[tokens] = {}, merge_weight[tokens] = {};
  std::int32_t cu_seqlens[3] = {0, 5, 10}, cu_seqlens_out[3] = {}, source[tokens] = {};
  std::uint8_t keep[tokens] = {};
  alignas(256) char workspace[1 << 16];
  AttentionInputs attention{};
  AttentionRowsInputs rows{};
  ScoreInputs scores{};
  SelectionOutputs selection{};

  Problem() { reset(); }
  Problem(const Problem&) = delete;

  void reset() {
    attention = {}, rows = {}, scores = {};
    selection = {keep, cu_seqlens_out, source, merge_weight};
    attention.q = x, attention.k = x + width, attention.v = x + 2 * width;
    for (std::int64_t* strides : {attention.q_strides, attention.k_strides, attention.v_strides})
      strides[0] = 3 * width, strides[1] = head_dim;
    attention.cu_seqlens_q = attention.cu_seqlens_k = cu_seqlens;
    attention.tokens_q = attention.tokens_k = tokens;
    attention.batch = 2, attention.heads = heads, attention.head_dim = head_dim;
    attention.softmax_scale = 0.125f;
    rows.q_rows = x, rows.k = x;
    for (std::int64_t* strides : {rows.q_strides, rows.k_strides}) strides[0] = width, strides[1] = head_dim;
    rows.cu_seqlens_q = rows.cu_seqlens_k = cu_seqlens;
    rows.rows = rows.tokens = tokens, rows.batch = 2;
    rows.heads = rows.key_heads = heads, rows.head_dim = head_dim, rows.softmax_scale = 0.125f;
    scores.mag_logits = x, scores.logits_stride = scores.alignment_tokens = alignment;
    scores.cu_seqlens = cu_seqlens, scores.tokens = tokens, scores.batch = 2;
    simt::driver_options = {};
    simt::driver_options.on_launch = [](const simt::DriverLaunch&) { ++launches; };
    launches = 0;
  }

  Status attend(bool statistics = true, void* stream = nullptr) {
    return cuda::varlen_attention(attention, 5, 5, out, lse, statistics ? summary : nullptr,
                                  statistics ? received : nullptr, workspace, stream);
  }
  Status attend_rows() { return cuda::attention_rows(rows, summary, workspace, nullptr); }
  Status select() {
    return cuda::score_and_select(summary, received, scores, 1.0, importance, selection, workspace, nullptr);
  }
};

const bool is_there = cuda::triton::attention_kernels.count > 0;

}  // namespace

TEST(launches_as_many_kernels_as_an_op_has) {
  Problem p;
  const Status status = is_there ? Status::ok : Status::unsupported;
  EXPECT(p.attend(false) == status && launches == (is_there ? 1 : 0));
  EXPECT(p.attend() == status && launches == (is_there ? 5 : 0));
  EXPECT(p.attend_rows() == status && launches == (is_there ? 7 : 0));
  EXPECT(p.select() == status && launches == (is_there ? 10 : 0));
  EXPECT(cuda::token_importance(p.summary, p.received, p.scores, p.importance, p.workspace, nullptr) ==
         status);
  EXPECT(cuda::select_tokens(p.importance, p.scores, 0.0, p.selection, p.workspace, nullptr) == status);
  EXPECT(launches == (is_there ? 13 : 0));
}

TEST(refuses_what_breaks_a_rule_of_attention) {
  const auto refused = [](void (*spoil)(Problem&)) {
    Problem p;
    spoil(p);
    const bool is_refused = p.attend() == Status::invalid_argument && launches == 0;
    std::int64_t bytes = -1;
    cuda::varlen_attention_workspace(p.attention, 5, 5, true, &bytes);
    return is_refused && bytes == -1;
  };
  EXPECT(refused([](Problem& p) { p.attention.q = nullptr; }));
  EXPECT(refused([](Problem& p) { p.attention.q = p.x + 1; }));
  EXPECT(refused([](Problem& p) { p.attention.k_strides[0] = 3 * p.width + 4; }));
  EXPECT(refused([](Problem& p) { p.attention.v_strides[0] = 1 << 24; }));
  EXPECT(refused([](Problem& p) { p.attention.v_strides[1] = std::int64_t{1} << 40; }));
  EXPECT(refused([](Problem& p) { p.attention.head_dim = 60; }));
  EXPECT(refused([](Problem& p) { p.attention.head_dim = 264; }));
  EXPECT(refused([](Problem& p) { p.attention.key_heads = 3; }));
  EXPECT(refused([](Problem& p) { p.attention.dtype = DType(3); }));
  EXPECT(refused([](Problem& p) { p.attention.softmax_scale = -1; }));
  EXPECT(refused([](Problem& p) { p.attention.softmax_scale = std::numeric_limits<float>::infinity(); }));
  EXPECT(refused([](Problem& p) { p.attention.tokens_k = 9; }));
  EXPECT(refused([](Problem& p) { p.attention.batch = -1; }));
  EXPECT(refused([](Problem& p) { p.attention.cu_seqlens_k = nullptr; }));
  EXPECT(refused([](Problem& p) { p.attention.window_left = -2; }));
  Problem p;
  EXPECT(cuda::varlen_attention(p.attention, 11, 5, p.out, p.lse, nullptr, nullptr, p.workspace, nullptr) ==
         Status::invalid_argument);
  EXPECT(cuda::varlen_attention(p.attention, 5, 5, p.out, p.lse, p.summary, nullptr, p.workspace, nullptr) ==
         Status::invalid_argument);
  EXPECT(cuda::varlen_attention(p.attention, 5, 5, p.out, p.lse, nullptr, nullptr, nullptr, nullptr) ==
         Status::invalid_argument);
  EXPECT(launches == 0);
}

TEST(refuses_what_breaks_a_rule_of_rows_and_scores) {
  Problem p;
  p.rows.head_dim = 12;
  EXPECT(p.attend_rows() == Status::invalid_argument);
  p.reset();
  p.rows.heads = 3;
  EXPECT(p.attend_rows() == Status::invalid_argument);
  p.reset();
  p.scores.alignment_tokens = 0;
  EXPECT(p.select() == Status::invalid_argument);
  p.reset();
  p.selection.source = nullptr;
  EXPECT(p.select() == Status::invalid_argument);
  p.reset();
  EXPECT(cuda::select_tokens(p.importance, p.scores, -1.0, p.selection, p.workspace, nullptr) ==
         Status::invalid_argument);
  EXPECT(cuda::select_tokens(p.importance, p.scores, 1.0, p.selection, p.workspace + 1, nullptr) ==
         Status::invalid_argument);
  EXPECT(launches == 0);
}

TEST(has_no_kernel_for_it) {
  Problem p;
  p.attention.softcap = 50;
  EXPECT(p.attend() == Status::unsupported);
  p.reset();
  p.attention.alibi_slopes = p.received;
  EXPECT(p.attend() == Status::unsupported);
  p.reset();
  p.attention.head_dim = 8;  // of no table
  EXPECT(p.attend() == Status::unsupported);
  p.reset();
  p.rows.heads = 34, p.rows.q_strides[0] = 34 * 64;
  EXPECT(p.attend_rows() == Status::unsupported);
  for (const int capability : {75, 100, 120}) {
    p.reset();
    const Capability pretended(capability);
    EXPECT(p.attend() == Status::unsupported && p.select() == Status::unsupported);
    EXPECT(p.attend_rows() == Status::unsupported);
  }
  const Capability none(90);
  simt::options.device_error = cudaErrorNoDevice;
  p.reset();
  EXPECT(p.attend() == Status::unsupported && launches == 0);
}

TEST(without_tokens_there_is_nothing_to_launch) {
  Problem p;
  p.attention.batch = 0;
  p.out[3] = 1, p.lse[2] = 1, p.summary[1] = 1;
  EXPECT(p.attend() == Status::ok && launches == 0 && p.out[3] == 0 && p.lse[2] == 0 && p.summary[1] == 0);
  p.rows.batch = 0, p.summary[1] = 1;
  EXPECT(p.attend_rows() == Status::ok && launches == 0 && p.summary[1] == 0);
  p.scores.batch = 0;
  EXPECT(p.select() == (is_there ? Status::ok : Status::unsupported) && launches == (is_there ? 1 : 0));
}

TEST(errors_of_the_driver_are_statuses) {
  if (!is_there) return;
  const auto at_launch = [](CUresult error) {
    Problem p;
    simt::driver_options.launch_error = error;
    return p.attend();
  };
  EXPECT(at_launch(CUDA_ERROR_OUT_OF_MEMORY) == Status::out_of_memory);
  EXPECT(at_launch(CUDA_ERROR_NO_BINARY_FOR_GPU) == Status::unsupported);
  EXPECT(at_launch(CUDA_ERROR_INVALID_HANDLE) == Status::invalid_argument);
  EXPECT(at_launch(CUDA_ERROR_INVALID_VALUE) == Status::cuda_error);
  Problem p;
  p.attention.dtype = DType::float16;  // not loaded before
  simt::driver_options.load_error = CUDA_ERROR_NO_BINARY_FOR_GPU;
  EXPECT(p.attend() == Status::unsupported && launches == 0);
  simt::driver_options.load_error = 0;
  EXPECT(p.attend() == Status::ok && launches == 4);  // a failure is not remembered
}

TEST(a_kernel_is_loaded_once_from_many_threads) {
  Problem p;
  if (!is_there) return;
  p.attention.window_left = 3;  // kernels of their own
  const int before = simt::loads;
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int call = 0; call < 50; ++call)
        if (p.attend() != Status::ok) ++failed;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(failed == 0 && simt::loads == before + 4 && launches == 4 * 50 * 4);
}

TEST(the_c_abi_makes_the_same_launches) {
  Problem p;
  const madtp_status status = is_there ? MADTP_STATUS_OK : MADTP_STATUS_UNSUPPORTED;
  madtp_attention_inputs attention{};
  attention.struct_size = sizeof attention;
  attention.q = p.x, attention.k = p.x + p.width, attention.v = p.x + 2 * p.width;
  for (std::int64_t* strides : {attention.q_strides, attention.k_strides, attention.v_strides})
    strides[0] = 3 * p.width, strides[1] = p.head_dim;
  attention.cu_seqlens_q = attention.cu_seqlens_k = p.cu_seqlens;
  attention.tokens_q = attention.tokens_k = p.tokens;
  attention.batch = 2, attention.heads = p.heads, attention.head_dim = p.head_dim;
  attention.softmax_scale = 0.125f;
  std::int64_t bytes = -1, expected = -2;
  EXPECT(madtp_cuda_varlen_attention_workspace(&attention, 5, 5, 1, &bytes) == MADTP_STATUS_OK);
  EXPECT(cuda::varlen_attention_workspace(p.attention, 5, 5, true, &expected) == Status::ok);
  EXPECT(bytes == expected && bytes > 0);
  EXPECT(madtp_cuda_varlen_attention(&attention, 5, 5, p.out, p.lse, p.summary, p.received, p.workspace,
                                     nullptr) == status);
  EXPECT(launches == (is_there ? 4 : 0));

  madtp_score_inputs scores{};
  scores.struct_size = sizeof scores;
  scores.mag_logits = p.x, scores.logits_stride = scores.alignment_tokens = p.alignment;
  scores.cu_seqlens = p.cu_seqlens, scores.tokens = p.tokens, scores.batch = 2;
  const madtp_selection_outputs selection{sizeof selection, p.keep, p.cu_seqlens_out, p.source,
                                          p.merge_weight};
  EXPECT(madtp_cuda_score_workspace(&scores, &bytes) == MADTP_STATUS_OK);
  EXPECT(cuda::score_workspace(p.scores, &expected) == Status::ok && bytes == expected);
  EXPECT(madtp_cuda_token_importance(p.summary, p.received, &scores, p.importance, p.workspace, nullptr) ==
         status);
  EXPECT(madtp_cuda_select_tokens(p.importance, &scores, 1.0, &selection, p.workspace, nullptr) == status);
  EXPECT(madtp_cuda_score_and_select(p.summary, p.received, &scores, 1.0, p.importance, &selection,
                                     p.workspace, nullptr) == status);
  EXPECT(launches == (is_there ? 10 : 0));

  madtp_attention_rows_inputs rows{};
  rows.struct_size = sizeof rows;
  rows.q_rows = rows.k = p.x;
  for (std::int64_t* strides : {rows.q_strides, rows.k_strides})
    strides[0] = p.width, strides[1] = p.head_dim;
  rows.cu_seqlens_q = rows.cu_seqlens_k = p.cu_seqlens;
  rows.rows = rows.tokens = p.tokens, rows.batch = 2;
  rows.heads = rows.key_heads = p.heads, rows.head_dim = p.head_dim, rows.softmax_scale = 0.125f;
  EXPECT(madtp_cuda_attention_rows_workspace(&rows, &bytes) == MADTP_STATUS_OK && bytes > 0);
  EXPECT(madtp_cuda_attention_rows(&rows, p.summary, p.workspace, nullptr) == status);
  EXPECT(launches == (is_there ? 12 : 0));
  rows.struct_size = 4;
  EXPECT(madtp_cuda_attention_rows(&rows, p.summary, p.workspace, nullptr) == MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(madtp_cuda_varlen_attention(nullptr, 5, 5, p.out, p.lse, nullptr, nullptr, p.workspace, nullptr) ==
         MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(madtp_cuda_select_tokens(p.importance, &scores, 1.0, nullptr, p.workspace, nullptr) ==
         MADTP_STATUS_INVALID_ARGUMENT);
}
