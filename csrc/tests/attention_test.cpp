// SPDX-License-Identifier: Apache-2.0
#include "tests/attention_cases.h"

using namespace madtp;
using namespace madtp::test;

TEST(self_attention_with_statistics) {
  for (std::int64_t dim : {8, 16, 24, 32, 40, 64, 72, 80, 128, 200, 256}) {
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

// Fewer queries than keys, none, as many, and more: those see no key where the mask ends at the last one.
TEST(masks_biases_and_grouped_heads) {
  with_options([](auto change) {
    for (std::int64_t key_heads : {1, 2, 4}) {
      Problem p({40, 0, 3, 64, 120}, {150, 7, 3, 90, 20}, 4, 24, false, key_heads);
      change(p);
      const Outputs wanted = expected(p, false);
      Outputs one(p), more(p);
      EXPECT(attend(p.inputs(), one.out.data(), one.lse.data(), nullptr, nullptr, 1) == Status::ok);
      expect_equal(one.out, wanted.out, 2e-5);
      expect_equal(one.lse, wanted.lse, 2e-5);
      EXPECT(attend(p.inputs(), more.out.data(), more.lse.data(), nullptr, nullptr, 7) == Status::ok);
      EXPECT(more.out == one.out && more.lse == one.lse);
    }
  });
}

TEST(statistics_under_masks_and_biases) {
  with_options([](auto change) {
    for (std::int64_t key_heads : {1, 4}) {
      Problem p({150, 0, 3, 64, 121, 1}, {150, 0, 3, 64, 121, 1}, 4, 40, false, key_heads);
      change(p);
      const Outputs wanted = expected(p, true);
      Outputs one(p), more(p);
      EXPECT(attend(p.inputs(), one.out.data(), nullptr, one.summary_attention.data(),
                    one.received_attention.data(), 1) == Status::ok);
      expect_equal(one.out, wanted.out, 2e-5);
      expect_equal(one.summary_attention, wanted.summary_attention, 1e-5);
      expect_equal(one.received_attention, wanted.received_attention, 1e-4);
      EXPECT(attend(p.inputs(), more.out.data(), nullptr, more.summary_attention.data(),
                    more.received_attention.data(), 40) == Status::ok);
      EXPECT(more.out == one.out && more.summary_attention == one.summary_attention &&
             more.received_attention == one.received_attention);
    }
  });
}

// A window of all keys is none, and one without keys behind the query is a causal mask; caps that no score
// reaches do nothing.
TEST(windows_and_caps_without_an_end) {
  const auto run = [](auto change) {
    Problem p({70, 200}, {90, 130}, 2, 32, false);
    change(p);
    Outputs got(p);
    EXPECT(attend(p.inputs(), got.out.data(), nullptr, nullptr, nullptr, 1) == Status::ok);
    return got.out;
  };
  EXPECT(run([](Problem& p) { p.window_left = INT64_MAX, p.window_right = 0; }) ==
         run([](Problem& p) { p.causal = true; }));
  const std::vector<float> plain = run([](Problem&) {});
  EXPECT(run([](Problem& p) { p.window_left = p.window_right = INT64_MAX; }) == plain);
  EXPECT(run([](Problem& p) { p.slopes.assign(4, 0); }) == plain);
  expect_equal(run([](Problem& p) { p.softcap = 3e38f; }), plain, 1e-5);
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

TEST(a_scale_of_0_weighs_all_keys_alike) {
  const Problem p({3}, {3}, 1, 8, false);
  AttentionInputs inputs = p.inputs();
  inputs.softmax_scale = 0;
  std::vector<float> out(p.q.size(), kNaN);
  EXPECT(attend(inputs, out.data(), nullptr, nullptr, nullptr, 1) == Status::ok);
  for (int d = 0; d < 8; ++d) {
    const float mean = (p.v[d] + p.v[8 + d] + p.v[16 + d]) / 3;
    for (int i = 0; i < 3; ++i) EXPECT(std::abs(out[i * 8 + d] - mean) < 1e-6f);
  }
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
  refused([](AttentionInputs& a) { a.head_dim = 20; });
  refused([](AttentionInputs& a) { a.head_dim = 264; });
  refused([](AttentionInputs& a) { a.key_heads = 3; });
  refused([](AttentionInputs& a) { a.key_heads = -1; });
  refused([](AttentionInputs& a) { a.window_left = -2; });
  refused([](AttentionInputs& a) { a.window_right = -2; });
  refused([](AttentionInputs& a) { a.softcap = -1; });
  refused([](AttentionInputs& a) { a.softcap = kNaN; });
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

// Gradients are the slopes of `weighted`, at every `step`-th element.
void expect_slopes(Problem& p, bool statistics, const Gradients& got, std::size_t step) {
  const auto check = [&](std::vector<float>& x, const std::vector<float>& grad) {
    for (std::size_t i = 0; i < x.size(); i += step) {
      const float before = x[i], change = 1.0f / 1024;
      x[i] = before + change;
      const double above = weighted(p, statistics);
      x[i] = before - change;
      const double below = weighted(p, statistics);
      x[i] = before;
      EXPECT_NEAR(grad[i], (above - below) / (2 * change), 2e-3);
    }
  };
  check(p.q, got.q);
  check(p.k, got.k);
  check(p.v, got.v);
}

}  // namespace

TEST(gradients_are_the_slopes_of_the_equations) {
  for (bool causal : {false, true}) {
    for (bool statistics : {false, true}) {
      Problem p({3, 0, 20, 1}, {3, 0, 20, 1}, 2, 16, causal);
      expect_slopes(p, statistics, gradients(p, statistics, 1), 37);
    }
  }
}

TEST(gradients_under_masks_and_biases) {
  with_options([](auto change) {
    for (bool statistics : {false, true}) {
      const std::vector<std::int32_t> queries{3, 0, 20, 60}, keys{30, 4, 20, 41};
      Problem p(queries, statistics ? queries : keys, 4, 24, false, 2);
      change(p);
      const Gradients got = gradients(p, statistics, 1), more = gradients(p, statistics, 5);
      EXPECT(more.q == got.q && more.k == got.k && more.v == got.v);
      expect_slopes(p, statistics, got, 997);
    }
  });
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
