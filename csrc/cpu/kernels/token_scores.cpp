// SPDX-License-Identifier: Apache-2.0
// Importance and selection, one sequence at a time; every sum runs in row order from the start of the
// sequence, so a sequence has the same result in every batch.

#include <cfloat>
#include <cmath>

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/tokens.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

// The softmax of the threshold picks one token here; a lower temperature lowers the threshold itself.
constexpr double kArgmaxTemperature = 0.01;

struct Sequence {
  std::int64_t begin, end;
  std::int64_t summary_row;            // of the batch, -1: none
  const std::uint8_t* protected_rows;  // of the batch, null: none

  // A candidate. What the others hold reaches no result.
  bool is_prunable(std::int64_t j) const {
    return j != summary_row && (protected_rows == nullptr || protected_rows[j] == 0);
  }
};

Sequence sequence(const ScoreInputs& inputs, std::int64_t b) {
  const std::int64_t begin = inputs.cu_seqlens[b], end = inputs.cu_seqlens[b + 1];
  const std::int64_t index = inputs.summary_index == nullptr ? 0 : inputs.summary_index[b];
  return {begin, end, index >= 0 && index < end - begin ? begin + index : -1, inputs.protected_rows};
}

// max over the row, NaN if one is.
template <typename T>
float row_max(const T* row, std::int64_t count) {
  Vec best = broadcast(-INFINITY);
  std::int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) best = max_or_nan(best, load(row + k));
  float result = highest_or_nan(best);
  if (k < count) {
    const Vec rest = load_part(row + k, count - k);
    for (std::int64_t i = 0; i < count - k; ++i)
      if (rest[i] > result || rest[i] != rest[i]) result = rest[i];
  }
  return result;
}

template <typename T>
void sequence_importance(const Sequence& s, const float* summary_attention, const float* received_attention,
                         const T* logits, std::int64_t stride, std::int64_t alignment_tokens,
                         float* importance) {
  double received_sum = 0, guidance_sum = 0;
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (!s.is_prunable(j)) continue;
    const float best = row_max(logits + j * stride, alignment_tokens);
    importance[j] = best < 0 ? 0 : best;  // NaN stays
    received_sum += received_attention[j];
    guidance_sum += importance[j];
  }
  // In double: a float cannot hold the reciprocal of a sum that is hardly more than nothing, or hardly
  // finite.
  const double received_scale = received_sum == 0 ? 0 : 1 / received_sum;
  const double guidance_scale = guidance_sum == 0 ? 0 : 1 / guidance_sum;
  for (std::int64_t j = s.begin; j < s.end; ++j)
    importance[j] = !s.is_prunable(j)
                        ? 0
                        : (summary_attention[j] + float(received_attention[j] * received_scale) +
                           float(importance[j] * guidance_scale)) /
                              3;
}

// How far importances are below the highest. The unit is 1, or a power of two so large that what is summed
// over tokens, with weights of more than 1, stays a float.
struct Deficits {
  float highest, lowest, per_unit;

  Deficits(float high, float low) {
    per_unit = high - low > 0x1p64f ? 0x1p-64f : 1.0f;
    highest = high * per_unit;
    lowest = low * per_unit;
  }
  float of(float importance) const { return highest - importance * per_unit; }
  float largest() const { return highest - lowest; }
};

// max over N * kWidth alignment tokens of sum_j softmax_j((A_jk) / tau) deficit_j, NaN if one is; lanes from
// `count` on do not exist.
template <int N, typename T>
float block_threshold(const Sequence& s, const float* importance, const Deficits& deficits, const T* logits,
                      std::int64_t stride, std::int64_t count, float scale) {
  const auto lanes = [&](std::int64_t j, Vec* a) {
    const T* row = logits + j * stride;
    for (int n = 0; n < N; ++n) {
      const std::int64_t rest = count - n * kWidth;
      a[n] = rest >= kWidth ? load(row + n * kWidth) : load_part(row + n * kWidth, rest > 0 ? rest : 0);
    }
  };
  // Weights as far down as a float has subnormal numbers: whether any but the largest is left decides whether
  // the threshold is above nothing.
  constexpr int kRange = 23;
  Vec a[N], best[N], weight[N] = {}, weighted[N] = {};
  for (int n = 0; n < N; ++n) best[n] = broadcast(-INFINITY);
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (!s.is_prunable(j)) continue;
    lanes(j, a);
    for (int n = 0; n < N; ++n) best[n] = max(a[n], best[n]);
  }
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (!s.is_prunable(j)) continue;
    lanes(j, a);
    const Vec deficit = broadcast(deficits.of(importance[j]));
    for (int n = 0; n < N; ++n) {
      const Vec e = exp2_nonpositive<kRange>((a[n] - best[n]) * broadcast(scale));
      weight[n] += e;
      weighted[n] = e * deficit + weighted[n];
    }
  }
  float threshold = -INFINITY;
  for (std::int64_t k = 0; k < count && k < N * kWidth; ++k) {
    const float value = weighted[k / kWidth][k % kWidth] / weight[k / kWidth][k % kWidth];
    if (value > threshold || value != value) threshold = value;
    if (threshold != threshold) break;
  }
  return threshold;
}

// Writes keep and returns how many rows the sequence has after pruning, the merged one included.
template <typename T>
std::int64_t sequence_keep(const Sequence& s, const float* importance, const T* logits, std::int64_t stride,
                           std::int64_t alignment_tokens, double temperature, std::uint8_t* keep) {
  for (std::int64_t j = s.begin; j < s.end; ++j) keep[j] = 1;
  const std::int64_t length = s.end - s.begin;
  std::int64_t prunable = 0;
  for (std::int64_t j = s.begin; j < s.end; ++j) prunable += s.is_prunable(j);
  if (temperature == 0 || prunable < 2) return length;

  float highest = -INFINITY, lowest = INFINITY;
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (!s.is_prunable(j)) continue;
    if (!std::isfinite(importance[j])) return length;
    if (importance[j] > highest) highest = importance[j];
    if (importance[j] < lowest) lowest = importance[j];
  }
  const Deficits deficits(highest, lowest);
  const double inverse = 1.4426950408889634 / temperature;  // log2(e) / tau
  const float scale = inverse > FLT_MAX ? FLT_MAX : inverse < FLT_MIN ? FLT_MIN : float(inverse);
  constexpr int kVectors = 4;
  float threshold = -INFINITY;
  for (std::int64_t k = 0; k < alignment_tokens; k += kVectors * kWidth) {
    const float value =
        block_threshold<kVectors>(s, importance, deficits, logits + k, stride, alignment_tokens - k, scale);
    if (value != value) return length;
    if (value > threshold) threshold = value;
  }
  if (temperature < kArgmaxTemperature)
    threshold += float(1 - temperature / kArgmaxTemperature) * (deficits.largest() - threshold);
  const auto goes = [&](std::int64_t j) {
    return s.is_prunable(j) && !(deficits.of(importance[j]) < threshold);
  };
  std::int64_t pruned = 0;
  for (std::int64_t j = s.begin; j < s.end; ++j) pruned += goes(j);
  if (pruned < 2) return length;
  for (std::int64_t j = s.begin; j < s.end; ++j) keep[j] = !goes(j);
  return length - pruned + 1;
}

// source of the sequence's output rows from `row` on, and its merge weights. Without branches on keep, which
// no processor can predict.
void lay_out(std::int64_t begin, std::int64_t end, std::int64_t b, const float* importance,
             const std::uint8_t* keep, std::int32_t* row, float* merge_weight) {
  const std::int32_t* const first = row;
  double pruned_importance = 0;
  for (std::int64_t j = begin; j < end; ++j) {
    *row = std::int32_t(j);  // a pruned row is overwritten by the next, the last one by the merged row below
    row += keep[j];
    pruned_importance += keep[j] ? 0 : importance[j];
  }
  const std::int64_t pruned = end - begin - (row - first);
  if (pruned > 0) *row = std::int32_t(-(b + 1));
  const bool weighted = pruned_importance > 0;
  const double scale = 1 / (weighted ? pruned_importance : double(pruned));
  for (std::int64_t j = begin; j < end; ++j)
    merge_weight[j] = keep[j] ? 0 : float((weighted ? importance[j] : 1.0f) * scale);
}

// The layout of a batch from keep and, in cu_seqlens_out[b + 1], the rows that sequence b has after pruning.
void lay_out_batch(const float* importance, const ScoreInputs& inputs, const SelectionOutputs& selection,
                   int threads) {
  const std::int64_t batch = inputs.batch;
  std::int32_t* const ends = selection.cu_seqlens_out;
  ends[0] = 0;
  for (std::int64_t b = 0; b < batch; ++b) ends[b + 1] += ends[b];
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1) schedule(static)
  for (std::int64_t b = 0; b < batch; ++b)
    lay_out(inputs.cu_seqlens[b], inputs.cu_seqlens[b + 1], b, importance, selection.keep,
            selection.source + ends[b], selection.merge_weight);
  for (std::int64_t row = ends[batch]; row < inputs.tokens; ++row) selection.source[row] = padding_row;
}

// body(b, sequence, logits of the batch) for every sequence of the batch.
template <typename Body>
void for_each_sequence(const ScoreInputs& inputs, int threads, Body&& body) {
  with_type(inputs.logits_dtype, [&](auto element) {
    const auto* logits = static_cast<const decltype(element)*>(inputs.mag_logits);
#pragma omp parallel for num_threads(threads) if (threads > 1 && inputs.batch > 1) schedule(dynamic)
    for (std::int64_t b = 0; b < inputs.batch; ++b) body(b, sequence(inputs, b), logits);
  });
}

}  // namespace

Status token_importance(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, float* importance, int threads) {
  for_each_sequence(inputs, threads, [&](std::int64_t, const Sequence& s, const auto* logits) {
    sequence_importance(s, summary_attention, received_attention, logits, inputs.logits_stride,
                        inputs.alignment_tokens, importance);
  });
  return Status::ok;
}

Status select_tokens(const float* importance, const ScoreInputs& inputs, double temperature,
                     const SelectionOutputs& selection, int threads) {
  for_each_sequence(inputs, threads, [&](std::int64_t b, const Sequence& s, const auto* logits) {
    selection.cu_seqlens_out[b + 1] = std::int32_t(sequence_keep(
        s, importance, logits, inputs.logits_stride, inputs.alignment_tokens, temperature, selection.keep));
  });
  lay_out_batch(importance, inputs, selection, threads);
  return Status::ok;
}

Status score_and_select(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, double temperature, float* importance,
                        const SelectionOutputs& selection, int threads) {
  for_each_sequence(inputs, threads, [&](std::int64_t b, const Sequence& s, const auto* logits) {
    sequence_importance(s, summary_attention, received_attention, logits, inputs.logits_stride,
                        inputs.alignment_tokens, importance);
    selection.cu_seqlens_out[b + 1] = std::int32_t(sequence_keep(
        s, importance, logits, inputs.logits_stride, inputs.alignment_tokens, temperature, selection.keep));
  });
  lay_out_batch(importance, inputs, selection, threads);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
