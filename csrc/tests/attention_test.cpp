// SPDX-License-Identifier: Apache-2.0
#include "madtp/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// As many floats as asked for, none more, and none a number; one for arguments that are refused anyway.
std::vector<float> workspace(decltype(cpu::varlen_attention_workspace) size, const AttentionInputs& inputs,
                             bool statistics, int threads) {
  std::int64_t bytes = 0;
  if (size(inputs, statistics, threads, &bytes) != Status::ok) return {kNaN};
  return std::vector<float>(bytes > 0 ? bytes / sizeof(float) : 1, kNaN);
}

Status attend(const AttentionInputs& inputs, float* out, float* lse, float* summary_attention,
              float* received_attention, int threads) {
  auto memory = workspace(cpu::varlen_attention_workspace, inputs, summary_attention != nullptr, threads);
  return cpu::varlen_attention(inputs, out, lse, summary_attention, received_attention, memory.data(),
                               threads);
}

Status differentiate(const AttentionInputs& inputs, const cpu::AttentionGradients& gradients, int threads) {
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
  std::vector<float> out, summary_attention, received_attention;
  explicit Outputs(const Problem& p)
      : out(p.q.size(), kNaN),
        summary_attention(p.cu_q.back(), kNaN),
        received_attention(p.cu_q.back(), kNaN) {}
};

// The equations, one query at a time in double.
Outputs expected(const Problem& p, bool statistics) {
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

void expect_equal(const std::vector<float>& got, const std::vector<float>& wanted, double tolerance) {
  EXPECT(got.size() == wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], wanted[i], tolerance);
}

}  // namespace

TEST(self_attention_with_statistics) {
  for (std::int64_t dim : {16, 32, 64, 80, 128}) {
    for (bool causal : {false, true}) {
      const Problem p({1, 0, 33, 2, 130, 64, 17}, {1, 0, 33, 2, 130, 64, 17}, 3, dim, causal);
      const Outputs wanted = expected(p, true);
      Outputs one(p), plain(p);
      EXPECT(attend(p.inputs(), one.out.data(), nullptr, one.summary_attention.data(),
                    one.received_attention.data(), 1) == Status::ok);
      expect_equal(one.out, wanted.out, 2e-5);
      expect_equal(one.summary_attention, wanted.summary_attention, 1e-5);
      expect_equal(one.received_attention, wanted.received_attention, 1e-4);
      EXPECT(attend(p.inputs(), plain.out.data(), nullptr, nullptr, nullptr, 2) == Status::ok);
      EXPECT(plain.out == one.out);
      for (int threads : {2, 3, 40}) {
        Outputs more(p);
        EXPECT(attend(p.inputs(), more.out.data(), nullptr, more.summary_attention.data(),
                      more.received_attention.data(), threads) == Status::ok);
        EXPECT(more.out == one.out && more.summary_attention == one.summary_attention &&
               more.received_attention == one.received_attention);
      }
    }
  }
}

TEST(cross_attention) {
  const Problem p({5, 1, 0, 20}, {77, 3, 4, 130}, 2, 48, false);
  Outputs got(p);
  EXPECT(attend(p.inputs(), got.out.data(), nullptr, nullptr, nullptr, 2) == Status::ok);
  expect_equal(got.out, expected(p, false).out, 1e-5);
}

// Tokens 1, 9 and the last three are the same; lengths end just behind a panel, and in every part of one.
TEST(equal_tokens_have_equal_results) {
  for (const std::int32_t length : {12, 13, 17, 18, 25, 26, 33, 34, 41, 50, 65, 66, 82, 129, 197, 577}) {
    Problem p({length}, {length}, 3, 32, false);
    p.summary_index = {0};
    const std::int64_t row = p.heads * p.dim;
    const std::int64_t twins[] = {1, 9, length - 3, length - 2, length - 1};
    for (std::vector<float>* x : {&p.q, &p.k, &p.v})
      for (const std::int64_t twin : twins) std::copy_n(x->begin() + 5 * row, row, x->begin() + twin * row);
    Outputs got(p);
    EXPECT(attend(p.inputs(), got.out.data(), nullptr, got.summary_attention.data(),
                  got.received_attention.data(), 1) == Status::ok);
    for (const std::int64_t twin : twins) {
      EXPECT(got.received_attention[twin] == got.received_attention[5]);
      EXPECT(got.summary_attention[twin] == got.summary_attention[5]);
      EXPECT(std::equal(&got.out[5 * row], &got.out[5 * row] + row, &got.out[twin * row]));
    }
  }
}

TEST(far_scores_count_for_nothing) {
  Problem p({20}, {20}, 2, 16, false);  // every query sees key 0 alone, the summary token's
  for (std::size_t i = 0; i < p.q.size(); ++i) p.q[i] = 1, p.k[i] = i < 32 ? 40.0f : 0.0f;
  p.summary_index = {0};
  Outputs got(p);
  EXPECT(attend(p.inputs(), got.out.data(), nullptr, got.summary_attention.data(),
                got.received_attention.data(), 1) == Status::ok);
  EXPECT(got.received_attention[0] == 19);
  for (std::size_t j = 1; j < 20; ++j)
    EXPECT(got.received_attention[j] == 0 && got.summary_attention[j] == 0);
}

TEST(large_scores_do_not_overflow_and_nan_stays_in_its_sequence) {
  Problem p({20, 35}, {20, 35}, 2, 32, false);
  for (float& value : p.q) value *= 3000;
  Outputs clean(p), broken(p);
  EXPECT(attend(p.inputs(), clean.out.data(), nullptr, clean.summary_attention.data(),
                clean.received_attention.data(), 1) == Status::ok);
  for (float value : clean.out) EXPECT(std::isfinite(value));
  p.q[3] = kNaN;
  EXPECT(attend(p.inputs(), broken.out.data(), nullptr, broken.summary_attention.data(),
                broken.received_attention.data(), 1) == Status::ok);
  EXPECT(std::isnan(broken.out[0]) && std::isnan(broken.received_attention[5]));
  for (std::size_t i = 20 * 2 * 32; i < p.q.size(); ++i) EXPECT(broken.out[i] == clean.out[i]);
  for (std::size_t i = 20; i < 55; ++i)
    EXPECT(broken.received_attention[i] == clean.received_attention[i] &&
           broken.summary_attention[i] == clean.summary_attention[i]);
}

TEST(a_summary_row_that_does_not_exist_is_none) {
  Problem p({20, 9}, {20, 9}, 2, 32, false);
  Outputs none(p), outside(p);
  p.summary_index = {-1, -1};
  EXPECT(attend(p.inputs(), none.out.data(), nullptr, none.summary_attention.data(),
                none.received_attention.data(), 1) == Status::ok);
  p.summary_index = {20, 1000};
  EXPECT(attend(p.inputs(), outside.out.data(), nullptr, outside.summary_attention.data(),
                outside.received_attention.data(), 1) == Status::ok);
  EXPECT(outside.summary_attention == none.summary_attention &&
         outside.received_attention == none.received_attention);
  for (float value : none.summary_attention) EXPECT(value == 0);
}

TEST(bad_attention_arguments_are_refused) {
  const Problem p({4, 3}, {4, 3}, 2, 32, false);
  std::vector<float> out(p.q.size(), 5), statistic(7, 5);
  const auto refused = [&](auto change, bool statistics = true) {
    AttentionInputs inputs = p.inputs();
    change(inputs);
    EXPECT(attend(inputs, out.data(), nullptr, statistics ? statistic.data() : nullptr,
                  statistics ? statistic.data() : nullptr, 1) == Status::invalid_argument);
  };
  const std::int32_t other_keys[] = {0, 3, 7}, no_keys[] = {0, 7, 7};
  refused([](AttentionInputs& a) { a.head_dim = 24; });
  refused([](AttentionInputs& a) { a.head_dim = 144; });
  refused([](AttentionInputs& a) { a.dtype = DType(3); });
  refused([](AttentionInputs& a) { a.k = nullptr; });
  refused([](AttentionInputs& a) { a.tokens_q = 6; });
  refused([](AttentionInputs& a) { a.softmax_scale = kNaN; });
  refused([&](AttentionInputs& a) { a.cu_seqlens_k = other_keys; });
  refused([&](AttentionInputs& a) { a.cu_seqlens_k = no_keys; }, false);
  EXPECT(attend(p.inputs(), out.data(), nullptr, statistic.data(), nullptr, 1) == Status::invalid_argument);
  EXPECT((out == std::vector<float>(p.q.size(), 5)));
}

namespace {

struct Gradients {
  std::vector<float> q, k, v;
  explicit Gradients(const Problem& p) : q(p.q.size(), kNaN), k(p.k.size(), kNaN), v(p.v.size(), kNaN) {}
};

// The gradients of a fixed weighting of all results.
Gradients gradients(const Problem& p, bool statistics, int threads) {
  Outputs forward(p);
  std::vector<float> lse(p.cu_q.back() * p.heads, kNaN), grad_out(p.q.size()), grad_row(p.cu_q.back());
  EXPECT(attend(p.inputs(), forward.out.data(), lse.data(),
                statistics ? forward.summary_attention.data() : nullptr,
                statistics ? forward.received_attention.data() : nullptr, threads) == Status::ok);
  for (std::size_t i = 0; i < grad_out.size(); ++i) grad_out[i] = std::sin(float(i));
  for (std::size_t i = 0; i < grad_row.size(); ++i) grad_row[i] = std::cos(float(i));
  Gradients result(p);
  const float* const rows = statistics ? grad_row.data() : nullptr;
  EXPECT(differentiate(p.inputs(),
                       {forward.out.data(), lse.data(), grad_out.data(), rows, rows, result.q.data(),
                        result.k.data(), result.v.data()},
                       threads) == Status::ok);
  return result;
}

// That weighting of the results of the equations.
double weighted(const Problem& p, bool statistics) {
  const Outputs results = expected(p, statistics);
  double total = 0;
  for (std::size_t i = 0; i < results.out.size(); ++i) total += double(std::sin(float(i))) * results.out[i];
  for (std::size_t i = 0; statistics && i < results.summary_attention.size(); ++i)
    total +=
        double(std::cos(float(i))) * (double(results.summary_attention[i]) + results.received_attention[i]);
  return total;
}

}  // namespace

TEST(gradients_are_the_slopes_of_the_equations) {
  for (bool causal : {false, true}) {
    for (bool statistics : {false, true}) {
      Problem p({3, 0, 20, 1}, {3, 0, 20, 1}, 2, 16, causal);
      const Gradients got = gradients(p, statistics, 1);
      const auto check = [&](std::vector<float>& x, const std::vector<float>& grad) {
        for (std::size_t i = 0; i < x.size(); i += 37) {
          const float before = x[i], step = 1.0f / 1024;
          x[i] = before + step;
          const double above = weighted(p, statistics);
          x[i] = before - step;
          const double below = weighted(p, statistics);
          x[i] = before;
          EXPECT_NEAR(grad[i], (above - below) / (2 * step), 2e-3);
        }
      };
      check(p.q, got.q);
      check(p.k, got.k);
      check(p.v, got.v);
    }
  }
}

TEST(gradients_do_not_depend_on_threads_and_all_are_written) {
  for (bool statistics : {false, true}) {
    const Problem p({1, 0, 33, 2, 640, 64}, {1, 0, 33, 2, 640, 64}, 3, 48, true);
    const Gradients one = gradients(p, statistics, 1);
    for (const std::vector<float>* x : {&one.q, &one.k, &one.v})
      for (float value : *x) EXPECT(std::isfinite(value));
    for (int threads : {2, 3, 40}) {
      const Gradients more = gradients(p, statistics, threads);
      EXPECT(more.q == one.q && more.k == one.k && more.v == one.v);
    }
  }
  const Problem cross({5, 0, 20}, {77, 3, 130}, 2, 80, false);
  const Gradients got = gradients(cross, false, 2);
  for (float value : got.k) EXPECT(std::isfinite(value));
  for (std::size_t i = 77 * 160; i < 80 * 160; ++i) EXPECT(got.k[i] == 0 && got.v[i] == 0);
}

TEST(bad_gradient_arguments_are_refused) {
  const Problem p({4, 3}, {4, 3}, 2, 32, false);
  std::vector<float> data(p.q.size(), 5), grad(p.q.size(), 5);
  const cpu::AttentionGradients good{data.data(), data.data(), data.data(), data.data(),
                                     data.data(), grad.data(), grad.data(), grad.data()};
  const auto refused = [&](auto change) {
    cpu::AttentionGradients gradients = good;
    change(gradients);
    EXPECT(differentiate(p.inputs(), gradients, 1) == Status::invalid_argument);
  };
  refused([](cpu::AttentionGradients& g) { g.lse = nullptr; });
  refused([](cpu::AttentionGradients& g) { g.grad_out = nullptr; });
  refused([](cpu::AttentionGradients& g) { g.grad_received_attention = nullptr; });
  refused([](cpu::AttentionGradients& g) { g.out = nullptr; });
  refused([](cpu::AttentionGradients& g) { g.grad_v = nullptr; });
  EXPECT(differentiate(p.inputs(), good, 0) == Status::invalid_argument);
  EXPECT((grad == std::vector<float>(p.q.size(), 5)));
}
