// SPDX-License-Identifier: Apache-2.0
#include "madtp/attention_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  std::vector<std::int32_t> cu_q{0}, cu_k{0}, position;
  std::int64_t heads, key_heads, dim;
  std::vector<float> q, k;

  Problem(const std::vector<std::int32_t>& rows, const std::vector<std::int32_t>& keys, std::int64_t h,
          std::int64_t hk, std::int64_t d)
      : heads(h), key_heads(hk), dim(d) {
    for (std::int32_t count : rows) cu_q.push_back(cu_q.back() + count);
    for (std::int32_t count : keys) cu_k.push_back(cu_k.back() + count);
    std::mt19937 generator(7);
    std::normal_distribution<float> normal(0, 1);
    q.resize(std::size_t(cu_q.back() * heads * dim));
    k.resize(std::size_t(cu_k.back() * key_heads * dim));
    for (std::vector<float>* x : {&q, &k})
      for (float& value : *x) value = normal(generator);
    for (std::int32_t i = 0; i < cu_q.back(); ++i) position.push_back(i * 13 % 45 - 2);
  }

  AttentionRowsInputs inputs(bool positions) const {
    return {DType::float32,
            q.data(),
            k.data(),
            {heads * dim, dim},
            {key_heads * dim, dim},
            cu_q.data(),
            cu_k.data(),
            cu_q.back(),
            cu_k.back(),
            std::int64_t(cu_q.size()) - 1,
            heads,
            key_heads,
            dim,
            0.2f,
            positions ? position.data() : nullptr};
  }
};

// With as many floats of workspace as asked for, none more, and none a number.
Status attend(const AttentionRowsInputs& inputs, std::vector<float>& out, int threads) {
  std::int64_t bytes = 0;
  std::vector<float> workspace(1, kNaN);
  if (cpu::attention_rows_workspace(inputs, threads, &bytes) == Status::ok && bytes > 0)
    workspace.assign(std::size_t(bytes) / sizeof(float), kNaN);
  out.assign(std::size_t(std::max<std::int64_t>(inputs.tokens, 0)), kNaN);
  return cpu::attention_rows(inputs, out.data(), workspace.data(), threads);
}

// The equation, one row at a time in double.
std::vector<double> expected(const Problem& p, bool positions) {
  std::vector<double> result(std::size_t(p.cu_k.back()), 0);
  for (std::size_t b = 0; b + 1 < p.cu_q.size(); ++b) {
    const std::int64_t begin = p.cu_k[b], keys = p.cu_k[b + 1] - begin;
    const auto seen = [&](std::int64_t i) {
      return positions ? std::min(std::max<std::int64_t>(p.position[std::size_t(i)] + 1, 0), keys) : keys;
    };
    std::int64_t rows = 0;
    for (std::int64_t i = p.cu_q[b]; i < p.cu_q[b + 1]; ++i) rows += seen(i) > 0;
    for (std::int64_t i = p.cu_q[b]; i < p.cu_q[b + 1]; ++i) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        std::vector<double> weights(std::size_t(seen(i)), 0);
        double peak = -1e300, total = 0;
        for (std::size_t j = 0; j < weights.size(); ++j) {
          const float* const query = &p.q[std::size_t((i * p.heads + h) * p.dim)];
          const std::int64_t key_head = h / (p.heads / p.key_heads);
          const float* const key =
              &p.k[std::size_t(((begin + std::int64_t(j)) * p.key_heads + key_head) * p.dim)];
          for (std::int64_t d = 0; d < p.dim; ++d) weights[j] += double(0.2f) * query[d] * key[d];
          peak = std::max(peak, weights[j]);
        }
        for (double& weight : weights) total += weight = std::exp(weight - peak);
        for (std::size_t j = 0; j < weights.size(); ++j)
          result[std::size_t(begin) + j] += weights[j] / total / double(rows * p.heads);
      }
    }
  }
  return result;
}

}  // namespace

TEST(attention_rows_follow_their_equation) {
  for (const std::int64_t dim : {1, 8, 20, 64, 136, 256}) {
    for (const std::int64_t key_heads : {1, 2, 4}) {
      const Problem p({3, 0, 17, 1, 2}, {70, 5, 41, 33, 0}, 4, key_heads, dim);
      for (const bool positions : {false, true}) {
        const std::vector<double> wanted = expected(p, positions);
        for (const int threads : {1, 3}) {
          std::vector<float> got;
          EXPECT(attend(p.inputs(positions), got, threads) == Status::ok);
          for (std::size_t j = 0; j < got.size(); ++j) EXPECT_NEAR(got[j], wanted[j], 1e-6);
        }
      }
    }
  }
}

TEST(attention_rows_read_bfloat16_and_strides) {
  const Problem p({2, 4}, {19, 30}, 6, 3, 40);
  Problem rounded = p;
  const auto narrow = [](std::vector<float>& values) {
    std::vector<std::uint16_t> bits(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::uint32_t wide;
      std::memcpy(&wide, &values[i], sizeof wide);
      wide &= 0xffff0000u;
      std::memcpy(&values[i], &wide, sizeof wide);
      bits[i] = std::uint16_t(wide >> 16);
    }
    return bits;
  };
  const std::vector<std::uint16_t> q = narrow(rounded.q), k = narrow(rounded.k);
  std::vector<std::uint16_t> by_head(k.size());  // (key_heads, tokens, head_dim), as a cache has them
  for (std::int64_t j = 0; j < 49; ++j)
    for (std::int64_t h = 0; h < 3; ++h)
      std::copy_n(&k[std::size_t((j * 3 + h) * 40)], 40, &by_head[std::size_t((h * 49 + j) * 40)]);
  AttentionRowsInputs inputs = rounded.inputs(true);
  inputs.dtype = DType::bfloat16, inputs.q_rows = q.data(), inputs.k = by_head.data();
  inputs.k_strides[0] = 40, inputs.k_strides[1] = 49 * 40;
  std::vector<float> got;
  EXPECT(attend(inputs, got, 2) == Status::ok);
  const std::vector<double> wanted = expected(rounded, true);
  for (std::size_t j = 0; j < got.size(); ++j) EXPECT_NEAR(got[j], wanted[j], 1e-6);
}

TEST(attention_rows_do_not_depend_on_threads_or_on_other_sequences) {
  const Problem p({90, 3, 0, 7}, {50, 60, 4, 130}, 4, 2, 24);
  std::vector<float> one, more, alone;
  EXPECT(attend(p.inputs(true), one, 1) == Status::ok);
  for (const int threads : {2, 3, 40}) {
    EXPECT(attend(p.inputs(true), more, threads) == Status::ok);
    EXPECT(more == one);
  }
  AttentionRowsInputs inputs = p.inputs(true);
  const std::int32_t rows[] = {0, 7}, keys[] = {0, 130};
  inputs.cu_seqlens_q = rows, inputs.cu_seqlens_k = keys, inputs.rows = 7, inputs.tokens = 130,
  inputs.batch = 1;
  inputs.q_rows = &p.q[93 * 4 * 24], inputs.k = &p.k[114 * 2 * 24], inputs.row_position += 93;
  EXPECT(attend(inputs, alone, 1) == Status::ok);
  EXPECT(std::equal(alone.begin(), alone.end(), one.begin() + 114));
}

TEST(attention_rows_that_see_nothing_count_for_nothing) {
  Problem p({3, 2}, {20, 9}, 2, 1, 16);
  std::vector<float> got;
  p.position = {-1, 4, INT32_MIN, -1, -7};
  for (std::size_t i = 5 * 16; i < p.k.size(); ++i) p.k[i] = kNaN;  // keys that no row sees
  EXPECT(attend(p.inputs(true), got, 1) == Status::ok);
  double total = 0;
  for (std::size_t j = 0; j < 5; ++j) total += got[j];
  EXPECT_NEAR(total, 1, 1e-6);
  for (std::size_t j = 5; j < got.size(); ++j) EXPECT(got[j] == 0);
  p.position = {19, INT32_MAX, 19, 0, 8};
  EXPECT(attend(p.inputs(true), got, 1) == Status::ok);
  for (std::size_t j = 0; j < got.size(); ++j) EXPECT(std::isnan(got[j]));
}

TEST(attention_rows_of_nothing) {
  for (const auto& [rows, keys] : {std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>>{{}, {}},
                                   {{0, 0}, {5, 0}},
                                   {{2, 3}, {0, 0}},
                                   {{0, 1}, {3, 2}}}) {
    const Problem p(rows, keys, 2, 1, 8);
    std::vector<float> got;
    EXPECT(attend(p.inputs(false), got, 3) == Status::ok);
    const bool some = rows.size() == 2 && rows[1] == 1;
    for (std::size_t j = 0; j < got.size(); ++j) EXPECT((got[j] == 0) == !(some && j >= 3));
  }
}

TEST(bad_arguments_of_attention_rows_are_refused) {
  const Problem p({2, 1}, {4, 3}, 4, 2, 16);
  const auto refused = [&](auto change) {
    AttentionRowsInputs inputs = p.inputs(true);
    change(inputs);
    std::vector<float> out(7, 5), workspace(1 << 12, 5);
    EXPECT(cpu::attention_rows(inputs, out.data(), workspace.data(), 1) == Status::invalid_argument);
    EXPECT(out == std::vector<float>(7, 5));
    std::int64_t bytes = -1;
    EXPECT(cpu::attention_rows_workspace(inputs, 1, &bytes) == Status::invalid_argument && bytes == -1);
  };
  const std::int32_t other[] = {0, 5, 3};
  refused([](AttentionRowsInputs& a) { a.key_heads = 3; });
  refused([](AttentionRowsInputs& a) { a.key_heads = 0; });
  refused([](AttentionRowsInputs& a) { a.heads = 0; });
  refused([](AttentionRowsInputs& a) { a.head_dim = 0; });
  refused([](AttentionRowsInputs& a) { a.dtype = DType(3); });
  refused([](AttentionRowsInputs& a) { a.k = nullptr; });
  refused([](AttentionRowsInputs& a) { a.q_rows = nullptr; });
  refused([](AttentionRowsInputs& a) { a.rows = 4; });
  refused([](AttentionRowsInputs& a) { a.tokens = 6; });
  refused([](AttentionRowsInputs& a) { a.softmax_scale = kNaN; });
  refused([&](AttentionRowsInputs& a) { a.cu_seqlens_q = other; });
  std::vector<float> out(7, 5), workspace(1 << 12, 5);
  EXPECT(cpu::attention_rows(p.inputs(true), nullptr, workspace.data(), 1) == Status::invalid_argument);
  EXPECT(cpu::attention_rows(p.inputs(true), out.data(), nullptr, 1) == Status::invalid_argument);
  EXPECT(cpu::attention_rows(p.inputs(true), out.data(), workspace.data(), 0) == Status::invalid_argument);
}
