// SPDX-License-Identifier: Apache-2.0
#include "madtp/tokens.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Three sequences of 5, 0 and 4 rows: two pruned in the first, all but row 6 kept in the last.
struct Fixture {
  std::vector<std::uint8_t> keep{1, 0, 1, 0, 1, 1, 0, 0, 1};
  std::vector<float> merge_weight{0, 0.25f, 0, 0.75f, 0, 0, 0.5f, 0.5f, 0};
  std::vector<std::int32_t> cu_seqlens{0, 5, 5, 9}, cu_seqlens_out{0, 4, 4, 7};
  std::vector<std::int32_t> source{0, 2, 4, -1, 5, 8, -3, padding_row, padding_row};
  TokenSelection selection() const {
    return {keep.data(),
            cu_seqlens.data(),
            cu_seqlens_out.data(),
            source.data(),
            merge_weight.data(),
            std::int64_t(keep.size()),
            std::int64_t(source.size()),
            std::int64_t(cu_seqlens.size()) - 1};
  }
};

// What select_tokens writes, poisoned.
struct Selected {
  std::vector<std::uint8_t> keep;
  std::vector<std::int32_t> cu_seqlens_out, source;
  std::vector<float> merge_weight;
  Selected(std::int64_t tokens, std::int64_t batch)
      : keep(tokens, 7), cu_seqlens_out(batch + 1, -5), source(tokens, -5), merge_weight(tokens, kNaN) {}
  SelectionOutputs outputs() {
    return {keep.data(), cu_seqlens_out.data(), source.data(), merge_weight.data()};
  }
};

// Of float32 logits (tokens, alignment_tokens).
ScoreInputs score_inputs(const std::vector<float>& logits, std::int64_t alignment_tokens,
                         const std::vector<std::int32_t>& cu_seqlens,
                         const std::vector<std::int32_t>& summary_index) {
  return {logits.data(),
          DType::float32,
          alignment_tokens,
          alignment_tokens,
          cu_seqlens.data(),
          cu_seqlens.back(),
          std::int64_t(cu_seqlens.size()) - 1,
          summary_index.data()};
}

std::vector<float> ramp(std::int64_t count) {
  std::vector<float> values(count);
  for (std::int64_t i = 0; i < count; ++i) values[i] = float((i * 37) % 101) / 13 - 3;
  return values;
}

float widen(std::uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? kNaN : sign * kInfinity;
  return sign *
         (exponent ? std::ldexp(1024.0f + float(mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}

// The nearest value of a 16-bit type, ties to even, by looking through all of them.
std::uint16_t narrow(double value, DType dtype) {
  const bool negative = std::signbit(value);
  const double magnitude = std::abs(value);
  const std::uint16_t infinity = dtype == DType::bfloat16 ? 0x7f80 : 0x7c00;
  std::uint16_t low = 0, high = infinity;  // of like sign, bits are in the order of the values
  while (high - low > 1) {
    const std::uint16_t middle = std::uint16_t((low + high) / 2);
    (double(widen(middle, dtype)) <= magnitude ? low : high) = middle;
  }
  const double below = widen(low, dtype);
  const double step =
      high == infinity ? below - widen(std::uint16_t(low - 1), dtype) : widen(high, dtype) - below;
  const double over = magnitude - below;
  const bool up = over > step / 2 || (over == step / 2 && low % 2 == 1);
  return std::uint16_t((up ? high : low) | (negative ? 0x8000 : 0));
}

bool is_nan(std::uint16_t bits, DType dtype) { return std::isnan(widen(bits, dtype)); }

}  // namespace

TEST(gather_merge_copies_sums_and_pads) {
  const Fixture f;
  for (std::int64_t channels : {1, 3, 16, 37, 1500}) {
    for (int threads : {1, 2}) {
      const std::int64_t stride = channels + 2;
      const std::vector<float> x = ramp(9 * stride);
      std::vector<float> out(9 * channels, kNaN);
      EXPECT(cpu::gather_merge(x.data(), DType::float32, stride, channels, f.selection(), out.data(),
                               threads) == Status::ok);
      for (std::int64_t row = 0; row < 9; ++row) {
        for (std::int64_t c = 0; c < channels; ++c) {
          const auto at = [&](std::int64_t j) { return double(x[j * stride + c]); };
          const double expected = row == 3   ? 0.25 * at(1) + 0.75 * at(3)
                                  : row == 6 ? 0.5 * at(6) + 0.5 * at(7)
                                  : row > 6  ? 0
                                             : at(f.source[row]);
          EXPECT_NEAR(out[row * channels + c], expected, 1e-6);
        }
      }
    }
  }
}

TEST(sixteen_bit_types_convert_exactly_and_round_to_nearest_even) {
  // One pruned sequence of two rows: every 16-bit value, and zeros. Weight 1 returns the values, 1/3 rounds
  // them.
  const std::int64_t channels = 65536;
  std::vector<std::uint16_t> x(2 * channels, 0), out(channels);
  for (std::int64_t i = 0; i < channels; ++i) x[i] = std::uint16_t(i);
  const std::uint8_t keep[2] = {0, 0};
  const std::int32_t cu_seqlens[2] = {0, 2}, cu_seqlens_out[2] = {0, 1}, source[1] = {-1};
  for (DType dtype : {DType::bfloat16, DType::float16}) {
    for (float weight : {1.0f, 1.0f / 3}) {
      const float merge_weight[2] = {weight, 0};
      const TokenSelection selection{keep, cu_seqlens, cu_seqlens_out, source, merge_weight, 2, 1, 1};
      EXPECT(cpu::gather_merge(x.data(), dtype, channels, channels, selection, out.data(), 1) == Status::ok);
      int wrong = 0;
      for (std::int64_t i = 0; i < channels; ++i) {
        const float value = widen(x[i], dtype);
        if (!std::isfinite(value)) {
          wrong += std::isnan(value) ? !is_nan(out[i], dtype) : out[i] != x[i];
        } else {
          const std::uint16_t expected = narrow(value * weight + 0.0f, dtype);
          wrong += out[i] != expected;
        }
      }
      EXPECT_NEAR(wrong, 0, 0);
    }
  }
}

TEST(layernorm_normalises_the_stored_rows) {
  const Fixture f;
  for (std::int64_t channels : {1, 5, 64, 131}) {
    const std::vector<float> x = ramp(9 * channels), weight = ramp(channels), bias = ramp(channels);
    std::vector<float> out(9 * channels, kNaN), normed(9 * channels, kNaN), mean(9, kNaN), rstd(9, kNaN);
    EXPECT(cpu::gather_merge_layernorm(x.data(), DType::float32, channels, channels, f.selection(),
                                       weight.data(), bias.data(), DType::float32, 1e-3, out.data(),
                                       normed.data(), mean.data(), rstd.data(), 2) == Status::ok);
    for (std::int64_t row = 0; row < 9; ++row) {
      double mu = 0, variance = 0;
      for (std::int64_t c = 0; c < channels; ++c) mu += out[row * channels + c] / double(channels);
      for (std::int64_t c = 0; c < channels; ++c) {
        const double d = out[row * channels + c] - mu;
        variance += d * d / double(channels);
      }
      const bool padding = row > 6;
      const double scale = padding ? 0 : 1 / std::sqrt(variance + 1e-3);
      EXPECT_NEAR(mean[row], mu, 1e-5);
      EXPECT_NEAR(rstd[row], scale, 1e-4 * scale);
      for (std::int64_t c = 0; c < channels; ++c) {
        const double expected = padding ? 0 : (out[row * channels + c] - mu) * scale * weight[c] + bias[c];
        EXPECT_NEAR(normed[row * channels + c], expected, 2e-4);
      }
    }
  }
}

TEST(rmsnorm_normalises_the_stored_rows) {
  const Fixture f;
  for (std::int64_t channels : {1, 5, 64, 131}) {
    const std::vector<float> x = ramp(9 * channels), weight = ramp(channels);
    std::vector<float> out(9 * channels, kNaN), normed(9 * channels, kNaN);
    EXPECT(cpu::gather_merge_rmsnorm(x.data(), DType::float32, channels, channels, f.selection(),
                                     weight.data(), DType::float32, 1e-3, out.data(), normed.data(),
                                     2) == Status::ok);
    for (std::int64_t row = 0; row < 9; ++row) {
      double squares = 0;
      for (std::int64_t c = 0; c < channels; ++c)
        squares += double(out[row * channels + c]) * out[row * channels + c] / double(channels);
      const double scale = row > 6 ? 0 : 1 / std::sqrt(squares + 1e-3);
      for (std::int64_t c = 0; c < channels; ++c)
        EXPECT_NEAR(normed[row * channels + c], out[row * channels + c] * scale * weight[c], 2e-4);
    }
  }
}

TEST(rmsnorm_rounds_before_the_weight) {
  const auto narrowed = [](double value) { return narrow(value, DType::bfloat16); };
  const std::int64_t channels = 33;
  std::vector<std::uint16_t> x(channels, narrowed(1)), out(channels), normed(channels);
  x[5] = narrowed(1.0078125);
  const std::vector<float> weight(channels, 257);
  const std::uint8_t keep[1] = {1};
  const std::int32_t cu_seqlens[2] = {0, 1}, source[1] = {0};
  const float merge_weight[1] = {0};
  const TokenSelection selection{keep, cu_seqlens, cu_seqlens, source, merge_weight, 1, 1, 1};
  EXPECT(cpu::gather_merge_rmsnorm(x.data(), DType::bfloat16, channels, channels, selection, weight.data(),
                                   DType::float32, 1e-6, out.data(), normed.data(), 1) == Status::ok);
  double squares = 0;
  for (const std::uint16_t value : x) squares += std::pow(widen(value, DType::bfloat16), 2) / channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    const float scaled = float(widen(x[c], DType::bfloat16) / std::sqrt(squares + 1e-6));
    EXPECT(normed[c] == narrowed(widen(narrowed(scaled), DType::bfloat16) * weight[c]));
  }
}

TEST(backward_is_the_transpose_of_forward) {
  const Fixture f;
  const std::int64_t channels = 21;
  const std::vector<float> x = ramp(9 * channels), grad = ramp(9 * channels + 5);
  std::vector<float> out(9 * channels), grad_x(9 * channels, kNaN), grad_weight(9, kNaN);
  EXPECT(cpu::gather_merge(x.data(), DType::float32, channels, channels, f.selection(), out.data(), 1) ==
         Status::ok);
  EXPECT(cpu::gather_merge_backward(grad.data() + 5, channels, x.data(), DType::float32, channels, channels,
                                    f.selection(), grad_x.data(), grad_weight.data(), 2) == Status::ok);
  double forward = 0, backward = 0, by_weight = 0, merged = 0;
  for (std::int64_t i = 0; i < 7 * channels; ++i) forward += double(out[i]) * grad[5 + i];
  for (std::int64_t i = 0; i < 9 * channels; ++i) backward += double(x[i]) * grad_x[i];
  for (std::int64_t j = 0; j < 9; ++j) by_weight += double(f.merge_weight[j]) * grad_weight[j];
  for (std::int64_t row : {3, 6})
    for (std::int64_t c = 0; c < channels; ++c)
      merged += double(out[row * channels + c]) * grad[5 + row * channels + c];
  EXPECT_NEAR(backward, forward, 1e-3);
  EXPECT_NEAR(by_weight, merged, 1e-3);
  for (std::int64_t j = 0; j < 9; ++j) EXPECT(!f.keep[j] || grad_weight[j] == 0);
}

TEST(importance_and_selection_follow_their_equations) {
  const std::int64_t tokens = 30, alignment_tokens = 19;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 30}, summary_index{0, -1, 28};
  std::vector<float> summary_attention(tokens), received_attention(tokens), importance(tokens, kNaN);
  const std::vector<float> logits = ramp(tokens * alignment_tokens);
  for (std::int64_t j = 0; j < tokens; ++j)
    summary_attention[j] = 0.01f * float(j % 7), received_attention[j] = 1 + float(j % 5);
  const ScoreInputs inputs = score_inputs(logits, alignment_tokens, cu_seqlens, summary_index);
  EXPECT(cpu::token_importance(summary_attention.data(), received_attention.data(), inputs, importance.data(),
                               2) == Status::ok);
  const auto best = [&](std::int64_t j) {
    return std::max(0.0f, *std::max_element(&logits[j * alignment_tokens],
                                            &logits[j * alignment_tokens] + alignment_tokens));
  };
  double received_sum = 0, guidance_sum = 0;
  for (std::int64_t j = 1; j < 30; ++j)
    if (j != 29) received_sum += received_attention[j], guidance_sum += best(j);
  EXPECT_NEAR(importance[0], 0, 0);
  EXPECT_NEAR(importance[29], 0, 0);
  for (std::int64_t j = 1; j < 29; ++j)
    EXPECT_NEAR(importance[j],
                (summary_attention[j] + received_attention[j] / received_sum + best(j) / guidance_sum) / 3,
                1e-6);

  const double tau = 0.8;
  Selected selected(tokens, 3);
  EXPECT(cpu::select_tokens(importance.data(), inputs, tau, selected.outputs(), 2) == Status::ok);
  double threshold = kInfinity;
  for (std::int64_t k = 0; k < alignment_tokens; ++k) {
    double weight = 0, weighted = 0;
    for (std::int64_t j = 1; j < 29; ++j) {
      const double e = std::exp(logits[j * alignment_tokens + k] / tau);
      weight += e, weighted += e * importance[j];
    }
    threshold = std::min(threshold, weighted / weight);
  }
  std::vector<std::int32_t> expected{0};
  double pruned_importance = 0;
  for (std::int64_t j = 1; j < 30; ++j) {
    const bool kept = j == 29 || importance[j] > threshold;
    EXPECT(selected.keep[j] == kept);
    if (kept) expected.push_back(std::int32_t(j));
    if (!kept) pruned_importance += importance[j];
  }
  EXPECT(pruned_importance > 0);
  expected.push_back(-3);
  for (std::int64_t j = 0; j < 30; ++j)
    EXPECT_NEAR(selected.merge_weight[j], selected.keep[j] ? 0 : importance[j] / pruned_importance, 1e-6);
  EXPECT((selected.cu_seqlens_out == std::vector<std::int32_t>{0, 1, 1, std::int32_t(expected.size())}));
  expected.resize(tokens, padding_row);
  EXPECT(selected.source == expected);
}

TEST(score_and_select_writes_what_the_two_write) {
  const std::int64_t tokens = 90, alignment_tokens = 37;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 30, 90}, summary_index{0, -1, 28, -1};
  std::vector<float> summary_attention(tokens), received_attention = ramp(tokens);
  const std::vector<float> logits = ramp(tokens * alignment_tokens);
  for (std::int64_t j = 0; j < tokens; ++j)
    summary_attention[j] = 0.01f * float(j % 7), received_attention[j] += 4;
  const ScoreInputs inputs = score_inputs(logits, alignment_tokens, cu_seqlens, summary_index);
  for (double temperature : {0.0, 0.7}) {
    for (int threads : {1, 2}) {
      Selected two(tokens, 4), one(tokens, 4);
      std::vector<float> importance_of_two(tokens, kNaN), importance_of_one(tokens, kNaN);
      EXPECT(cpu::token_importance(summary_attention.data(), received_attention.data(), inputs,
                                   importance_of_two.data(), threads) == Status::ok);
      EXPECT(cpu::select_tokens(importance_of_two.data(), inputs, temperature, two.outputs(), threads) ==
             Status::ok);
      EXPECT(cpu::score_and_select(summary_attention.data(), received_attention.data(), inputs, temperature,
                                   importance_of_one.data(), one.outputs(), threads) == Status::ok);
      EXPECT((temperature == 0) == (two.cu_seqlens_out.back() == tokens));
      EXPECT(importance_of_one == importance_of_two);
      EXPECT(one.merge_weight == two.merge_weight);
      EXPECT(one.keep == two.keep);
      EXPECT(one.cu_seqlens_out == two.cu_seqlens_out);
      EXPECT(one.source == two.source);
    }
  }
}

// Protected rows hold what would decide everything, and the summary token is among them.
TEST(protected_rows_stay_and_take_no_part) {
  const std::int64_t tokens = 40, alignment_tokens = 11;
  const std::vector<std::int32_t> cu_seqlens{0, 1, 1, 40}, summary_index{0, -1, 2};
  std::vector<std::uint8_t> protected_rows(tokens, 0);
  for (const std::int64_t row : {3, 9, 10, 39}) protected_rows[row] = 1;
  std::vector<float> statistic(tokens), logits = ramp(tokens * alignment_tokens);
  for (std::int64_t j = 0; j < tokens; ++j) statistic[j] = 1 + float(j * 7 % 5);
  ScoreInputs inputs = score_inputs(logits, alignment_tokens, cu_seqlens, summary_index);
  inputs.protected_rows = protected_rows.data();
  Selected clean(tokens, 3), got(tokens, 3), two(tokens, 3), everything(tokens, 3);
  std::vector<float> clean_importance(tokens, kNaN), importance(tokens, kNaN);
  EXPECT(cpu::score_and_select(statistic.data(), statistic.data(), inputs, 1, clean_importance.data(),
                               clean.outputs(), 1) == Status::ok);
  EXPECT(clean.cu_seqlens_out.back() < tokens);
  for (std::int64_t j = 0; j < tokens; ++j) {
    if (!protected_rows[j]) continue;
    EXPECT(clean.keep[j] == 1 && clean_importance[j] == 0 && clean.merge_weight[j] == 0);
    statistic[j] = kNaN;
    for (std::int64_t k = 0; k < alignment_tokens; ++k) logits[j * alignment_tokens + k] = kInfinity;
  }
  EXPECT(cpu::score_and_select(statistic.data(), statistic.data(), inputs, 1, importance.data(),
                               got.outputs(), 2) == Status::ok);
  EXPECT(importance == clean_importance && got.keep == clean.keep && got.source == clean.source);
  EXPECT(got.merge_weight == clean.merge_weight && got.cu_seqlens_out == clean.cu_seqlens_out);
  for (std::int64_t j = 0; j < tokens; ++j)
    if (protected_rows[j]) importance[j] = kNaN;
  EXPECT(cpu::select_tokens(importance.data(), inputs, 1, two.outputs(), 1) == Status::ok);
  EXPECT(two.keep == clean.keep && two.merge_weight == clean.merge_weight);

  protected_rows.assign(tokens, 1);
  protected_rows[20] = 0;  // one candidate alone never goes
  EXPECT(cpu::select_tokens(importance.data(), inputs, 1e6, everything.outputs(), 1) == Status::ok);
  EXPECT(everything.keep == std::vector<std::uint8_t>(tokens, 1) && everything.cu_seqlens_out == cu_seqlens);
}

// Sums whose reciprocal a float cannot hold: below 2^-128, where numbers are subnormal, and near its largest.
TEST(shares_of_tiny_and_of_large_sums) {
  const std::vector<std::int32_t> cu_seqlens{0, 4}, summary_index{-1};
  const std::vector<float> summary_attention(4, 0);
  for (const float unit : {1.4013e-45f, 1e-42f, 2e-40f, 1e-38f, 8e37f}) {
    const std::vector<float> received_attention{unit, unit, 2 * unit, 0}, logits{0, unit, 0, unit};
    const ScoreInputs inputs = score_inputs(logits, 1, cu_seqlens, summary_index);
    std::vector<float> importance(4, kNaN);
    EXPECT(cpu::token_importance(summary_attention.data(), received_attention.data(), inputs,
                                 importance.data(), 1) == Status::ok);
    const double wanted[] = {0.25 / 3, 0.75 / 3, 0.5 / 3, 0.5 / 3};
    for (int j = 0; j < 4; ++j) EXPECT_NEAR(importance[j], wanted[j], 1e-7);
  }
}

TEST(merge_weights_of_tiny_importance_add_up_to_1) {
  const std::vector<std::int32_t> cu_seqlens{0, 5}, summary_index{-1};
  const std::vector<float> importance{0.3f, 0.7f, 1e-40f, 3e-40f, 0}, logits{9, 9, 0, 0, 0};
  const ScoreInputs inputs = score_inputs(logits, 1, cu_seqlens, summary_index);
  Selected selected(5, 1);
  EXPECT(cpu::select_tokens(importance.data(), inputs, 5, selected.outputs(), 1) == Status::ok);
  EXPECT((selected.keep == std::vector<std::uint8_t>{0, 1, 0, 0, 0}));
  double total = 0;
  for (int j = 0; j < 5; ++j) total += selected.merge_weight[j];
  EXPECT_NEAR(total, 1, 1e-6);

  const std::vector<float> tiny{1, 1, 1e-40f, 3e-40f, 0};
  Selected of_tiny(5, 1);
  EXPECT(cpu::select_tokens(tiny.data(), inputs, 5, of_tiny.outputs(), 1) == Status::ok);
  EXPECT((of_tiny.keep == std::vector<std::uint8_t>{1, 1, 0, 0, 0}));
  EXPECT_NEAR(of_tiny.merge_weight[2], 0.25, 1e-5);
  EXPECT_NEAR(of_tiny.merge_weight[3], 0.75, 1e-5);
}

// Token 0 is the most important, and the one that every alignment token means.
TEST(the_threshold_sees_weights_down_to_the_least_float) {
  const std::vector<std::int32_t> cu_seqlens{0, 4}, summary_index{-1};
  const std::vector<float> importance{0.9f, 0.1f, 0.2f, 0.1f};
  const auto kept = [&](float gap) {
    const std::vector<float> logits{gap, 0, 0, 0};
    Selected selected(4, 1);
    EXPECT(cpu::select_tokens(importance.data(), score_inputs(logits, 1, cu_seqlens, summary_index), 1,
                              selected.outputs(), 1) == Status::ok);
    return selected.keep;
  };
  for (const float gap : {20.0f, 84.0f, 90.0f, 100.0f})
    EXPECT((kept(gap) == std::vector<std::uint8_t>{1, 0, 0, 0}));
  for (const float gap : {106.0f, 200.0f, 1e30f}) EXPECT((kept(gap) == std::vector<std::uint8_t>(4, 0)));
}

TEST(bad_arguments_are_refused_and_nothing_is_written) {
  Fixture f;
  const std::vector<float> x = ramp(9 * 4);
  std::vector<float> out(9 * 4, 5), statistics(9, 5);
  const auto gather = [&](const void* from, DType dtype, std::int64_t channels, int threads) {
    return cpu::gather_merge(from, dtype, channels, channels, f.selection(), out.data(), threads);
  };
  const auto refused = [&](Status status) { EXPECT(status == Status::invalid_argument); };
  refused(gather(nullptr, DType::float32, 4, 1));
  refused(gather(x.data(), DType(9), 4, 1));
  refused(gather(x.data(), DType::float32, -1, 1));
  refused(gather(x.data(), DType::float32, 4, 0));
  refused(cpu::gather_merge_layernorm(x.data(), DType::float32, 4, 4, f.selection(), x.data(), x.data(),
                                      DType::float16, 1e-5, out.data(), out.data(), statistics.data(),
                                      statistics.data(), 1));
  refused(cpu::gather_merge_layernorm(x.data(), DType::float32, 4, 4, f.selection(), x.data(), x.data(),
                                      DType::float32, 0, out.data(), out.data(), statistics.data(),
                                      statistics.data(), 1));
  const auto rmsnorm = [&](const void* weight, DType affine_dtype, double eps) {
    return cpu::gather_merge_rmsnorm(x.data(), DType::float32, 4, 4, f.selection(), weight, affine_dtype, eps,
                                     out.data(), out.data(), 1);
  };
  refused(rmsnorm(nullptr, DType::float32, 1e-5));
  refused(rmsnorm(x.data(), DType::float16, 1e-5));
  refused(rmsnorm(x.data(), DType::float32, 0));
  refused(cpu::gather_merge_backward(x.data(), 4, x.data(), DType::float32, 4, 4, f.selection(), out.data(),
                                     nullptr, 1));
  for (const std::vector<std::int32_t>& broken :
       {std::vector<std::int32_t>{1, 5, 5, 9}, {0, 5, 4, 9}, {0, 5, 5, 8}}) {
    f.cu_seqlens = broken;
    refused(gather(x.data(), DType::float32, 4, 1));
  }
  f = Fixture();
  f.cu_seqlens_out.back() = 10;
  refused(gather(x.data(), DType::float32, 4, 1));

  const std::int32_t cu_seqlens[2] = {0, 9};
  Selected selected(9, 1);
  const Selected untouched = selected;
  const auto inputs = [&](std::int64_t alignment_tokens) {
    return ScoreInputs{x.data(), DType::float32, 4, alignment_tokens, cu_seqlens, 9, 1, nullptr};
  };
  const auto select = [&](double temperature, std::int64_t alignment_tokens) {
    return cpu::select_tokens(x.data(), inputs(alignment_tokens), temperature, selected.outputs(), 1);
  };
  refused(select(-1, 4));
  refused(select(double(kNaN), 4));
  refused(select(double(kInfinity), 4));
  refused(select(1, 0));
  const auto both = [&](const float* received_attention, double temperature, std::int64_t alignment_tokens,
                        float* importance) {
    return cpu::score_and_select(x.data(), received_attention, inputs(alignment_tokens), temperature,
                                 importance, selected.outputs(), 1);
  };
  refused(both(nullptr, 1, 4, statistics.data()));
  refused(both(x.data(), -1, 4, statistics.data()));
  refused(both(x.data(), 1, 0, statistics.data()));
  refused(both(x.data(), 1, 4, nullptr));
  EXPECT(selected.keep == untouched.keep && selected.source == untouched.source);
  EXPECT((statistics == std::vector<float>(9, 5)));
  EXPECT((out == std::vector<float>(9 * 4, 5)));
}

TEST(a_source_that_names_no_row_gives_zeros) {
  Fixture f;
  f.source = {9, INT32_MAX, -4, INT32_MIN + 1, 0, 8, -2, padding_row, 5};
  const std::vector<float> x = ramp(9 * 4);
  std::vector<float> out(9 * 4, kNaN);
  EXPECT(cpu::gather_merge(x.data(), DType::float32, 4, 4, f.selection(), out.data(), 1) == Status::ok);
  for (std::int64_t row : {0, 1, 2, 3, 6, 7})  // -2 is the empty sequence: a sum of nothing
    for (std::int64_t c = 0; c < 4; ++c) EXPECT(out[row * 4 + c] == 0);
  for (std::int64_t c = 0; c < 4; ++c) EXPECT(out[8 * 4 + c] == x[5 * 4 + c]);
}
