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
  std::int64_t heads, dim;
  bool causal;
  std::vector<float> q, k, v;

  Problem(std::vector<std::int32_t> q_lengths, std::vector<std::int32_t> k_lengths, std::int64_t h,
          std::int64_t d, bool c)
      : heads(h), dim(d), causal(c) {
    cu_q = ends(q_lengths), cu_k = ends(k_lengths);
    for (std::size_t b = 0; b < q_lengths.size(); ++b)
      summary_index.push_back(b % 3 == 2 ? -1 : q_lengths[b] > 0 ? q_lengths[b] / 2 : 0);
    std::mt19937 generator(7);
    std::normal_distribution<float> normal(0, 1);
    for (std::vector<float>* x : {&q, &k, &v}) {
      x->resize(std::size_t((x == &q ? cu_q : cu_k).back()) * heads * dim);
      for (float& value : *x) value = normal(generator);
    }
  }

  AttentionInputs inputs() const {
    const std::int64_t row = heads * dim;
    return {DType::float32,
            q.data(),
            k.data(),
            v.data(),
            {row, dim},
            {row, dim},
            {row, dim},
            cu_q.data(),
            cu_k.data(),
            cu_q.back(),
            cu_k.back(),
            std::int64_t(cu_q.size()) - 1,
            heads,
            dim,
            0.2f,
            causal,
            summary_index.data()};
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
        const std::int64_t seen = p.causal ? i + 1 : m;
        std::vector<double> weights(m, 0);
        double peak = -1e300, total = 0;
        for (std::int64_t j = 0; j < seen; ++j) {
          for (std::int64_t d = 0; d < p.dim; ++d)
            weights[j] += 0.2f * double(p.q[((q0 + i) * p.heads + h) * p.dim + d]) *
                          p.k[((k0 + j) * p.heads + h) * p.dim + d];
          peak = std::max(peak, weights[j]);
        }
        for (std::int64_t j = 0; j < seen; ++j) total += weights[j] = std::exp(weights[j] - peak);
        result.lse[h * p.cu_q.back() + q0 + i] = float(peak + std::log(total));
        double norm = 0;
        for (std::int64_t d = 0; d < p.dim; ++d) {
          double value = 0;
          for (std::int64_t j = 0; j < seen; ++j)
            value += weights[j] / total * p.v[((k0 + j) * p.heads + h) * p.dim + d];
          result.out[((q0 + i) * p.heads + h) * p.dim + d] = float(value);
          norm += value * value;
        }
        norms[i * p.heads + h] = std::sqrt(norm);
        for (std::int64_t j = 0; j < seen; ++j) {
          best[i * m + j] = std::max(best[i * m + j], weights[j] / total);
          if (i == p.summary_index[b]) from_summary[h * m + j] = weights[j] / total;
        }
      }
    }
    if (!statistics) continue;
    for (std::int64_t j = 0; j < n; ++j) {
      double received = 0, observers = 0, norm = 0, weighted = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        if (i == p.summary_index[b] || (p.causal && i < j)) continue;
        received += best[i * m + j];
        observers += 1;
      }
      for (std::int64_t h = 0; h < p.heads; ++h) {
        norm += norms[j * p.heads + h];
        weighted += norms[j * p.heads + h] * from_summary[h * m + j];
      }
      result.received_attention[q0 + j] = float(received / (p.causal ? std::max(observers, 1.0) : 1.0));
      result.summary_attention[q0 + j] = float(weighted / norm);
    }
  }
  return result;
}

inline void expect_equal(const std::vector<float>& got, const std::vector<float>& wanted, double tolerance) {
  EXPECT(got.size() == wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], wanted[i], tolerance);
}

}  // namespace madtp::test
