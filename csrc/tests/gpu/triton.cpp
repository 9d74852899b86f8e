// SPDX-License-Identifier: Apache-2.0
// The Triton kernels that the library holds, on a GPU, against the CPU kernels. Without a GPU, or in a
// library without them, it is skipped.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/tokens.h"
#include "tests/test.h"

using namespace madtp;

namespace {

// A vector in the memory of the GPU; a copy of it comes back.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : size_(values.size()) {
    cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(size_ * sizeof(T), 16));
    cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  explicit OnDevice(std::int64_t size) : OnDevice(std::vector<T>(std::size_t(size))) {}
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }

  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> copy(size_);
    EXPECT(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return copy;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

std::vector<float> normal(std::int64_t size, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = distribution(engine);
  return values;
}

void expect_close(const std::vector<float>& got, const std::vector<float>& expected, double tolerance) {
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT_NEAR(got[i], expected[i], tolerance * (1 + std::abs(expected[i])));
}

constexpr std::int64_t kTokens = 300, kHeads = 3, kHeadDim = 64, kWidth = kHeads * kHeadDim, kLongest = 197;
const std::vector<std::int32_t> kEnds = {0, 197, 197, 240, 300};
constexpr std::int64_t kBatch = 4;

AttentionInputs inputs_of(const float* qkv, const std::int32_t* ends, bool causal, std::int64_t window) {
  AttentionInputs a{};
  a.q = qkv, a.k = qkv + kWidth, a.v = qkv + 2 * kWidth;
  for (std::int64_t* strides : {a.q_strides, a.k_strides, a.v_strides})
    strides[0] = 3 * kWidth, strides[1] = kHeadDim;
  a.cu_seqlens_q = a.cu_seqlens_k = ends;
  a.tokens_q = a.tokens_k = kTokens, a.batch = kBatch, a.heads = kHeads, a.head_dim = kHeadDim;
  a.softmax_scale = 0.125f, a.causal = causal, a.window_left = window;
  return a;
}

}  // namespace

TEST(attention_with_statistics_is_that_of_the_cpu) {
  const std::vector<float> qkv = normal(kTokens * 3 * kWidth, 1);
  const OnDevice<float> data(qkv);
  const OnDevice<std::int32_t> ends(kEnds);
  for (const bool causal : {false, true}) {
    for (const std::int64_t window : {-1, 40}) {
      const AttentionInputs a = inputs_of(qkv.data(), kEnds.data(), causal, window);
      std::vector<float> out(kTokens * kWidth), lse(kTokens * kHeads), summary(kTokens), received(kTokens);
      std::int64_t bytes = 0;
      EXPECT(cpu::varlen_attention_workspace(a, true, 1, &bytes) == Status::ok);
      std::vector<char> room(std::size_t(bytes) + 1);
      EXPECT(cpu::varlen_attention(a, out.data(), lse.data(), summary.data(), received.data(), room.data(),
                                   1) == Status::ok);

      const AttentionInputs b = inputs_of(data.get(), ends.get(), causal, window);
      const OnDevice<float> out_b(kTokens * kWidth), lse_b(kTokens * kHeads), summary_b(kTokens),
          received_b(kTokens);
      EXPECT(cuda::varlen_attention_workspace(b, kLongest, kLongest, true, &bytes) == Status::ok);
      const OnDevice<char> workspace(bytes);
      EXPECT(cuda::varlen_attention(b, kLongest, kLongest, out_b.get(), lse_b.get(), summary_b.get(),
                                    received_b.get(), workspace.get(), nullptr) == Status::ok);
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
      expect_close(out_b.values(), out, 1e-5);
      expect_close(lse_b.values(), lse, 1e-5);
      expect_close(summary_b.values(), summary, 1e-5);
      expect_close(received_b.values(), received, 1e-4);
    }
  }
}

TEST(attention_rows_are_those_of_the_cpu) {
  const std::vector<float> q = normal(8 * kWidth, 2), k = normal(kTokens * kWidth, 3);
  const std::vector<std::int32_t> row_ends = {0, 3, 3, 7, 8};
  const OnDevice<float> q_b(q), k_b(k);
  const OnDevice<std::int32_t> ends(kEnds), row_ends_b(row_ends);
  const auto inputs = [&](const float* rows, const float* keys, const std::int32_t* ends_q,
                          const std::int32_t* ends_k) {
    return AttentionRowsInputs{DType::float32,
                               rows,
                               keys,
                               {kWidth, kHeadDim},
                               {kWidth, kHeadDim},
                               ends_q,
                               ends_k,
                               8,
                               kTokens,
                               kBatch,
                               kHeads,
                               kHeads,
                               kHeadDim,
                               0.125f,
                               nullptr};
  };
  const AttentionRowsInputs a = inputs(q.data(), k.data(), row_ends.data(), kEnds.data());
  std::vector<float> attention(kTokens);
  std::int64_t bytes = 0;
  EXPECT(cpu::attention_rows_workspace(a, 1, &bytes) == Status::ok);
  std::vector<char> room(std::size_t(bytes) + 1);
  EXPECT(cpu::attention_rows(a, attention.data(), room.data(), 1) == Status::ok);
  const AttentionRowsInputs b = inputs(q_b.get(), k_b.get(), row_ends_b.get(), ends.get());
  EXPECT(cuda::attention_rows_workspace(b, &bytes) == Status::ok);
  const OnDevice<char> workspace(bytes);
  const OnDevice<float> attention_b(kTokens);
  EXPECT(cuda::attention_rows(b, attention_b.get(), workspace.get(), nullptr) == Status::ok);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  expect_close(attention_b.values(), attention, 1e-5);
}

// One program for a sequence (7 alignment tokens), and several (100).
TEST(selections_are_those_of_the_cpu) {
  for (const std::int64_t alignment : {7, 100}) {
    std::vector<float> summary = normal(kTokens, 4), received = normal(kTokens, 5);
    for (std::size_t i = 0; i < summary.size(); ++i)
      summary[i] = std::abs(summary[i]), received[i] = std::abs(received[i]);
    std::vector<float> logits = normal(kTokens * 4 * alignment, 6);
    logits.resize(std::size_t(kTokens * alignment));
    const OnDevice<float> summary_b(summary), received_b(received), logits_b(logits);
    const OnDevice<std::int32_t> ends(kEnds);
    const auto inputs = [&](const float* from, const std::int32_t* of) {
      return ScoreInputs{from, DType::float32, alignment, alignment, of, kTokens, kBatch, nullptr};
    };
    std::vector<float> importance(kTokens), weight(kTokens);
    std::vector<std::uint8_t> keep(kTokens);
    std::vector<std::int32_t> ends_out(kBatch + 1), source(kTokens);
    EXPECT(cpu::score_and_select(
               summary.data(), received.data(), inputs(logits.data(), kEnds.data()), 1.0, importance.data(),
               {keep.data(), ends_out.data(), source.data(), weight.data()}, 1) == Status::ok);
    const OnDevice<float> importance_b(kTokens), weight_b(kTokens);
    const OnDevice<std::uint8_t> keep_b(kTokens);
    const OnDevice<std::int32_t> ends_out_b(kBatch + 1), source_b(kTokens);
    const ScoreInputs b = inputs(logits_b.get(), ends.get());
    std::int64_t bytes = 0;
    EXPECT(cuda::score_workspace(b, &bytes) == Status::ok);
    const OnDevice<char> workspace(bytes);
    EXPECT(cuda::score_and_select(summary_b.get(), received_b.get(), b, 1.0, importance_b.get(),
                                  {keep_b.get(), ends_out_b.get(), source_b.get(), weight_b.get()},
                                  workspace.get(), nullptr) == Status::ok);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    expect_close(importance_b.values(), importance, 1e-6);
    EXPECT(keep_b.values() == keep && ends_out_b.values() == ends_out && source_b.values() == source);
    expect_close(weight_b.values(), weight, 1e-6);
  }
}

int main(int count, char** names) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  return madtp::test::run_all(count > 1 ? names[1] : nullptr);
}
