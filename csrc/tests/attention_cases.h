// SPDX-License-Identifier: Apache-2.0
#pragma once

// Problems of attention with random inputs, and what the equations give for them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "madtp/attention.h"
#include "tests/test.h"

namespace madtp::test {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// As many floats as asked for, none more, and none a number; one for arguments that are refused anyway.
inline std::vector<float> workspace(decltype(cpu::varlen_attention_workspace) size,
                                    const AttentionInputs& inputs, bool statistics, int threads) {
  std::int64_t bytes = 0;
  if (size(inputs, statistics, threads, &bytes) != Status::ok) return {kNaN};
  return std::vector<float>(bytes > 0 ? bytes / sizeof(float) : 1, kNaN);
}

inline Status attend(const AttentionInputs& inputs, void* out, float* lse, float* summary_attention,
                     float* received_attention, int threads) {
  auto memory = workspace(cpu::varlen_attention_workspace, inputs, summary_attention != nullptr, threads);
  return cpu::varlen_attention(inputs, out, lse, summary_attention, received_attention, memory.data(),
                               threads);
}

inline Status differentiate(const AttentionInputs& inputs, const cpu::AttentionGradients& gradients,
                            int threads) {
  const bool statistics = gradients.grad_summary_attention != nullptr;
  auto memory = workspace(cpu::varlen_attention_backward_workspace, inputs, statistics, threads);
  return cpu::varlen_attention_backward(inputs, gradients, memory.data(), threads);
}

struct Problem {
  std::vector<std::int32_t> cu_q, cu_k, summary_index;
  std::int64_t heads, key_heads, dim;
  bool causal;
  std::int64_t window_left = -1, window_right = -1;
  float softcap = 0;
  std::vector<float> slopes;  // (batch, heads), or none
  std::vector<float> q, k, v;

  Problem(std::vector<std::int32_t> q_lengths, std::vector<std::int32_t> k_lengths, std::int64_t h,
          std::int64_t d, bool c, std::int64_t key_h = 0)
      : heads(h), key_heads(key_h > 0 ? key_h : h), dim(d), causal(c) {
    cu_q = ends(q_lengths), cu_k = ends(k_lengths);
    for (std::size_t b = 0; b < q_lengths.size(); ++b)
      summary_index.push_back(b % 3 == 2 ? -1 : q_lengths[b] > 0 ? q_lengths[b] / 2 : 0);
    std::mt19937 generator(7);
    std::normal_distribution<float> normal(0, 1);
    for (std::vector<float>* x : {&q, &k, &v}) {
      x->resize(std::size_t((x == &q ? cu_q : cu_k).back()) * (x == &q ? heads : key_heads) * dim);
      for (float& value : *x) value = normal(generator);
    }
  }

  AttentionInputs inputs() const {
    const std::int64_t row = heads * dim, key_row = key_heads * dim;
    return {DType::float32,
            q.data(),
            k.data(),
            v.data(),
            {row, dim},
            {key_row, dim},
            {key_row, dim},
            cu_q.data(),
            cu_k.data(),
            cu_q.back(),
            cu_k.back(),
            std::int64_t(cu_q.size()) - 1,
            heads,
            dim,
            0.2f,
            causal,
            summary_index.data(),
            key_heads,
            window_left,
            window_right,
            softcap,
            slopes.empty() ? nullptr : slopes.data(),
            heads};
  }

  // Slopes that differ from sequence to sequence.
  void tilt() {
    for (std::size_t i = 0; i + 1 < cu_q.size(); ++i)
      for (std::int64_t h = 0; h < heads; ++h) slopes.push_back(float(h) / float(2 << (i % 3)));
  }

  bool is_masked() const { return causal || window_left >= 0 || window_right >= 0; }

  // Whether query i of n sees key j of m.
  bool sees(std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t m) const {
    const std::int64_t ahead = j - (i + m - n), right = causal ? 0 : window_right;
    return (right < 0 || ahead <= right) && (window_left < 0 || -ahead <= window_left);
  }

  // The score of query i and key j of sequence b.
  double score(std::size_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t position = i + (cu_k[b + 1] - cu_k[b]) - (cu_q[b + 1] - cu_q[b]);
    const float* const x = &q[((cu_q[b] + i) * heads + h) * dim];
    const float* const y = &k[((cu_k[b] + j) * key_heads + h / (heads / key_heads)) * dim];
    double score = 0;
    for (std::int64_t d = 0; d < dim; ++d) score += 0.2f * double(x[d]) * y[d];
    if (softcap > 0) score = softcap * std::tanh(score / softcap);
    return score - (slopes.empty() ? 0 : slopes[b * heads + h] * double(std::abs(position - j)));
  }

 private:
  static std::vector<std::int32_t> ends(const std::vector<std::int32_t>& lengths) {
    std::vector<std::int32_t> result{0};
    for (std::int32_t length : lengths) result.push_back(result.back() + length);
    return result;
  }
};

struct Outputs {
  std::vector<float> out, lse, summary_attention, received_attention;
  explicit Outputs(const Problem& p)
      : out(p.q.size(), kNaN),
        lse(p.heads * p.cu_q.back(), kNaN),
        summary_attention(p.cu_q.back(), kNaN),
        received_attention(p.cu_q.back(), kNaN) {}
};

// The equations, one query at a time in double.
inline Outputs expected(const Problem& p, bool statistics) {
  Outputs result(p);
  for (std::size_t b = 0; b + 1 < p.cu_q.size(); ++b) {
    const std::int64_t q0 = p.cu_q[b], n = p.cu_q[b + 1] - q0, k0 = p.cu_k[b], m = p.cu_k[b + 1] - k0;
    std::vector<double> best(n * m), from_summary(p.heads * m), norms(n * p.heads);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> weights(m, -std::numeric_limits<double>::infinity());
        double peak = -1e300, total = 0;
        for (std::int64_t j = 0; j < m; ++j) {
          if (p.sees(i, n, j, m)) weights[j] = p.score(b, h, i, j);
          peak = std::max(peak, weights[j]);
        }
        for (std::int64_t j = 0; j < m; ++j) total += weights[j] = std::exp(weights[j] - peak);
        result.lse[h * p.cu_q.back() + q0 + i] = float(peak + std::log(total));
        if (total == 0) total = 1;
        double norm = 0;
        for (std::int64_t d = 0; d < p.dim; ++d) {
          double value = 0;
          for (std::int64_t j = 0; j < m; ++j)
            value +=
                weights[j] / total * p.v[((k0 + j) * p.key_heads + h / (p.heads / p.key_heads)) * p.dim + d];
          result.out[((q0 + i) * p.heads + h) * p.dim + d] = float(value);
          norm += value * value;
        }
        norms[i * p.heads + h] = std::sqrt(norm);
        for (std::int64_t j = 0; j < m; ++j) {
          best[i * m + j] = std::max(best[i * m + j], weights[j] / total);
          if (i == p.summary_index[b]) from_summary[h * m + j] = weights[j] / total;
        }
      }
    }
    if (!statistics) continue;
    for (std::int64_t j = 0; j < n; ++j) {
      double received = 0, observers = 0, norm = 0, weighted = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        if (i == p.summary_index[b] || !p.sees(i, n, j, n)) continue;
        received += best[i * m + j];
        observers += 1;
      }
      for (std::int64_t h = 0; h < p.heads; ++h) {
        norm += norms[j * p.heads + h];
        weighted += norms[j * p.heads + h] * from_summary[h * m + j];
      }
      result.received_attention[q0 + j] = float(received / (p.is_masked() ? std::max(observers, 1.0) : 1.0));
      result.summary_attention[q0 + j] = float(weighted / norm);
    }
  }
  return result;
}

// Every mask and bias, and some together.
template <typename Change>
inline void with_options(Change&& run) {
  for (int option = 0; option < 8; ++option)
    run([option](Problem& p) {
      if (option == 1 || option == 7) p.causal = true;
      if (option == 2 || option == 7) p.window_left = 37, p.window_right = 5;
      if (option == 3) p.window_right = 2;
      if (option == 4) p.window_left = 0, p.window_right = 0;
      if (option == 5 || option == 7) p.softcap = 1.5f;
      if (option == 6 || option == 7) p.tilt();
    });
}

inline void expect_equal(const std::vector<float>& got, const std::vector<float>& wanted, double tolerance) {
  EXPECT(got.size() == wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    if (got[i] != wanted[i]) EXPECT_NEAR(got[i], wanted[i], tolerance);  // infinities are equal
}

}  // namespace madtp::test
