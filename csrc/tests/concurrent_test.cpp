// SPDX-License-Identifier: Apache-2.0
// Many threads call every op at once, on shared inputs, alone and with teams of their own: each gets the bits
// of a call that nobody disturbs. `make test-tsan` watches these calls.

#include <atomic>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/sparse24.h"
#include "madtp/tokens.h"
#include "tests/test.h"

using namespace madtp;

namespace {

constexpr int kCallers = 8, kRounds = 3;
constexpr std::int64_t kHeads = 2, kDim = 32, kRow = kHeads * kDim, kTokens = 103, kAlignmentTokens = 9;
constexpr std::int64_t kOutFeatures = 264, kInFeatures = 80;

using Bytes = std::vector<unsigned char>;

// The results of one call.
class Results {
 public:
  // Appends the bits of a result.
  template <typename T>
  void operator<<(const std::vector<T>& values) {
    const auto* const first = reinterpret_cast<const unsigned char*>(values.data());
    bytes.insert(bytes.end(), first, first + values.size() * sizeof(T));
  }
  void operator<<(Status status) { ok = ok && status == Status::ok; }

  Bytes bytes;
  bool ok = true;
};

std::vector<float> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// What all callers read.
struct Inputs {
  std::vector<std::int32_t> cu_seqlens{0, 1, 1, 68, kTokens};
  std::vector<float> q = random_values(kTokens * kRow, 1), k = random_values(kTokens * kRow, 2),
                     v = random_values(kTokens * kRow, 3),
                     logits = random_values(kTokens * kAlignmentTokens, 4),
                     dense = random_values(kOutFeatures * kInFeatures, 5),
                     x = random_values(kTokens * kInFeatures, 6), bias = random_values(kOutFeatures, 7);
  std::vector<float> positive = random_values(kTokens, 8);
  std::vector<float> weight_values = std::vector<float>(kOutFeatures * kInFeatures / 2);
  std::vector<std::uint8_t> indices = std::vector<std::uint8_t>(kOutFeatures * kInFeatures / 8), layout;

  Inputs() {
    for (float& value : positive) value = value * value;
    EXPECT(cpu::sparse24_prune(dense_weight(), weight_values.data(), indices.data(), 1) == Status::ok);
    std::int64_t bytes = 0;
    EXPECT(cpu::sparse24_layout_bytes(kOutFeatures, kInFeatures, DType::float32, &bytes) == Status::ok);
    layout.resize(std::size_t(bytes));
    EXPECT(cpu::sparse24_pack(weight(), layout.data(), 1) == Status::ok);
  }

  std::int64_t batch() const { return std::int64_t(cu_seqlens.size()) - 1; }
  Sparse24Dense dense_weight() const {
    return {DType::float32, dense.data(), kInFeatures, nullptr, 0, kOutFeatures, kInFeatures};
  }
  Sparse24Weight weight() const {
    return {DType::float32, weight_values.data(), indices.data(), kOutFeatures, kInFeatures};
  }
  AttentionInputs attention() const {
    return {DType::float32,
            q.data(),
            k.data(),
            v.data(),
            {kRow, kDim},
            {kRow, kDim},
            {kRow, kDim},
            cu_seqlens.data(),
            cu_seqlens.data(),
            kTokens,
            kTokens,
            batch(),
            kHeads,
            kDim,
            0.2f,
            false,
            nullptr};
  }
  ScoreInputs scores() const {
    return {logits.data(),     DType::float32, kAlignmentTokens, kAlignmentTokens,
            cu_seqlens.data(), kTokens,        batch(),          nullptr};
  }
};

struct Selection {
  std::vector<std::uint8_t> keep = std::vector<std::uint8_t>(kTokens);
  std::vector<std::int32_t> ends, source = std::vector<std::int32_t>(kTokens);
  std::vector<float> merge_weight = std::vector<float>(kTokens);

  explicit Selection(const Inputs& in) : ends(in.cu_seqlens.size()) {}
  SelectionOutputs outputs() { return {keep.data(), ends.data(), source.data(), merge_weight.data()}; }
  TokenSelection selection(const Inputs& in) const {
    return {
        keep.data(), in.cu_seqlens.data(), ends.data(), source.data(), merge_weight.data(), kTokens, kTokens,
        in.batch()};
  }
};

std::vector<float> floats(std::int64_t count) { return std::vector<float>(static_cast<std::size_t>(count)); }

void attention(const Inputs& in, int threads, Results& results) {
  auto out = floats(kTokens * kRow), lse = floats(kTokens * kHeads), summary = floats(kTokens),
       received = floats(kTokens), grad_q = out, grad_k = out, grad_v = out;
  std::int64_t bytes = 0;
  results << cpu::varlen_attention_workspace(in.attention(), true, threads, &bytes);
  std::vector<char> workspace(static_cast<std::size_t>(bytes));
  results << cpu::varlen_attention(in.attention(), out.data(), lse.data(), summary.data(), received.data(),
                                   workspace.data(), threads);
  results << cpu::varlen_attention_backward_workspace(in.attention(), true, threads, &bytes);
  workspace.resize(static_cast<std::size_t>(bytes));
  results << cpu::varlen_attention_backward(in.attention(),
                                            {out.data(), lse.data(), in.q.data(), in.positive.data(),
                                             in.positive.data(), grad_q.data(), grad_k.data(), grad_v.data()},
                                            workspace.data(), threads);
  for (const auto* result : {&out, &lse, &summary, &received, &grad_q, &grad_k, &grad_v}) results << *result;
}

void attention_rows(const Inputs& in, int threads, Results& results) {
  auto attended = floats(kTokens);
  const AttentionRowsInputs inputs{DType::float32,
                                   in.q.data(),
                                   in.k.data(),
                                   {kRow, kDim},
                                   {kRow, kDim},
                                   in.cu_seqlens.data(),
                                   in.cu_seqlens.data(),
                                   kTokens,
                                   kTokens,
                                   in.batch(),
                                   kHeads,
                                   kHeads,
                                   kDim,
                                   0.2f,
                                   nullptr};
  std::int64_t bytes = 0;
  results << cpu::attention_rows_workspace(inputs, threads, &bytes);
  std::vector<char> workspace(static_cast<std::size_t>(bytes));
  results << cpu::attention_rows(inputs, attended.data(), workspace.data(), threads);
  results << attended;
}

void scores(const Inputs& in, int threads, Results& results) {
  auto importance = floats(kTokens), again = importance;
  Selection two(in), one(in);
  results << cpu::token_importance(in.positive.data(), in.positive.data(), in.scores(), importance.data(),
                                   threads);
  results << cpu::select_tokens(importance.data(), in.scores(), 0.5, two.outputs(), threads);
  results << cpu::score_and_select(in.positive.data(), in.positive.data(), in.scores(), 0.5, again.data(),
                                   one.outputs(), threads);
  for (const auto* result : {&importance, &again, &two.merge_weight, &one.merge_weight}) results << *result;
  for (const Selection* selection : {&one, &two}) {
    results << selection->keep;
    results << selection->ends;
    results << selection->source;
  }
}

void gathers(const Inputs& in, int threads, Results& results) {
  auto importance = floats(kTokens), out = floats(kTokens * kRow), normed = out, grad_x = out,
       grad_weight = floats(kTokens), mean = grad_weight, rstd = grad_weight;
  Selection selected(in);
  results << cpu::score_and_select(in.positive.data(), in.positive.data(), in.scores(), 0.5,
                                   importance.data(), selected.outputs(), threads);
  const TokenSelection selection = selected.selection(in);
  results << cpu::gather_merge(in.q.data(), DType::float32, kRow, kRow, selection, out.data(), threads);
  results << out;
  results << cpu::gather_merge_layernorm(in.q.data(), DType::float32, kRow, kRow, selection, in.bias.data(),
                                         in.bias.data(), DType::float32, 1e-5, out.data(), normed.data(),
                                         mean.data(), rstd.data(), threads);
  results << cpu::gather_merge_rmsnorm(in.q.data(), DType::float32, kRow, kRow, selection, in.bias.data(),
                                       DType::float32, 1e-5, out.data(), grad_x.data(), threads);
  results << grad_x;
  results << cpu::gather_merge_backward(in.v.data(), kRow, in.q.data(), DType::float32, kRow, kRow, selection,
                                        grad_x.data(), grad_weight.data(), threads);
  for (const auto* result : {&out, &normed, &mean, &rstd, &grad_x, &grad_weight}) results << *result;
}

void sparse24(const Inputs& in, int threads, Results& results) {
  auto values = floats(kOutFeatures * kInFeatures / 2), out = floats(kTokens * kOutFeatures);
  std::vector<std::uint8_t> indices(in.indices.size()), layout(in.layout.size());
  results << cpu::sparse24_prune(in.dense_weight(), values.data(), indices.data(), threads);
  results << cpu::sparse24_pack(in.weight(), layout.data(), threads);
  for (const std::int64_t tokens : {std::int64_t{3}, kTokens}) {
    const Sparse24Linear inputs{
        DType::float32,   in.x.data(),  kInFeatures,    tokens,         in.layout.data(),
        DType::float32,   kOutFeatures, kInFeatures,    in.bias.data(), DType::float32,
        Activation::gelu, nullptr,      DType::float32, nullptr,        0,
        nullptr};
    results << cpu::sparse24_linear(inputs, out.data(), kOutFeatures, threads);
    results << out;
  }
  results << values;
  results << indices;
  results << layout;
}

constexpr void (*kOps[])(const Inputs&, int threads, Results&) = {attention, attention_rows, scores, gathers,
                                                                  sparse24};
constexpr std::size_t kOpCount = std::size(kOps);

// Every op, from the one at `first` on.
std::vector<Results> run_ops(const Inputs& in, int threads, std::size_t first) {
  std::vector<Results> results(kOpCount);
  for (std::size_t i = 0; i < kOpCount; ++i) {
    const std::size_t op = (first + i) % kOpCount;
    kOps[op](in, threads, results[op]);
  }
  return results;
}

}  // namespace

TEST(threads_that_call_at_once_get_the_bits_of_single_calls) {
  const Inputs inputs;
  const std::vector<Results> wanted = run_ops(inputs, 1, 0);
  for (const Results& results : wanted) EXPECT(results.ok && !results.bytes.empty());

  std::atomic<int> waiting{kCallers}, different{0};
  const auto call = [&](int caller) {
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    for (int round = 0; round < kRounds; ++round) {
      const int threads = (caller + round) % 2 == 0 ? 1 : 3;
      const std::vector<Results> got = run_ops(inputs, threads, std::size_t(caller + round));
      for (std::size_t op = 0; op < kOpCount; ++op)
        if (!got[op].ok || got[op].bytes != wanted[op].bytes) ++different;
    }
  };
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) callers.emplace_back(call, caller);
  for (std::thread& caller : callers) caller.join();
  EXPECT_NEAR(different, 0, 0);
}
