// SPDX-License-Identifier: Apache-2.0
// Every entry point with a size of 0 in every place, and with sizes that are too large.

#include "sizes.h"

#include <limits>
#include <vector>

#include "madtp/attention.h"
#include "madtp/attention_rows.h"
#include "madtp/sparse24.h"
#include "madtp/tokens.h"
#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kHuge[] = {std::int64_t{1} << 31, std::int64_t{1} << 60, INT64_MAX, INT64_MIN, -1};
constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// Zeros and room for all that the tests read and write; float32 is the widest type.
struct Memory {
  std::vector<float> data = std::vector<float>(1 << 16, 0);
  float* get() { return data.data(); }
  std::uint8_t* bytes() { return reinterpret_cast<std::uint8_t*>(data.data()); }
};

}  // namespace

TEST(rows_of_an_output_are_apart) {
  EXPECT(are_apart(2, 16, 16) && are_apart(2, 16, -16) && are_apart(1, 16, 0) && are_apart(2, 0, 0));
  EXPECT(!are_apart(2, 16, 15) && !are_apart(2, 16, 0) && !are_apart(2, 16, -8));
}

TEST(products_and_sums_do_not_overflow) {
  EXPECT(product_of({3, 5, 7}) == 105);
  EXPECT(product_of({INT64_MAX, INT64_MAX, 0}) == 0);
  EXPECT(product_of({std::int64_t{1} << 31, std::int64_t{1} << 31}) == kTooLarge);
  EXPECT(product_of({kTooLarge, 4}) == kTooLarge);
  EXPECT(sum_of({kTooLarge, kTooLarge, INT64_MAX}) == kTooLarge);
  EXPECT(sum_of({1, 2, 3}) == 6);
  EXPECT(is_addressable(0, 16, INT64_MAX, 4));
  EXPECT(is_addressable(5, 16, -16, 4));
  EXPECT(!is_addressable(5, 16, INT64_MIN, 4));
  EXPECT(!is_addressable(3, 16, INT64_MAX / 2, 2));
}

// Without input features every product is 0, and the epilogue is all there is.
TEST(sparse24_sizes_of_zero) {
  for (const DType dtype : kTypes) {
    for (const std::int64_t tokens : {0, 1, 5, 70}) {
      for (const std::int64_t out_features : {0, 8, 24}) {
        for (const std::int64_t in_features : {0, 16}) {
          for (const int threads : {1, 3}) {
            Memory x, values, layout, bias, out;
            std::vector<std::uint8_t> indices(out_features * in_features / 8, 0x44);
            std::int64_t bytes = -1;
            EXPECT(cpu::sparse24_layout_bytes(out_features, in_features, dtype, &bytes) == Status::ok);
            EXPECT(out_features > 0 && in_features > 0 ? bytes > 0 : bytes == 0);
            const Sparse24Dense dense{dtype, x.get(), in_features, nullptr, 0, out_features, in_features};
            EXPECT(cpu::sparse24_prune(dense, values.get(), indices.data(), threads) == Status::ok);
            const Sparse24Weight weight{dtype, values.get(), indices.data(), out_features, in_features};
            EXPECT(cpu::sparse24_pack(weight, layout.get(), threads) == Status::ok);
            for (float& b : bias.data) b = 2;
            for (float& y : out.data) y = kNaN;
            Sparse24Linear a{
                dtype,          x.get(),     in_features, tokens,         layout.get(),     dtype,
                out_features,   in_features, bias.get(),  DType::float32, Activation::relu, nullptr,
                DType::float32, nullptr,     0,           nullptr};
            const std::int32_t num_rows = std::int32_t(tokens / 2);
            for (const std::int32_t* rows : {static_cast<const std::int32_t*>(nullptr), &num_rows}) {
              a.num_rows = rows;
              EXPECT(cpu::sparse24_linear(a, out.get(), out_features, threads) == Status::ok);
              for (std::int64_t i = 0; dtype == DType::float32 && i < tokens * out_features; ++i)
                EXPECT(out.data[i] == (rows != nullptr && i >= num_rows * out_features ? 0 : 2));
            }
          }
        }
      }
    }
  }
}

TEST(attention_sizes_of_zero) {
  const std::int32_t none[] = {0, 0, 0}, some[] = {0, 3, 3}, more[] = {0, 3, 7};
  for (const DType dtype : kTypes) {
    for (const std::int64_t heads : {0, 2}) {
      for (const std::int64_t batch : {0, 1, 2}) {
        for (const std::int32_t* cu_q : {none, some}) {
          for (const std::int32_t* cu_k : {none, some, more}) {
            for (const bool statistics : {false, true}) {
              Memory q, k, v, out, lse, summary, received, grad_q, grad_k, grad_v;
              const std::int64_t row = heads * 16;
              const AttentionInputs a{dtype,     q.get(), k.get(), v.get(),     {row, 16},   {row, 16},
                                      {row, 16}, cu_q,    cu_k,    cu_q[batch], cu_k[batch], batch,
                                      heads,     16,      1.0f,    false,       nullptr};
              std::int64_t bytes = -1;
              const bool runs = (cu_q[batch] == 0 || cu_k[batch] > 0) &&
                                !(statistics && (heads == 0 || cu_q[batch] != cu_k[batch]));
              const Status wanted = runs ? Status::ok : Status::invalid_argument;
              EXPECT(cpu::varlen_attention_workspace(a, statistics, 3, &bytes) == wanted);
              if (!runs) continue;
              std::vector<float> workspace(std::size_t(bytes) / sizeof(float) + 1, kNaN);
              for (float& s : received.data) s = kNaN;
              EXPECT(cpu::varlen_attention(a, out.get(), lse.get(), statistics ? summary.get() : nullptr,
                                           statistics ? received.get() : nullptr, workspace.data(),
                                           3) == Status::ok);
              for (std::int64_t j = 0; statistics && j < cu_q[batch]; ++j)
                EXPECT_NEAR(received.data[j], 2.0 / 3, 1e-6);
              EXPECT(cpu::varlen_attention_backward_workspace(a, statistics, 3, &bytes) == Status::ok);
              workspace.assign(std::size_t(bytes) / sizeof(float) + 1, kNaN);
              const float* const rows = statistics ? summary.get() : nullptr;
              for (float& g : grad_k.data) g = kNaN;
              EXPECT(cpu::varlen_attention_backward(a,
                                                    {out.get(), lse.get(), out.get(), rows, rows,
                                                     grad_q.get(), grad_k.get(), grad_v.get()},
                                                    workspace.data(), 3) == Status::ok);
              for (std::int64_t i = 0; dtype == DType::float32 && i < cu_k[batch] * row; ++i)
                EXPECT(grad_k.data[i] == 0);
            }
          }
        }
      }
    }
  }
  Memory memory;
  AttentionInputs a{};
  a.cu_seqlens_q = a.cu_seqlens_k = none;
  std::int64_t bytes = -1;  // head_dim 0
  EXPECT(cpu::varlen_attention_workspace(a, false, 1, &bytes) == Status::invalid_argument && bytes == -1);
}

TEST(a_long_sequence_does_not_make_short_ones_large) {
  std::vector<std::int32_t> ends{0, 4096};
  for (int i = 0; i < 1000; ++i) ends.push_back(ends.back() + 8);
  const float q[8] = {};
  const auto bytes_of = [&](std::int64_t batch) {
    const std::int64_t tokens = ends[std::size_t(batch)];
    const AttentionInputs a{DType::float32, q,           q,      q,      {8, 8}, {8, 8}, {8, 8},
                            ends.data(),    ends.data(), tokens, tokens, batch,  1,      8,
                            1.0f,           false,       nullptr};
    std::int64_t bytes = -1;
    EXPECT(cpu::varlen_attention_workspace(a, true, 1, &bytes) == Status::ok);
    return bytes;
  };
  EXPECT(bytes_of(1001) < bytes_of(1) + 1000 * 1024);
}

TEST(token_sizes_of_zero) {
  const std::int32_t none[] = {0, 0, 0}, some[] = {0, 0, 3};
  for (const DType dtype : kTypes) {
    for (const std::int32_t* cu_seqlens : {none, some}) {
      for (const std::int64_t batch : {0, 1, 2}) {
        for (const std::int64_t alignment_tokens : {0, 1, 9}) {
          for (const double temperature : {0.0, 1.0}) {
            Memory logits, statistic, importance, merge_weight;
            std::vector<std::uint8_t> keep(4, 7);
            std::vector<std::int32_t> ends(4, 7), source(4, 7);
            const std::int64_t tokens = cu_seqlens[batch];
            const ScoreInputs inputs{logits.get(), dtype, alignment_tokens, alignment_tokens, cu_seqlens,
                                     tokens,       batch, nullptr};
            const SelectionOutputs outputs{keep.data(), ends.data(), source.data(), merge_weight.get()};
            const Status wanted = alignment_tokens > 0 ? Status::ok : Status::invalid_argument;
            EXPECT(cpu::token_importance(statistic.get(), statistic.get(), inputs, importance.get(), 2) ==
                   wanted);
            EXPECT(cpu::select_tokens(importance.get(), inputs, temperature, outputs, 2) == wanted);
            EXPECT(cpu::score_and_select(statistic.get(), statistic.get(), inputs, temperature,
                                         importance.get(), outputs, 2) == wanted);
            if (wanted == Status::ok) EXPECT(ends[0] == 0 && ends[batch] <= tokens && ends[batch + 1] == 7);
            if (wanted == Status::ok) EXPECT(keep[tokens] == 7 && source[tokens] == 7);
          }
        }
        for (const std::int64_t channels : {0, 5}) {
          for (const std::int64_t capacity : {0, 3, 4}) {
            const std::int64_t tokens = cu_seqlens[batch];
            if (capacity < tokens) continue;
            Memory x, out, normed, merge_weight, mean, rstd, grad_x;
            const std::vector<std::uint8_t> keep(4, 1);
            std::vector<std::int32_t> source{0, 1, 2, padding_row};
            for (std::int64_t i = tokens; i < 4; ++i) source[i] = padding_row;
            for (Memory* m : {&out, &normed, &mean, &grad_x})
              for (float& y : m->data) y = kNaN;
            const TokenSelection s{keep.data(),        cu_seqlens, cu_seqlens, source.data(),
                                   merge_weight.get(), tokens,     capacity,   batch};
            EXPECT(cpu::gather_merge(x.get(), dtype, channels, channels, s, out.get(), 2) == Status::ok);
            EXPECT(cpu::gather_merge_layernorm(x.get(), dtype, channels, channels, s, x.get(), x.get(), dtype,
                                               1e-5, out.get(), normed.get(), mean.get(), rstd.get(),
                                               2) == Status::ok);
            EXPECT(cpu::gather_merge_backward(out.get(), channels, x.get(), dtype, channels, channels, s,
                                              grad_x.get(), merge_weight.get(), 2) == Status::ok);
            for (std::int64_t i = 0; dtype == DType::float32 && i < capacity * channels; ++i)
              EXPECT(out.data[i] == 0 && normed.data[i] == 0);
            EXPECT(cpu::gather_merge_rmsnorm(x.get(), dtype, channels, channels, s, x.get(), dtype, 1e-5,
                                             out.get(), normed.get(), 2) == Status::ok);
            for (std::int64_t i = tokens; i < capacity; ++i) EXPECT(mean.data[i] == 0);
          }
        }
      }
    }
  }
}

TEST(sizes_that_are_too_large_are_refused) {
  const std::int32_t none[] = {0, 0}, some[] = {0, 3};
  Memory memory;
  float* const m = memory.get();
  std::vector<std::int32_t> ints(8, 0);
  std::int64_t bytes = -1;
  const auto refused = [](Status status) { EXPECT(status == Status::invalid_argument); };

  for (const std::int64_t size : kHuge) {
    for (const std::int32_t* cu_seqlens : {none, some}) {
      const std::int64_t tokens = cu_seqlens[1];
      const AttentionInputs good{DType::float32, m,          m,      m,      {32, 16}, {32, 16}, {32, 16},
                                 cu_seqlens,     cu_seqlens, tokens, tokens, 1,        2,        16,
                                 1.0f,           false,      nullptr};
      const auto attention = [&](auto change) {
        AttentionInputs a = good;
        change(a);
        refused(cpu::varlen_attention_workspace(a, true, 1, &bytes));
        refused(cpu::varlen_attention_backward_workspace(a, false, 1, &bytes));
        refused(cpu::varlen_attention(a, m, m, m, m, m, 1));
        refused(cpu::varlen_attention_backward(a, {m, m, m, m, m, m, m, m}, m, 1));
      };
      attention([&](AttentionInputs& a) { a.heads = size; });
      attention([&](AttentionInputs& a) { a.key_heads = size; });
      attention([&](AttentionInputs& a) { a.head_dim = size; });
      attention([&](AttentionInputs& a) { a.batch = size; });
      attention([&](AttentionInputs& a) { a.tokens_q = size; });
      attention([&](AttentionInputs& a) { a.tokens_k = size; });

      const AttentionRowsInputs rows{DType::float32, m, m, {32, 16}, {32, 16}, cu_seqlens, cu_seqlens, tokens,
                                     tokens,         1, 2, 2,        16,       1.0f,       nullptr};
      const auto attention_rows = [&](auto change) {
        AttentionRowsInputs a = rows;
        change(a);
        refused(cpu::attention_rows_workspace(a, 1, &bytes));
        refused(cpu::attention_rows(a, m, m, 1));
      };
      attention_rows([&](AttentionRowsInputs& a) { a.heads = size; });
      attention_rows([&](AttentionRowsInputs& a) { a.key_heads = size; });
      attention_rows([&](AttentionRowsInputs& a) { a.head_dim = size; });
      attention_rows([&](AttentionRowsInputs& a) { a.batch = size; });
      attention_rows([&](AttentionRowsInputs& a) { a.rows = size; });
      attention_rows([&](AttentionRowsInputs& a) { a.tokens = size; });

      const ScoreInputs scores{m, DType::float32, 4, 4, cu_seqlens, tokens, 1, nullptr};
      const SelectionOutputs outputs{memory.bytes(), ints.data(), ints.data(), m};
      const auto score = [&](auto change) {
        ScoreInputs s = scores;
        change(s);
        refused(cpu::token_importance(m, m, s, m, 1));
        refused(cpu::select_tokens(m, s, 1, outputs, 1));
        refused(cpu::score_and_select(m, m, s, 1, m, outputs, 1));
      };
      score([&](ScoreInputs& s) { s.alignment_tokens = size; });
      score([&](ScoreInputs& s) { s.batch = size; });
      score([&](ScoreInputs& s) { s.tokens = size; });

      const TokenSelection selection{memory.bytes(), cu_seqlens, cu_seqlens, ints.data(), m,
                                     tokens,         tokens,     1};
      const auto gather = [&](TokenSelection s, std::int64_t channels) {
        refused(cpu::gather_merge(m, DType::float32, 4, channels, s, m, 1));
        refused(cpu::gather_merge_backward(m, 4, m, DType::float32, 4, channels, s, m, m, 1));
        refused(cpu::gather_merge_layernorm(m, DType::float32, 4, channels, s, m, m, DType::float32, 1e-5, m,
                                            m, m, m, 1));
        refused(
            cpu::gather_merge_rmsnorm(m, DType::float32, 4, channels, s, m, DType::float32, 1e-5, m, m, 1));
      };
      gather(selection, size);
      TokenSelection odd = selection;
      odd.batch = size;
      gather(odd, 4);
      odd = selection;
      odd.tokens = size;
      gather(odd, 4);
      odd = selection;
      odd.capacity = size;
      gather(odd, 4);
    }
    refused(cpu::sparse24_layout_bytes(size, 16, DType::float32, &bytes));
    refused(cpu::sparse24_layout_bytes(8, size, DType::bfloat16, &bytes));
    refused(cpu::sparse24_pack({DType::float32, m, memory.bytes(), size, 0}, m, 1));
    refused(cpu::sparse24_prune({DType::float32, m, 0, nullptr, 0, 0, size}, m, memory.bytes(), 1));
    Sparse24Linear a{};
    a.x = a.layout = m;
    a.tokens = size;
    refused(cpu::sparse24_linear(a, m, 0, 1));
  }

  constexpr std::int64_t kMost = INT32_MAX / 16 * 16;
  refused(cpu::sparse24_layout_bytes(kMost, kMost, DType::float32, &bytes));
  refused(cpu::sparse24_layout_bytes(kMost, kMost, DType::bfloat16, &bytes));
  EXPECT(bytes == -1);
  EXPECT(cpu::sparse24_layout_bytes(kMost, 1 << 20, DType::float32, &bytes) == Status::ok && bytes > kMost);
}

TEST(strides_and_workspaces_that_are_too_large_are_refused) {
  Memory memory;
  float* const m = memory.get();
  const std::int32_t cu_seqlens[] = {0, 3}, source[] = {0, 1, 2};
  const auto refused = [](Status status) { EXPECT(status == Status::invalid_argument); };
  std::int64_t bytes = -1;
  for (const std::int64_t stride : {INT64_MAX, INT64_MIN, std::int64_t{1} << 60}) {
    AttentionInputs a{DType::float32, m,          m,      m, {32, 16}, {32, 16}, {32, 16},
                      cu_seqlens,     cu_seqlens, 3,      3, 1,        2,        16,
                      1.0f,           false,      nullptr};
    for (std::int64_t* strides : {a.q_strides, a.k_strides, a.v_strides}) {
      for (int i : {0, 1}) {
        const std::int64_t before = strides[i];
        strides[i] = stride;
        refused(cpu::varlen_attention_workspace(a, false, 1, &bytes));
        strides[i] = before;
      }
    }
    AttentionRowsInputs rows{
        DType::float32, m, m, {32, 16}, {32, 16}, cu_seqlens, cu_seqlens, 3, 3, 1, 2, 2, 16, 1.0f, nullptr};
    for (std::int64_t* strides : {rows.q_strides, rows.k_strides}) {
      for (int i : {0, 1}) {
        const std::int64_t before = strides[i];
        strides[i] = stride;
        refused(cpu::attention_rows_workspace(rows, 1, &bytes));
        strides[i] = before;
      }
    }
    a.alibi_slopes = m;
    a.alibi_stride = stride;
    refused(cpu::varlen_attention_workspace(a, false, 1, &bytes));
    refused(cpu::token_importance(m, m, {m, DType::float32, stride, 4, cu_seqlens, 3, 1, nullptr}, m, 1));
    const TokenSelection s{memory.bytes(), cu_seqlens, cu_seqlens, source, m, 3, 3, 1};
    refused(cpu::gather_merge(m, DType::float32, stride, 4, s, m, 1));
    refused(cpu::gather_merge_backward(m, stride, m, DType::float32, 4, 4, s, m, m, 1));
    refused(cpu::sparse24_prune({DType::float32, m, stride, nullptr, 0, 8, 16}, m, memory.bytes(), 1));
    refused(cpu::sparse24_prune({DType::float32, m, 16, m, stride, 8, 16}, m, memory.bytes(), 1));
    Sparse24Linear linear{DType::float32,
                          m,
                          16,
                          3,
                          m,
                          DType::float32,
                          8,
                          16,
                          nullptr,
                          DType::float32,
                          Activation::none,
                          nullptr,
                          DType::float32,
                          m,
                          8,
                          nullptr};
    refused(cpu::sparse24_linear(linear, m, stride, 1));
    linear.residual_stride = stride;
    refused(cpu::sparse24_linear(linear, m, 8, 1));
    linear.residual_stride = 8;
    linear.x_stride = stride;
    refused(cpu::sparse24_linear(linear, m, 8, 1));
  }

  // A sequence of all tokens that there can be, and one of all heads: no memory holds the statistics.
  const std::int32_t all[] = {0, INT32_MAX};
  const AttentionInputs most{DType::bfloat16, m,         m, m,         {0, 0}, {0, 0}, {0, 0}, all,    all,
                             INT32_MAX,       INT32_MAX, 1, INT32_MAX, 16,     1.0f,   false,  nullptr};
  refused(cpu::varlen_attention_workspace(most, true, 1 << 30, &bytes));
  refused(cpu::varlen_attention_backward_workspace(most, true, 1 << 30, &bytes));
  EXPECT(bytes == -1);
}
