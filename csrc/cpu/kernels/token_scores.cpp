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
  std::int64_t summary;  // row of the batch, -1: none
};

Sequence sequence(const std::int32_t* cu_seqlens, const std::int32_t* summary_index, std::int64_t b) {
  const std::int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  const std::int64_t index = summary_index == nullptr ? 0 : summary_index[b];
  return {begin, end, index >= 0 && index < end - begin ? begin + index : -1};
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
void sequence_importance(const Sequence& s, const float* summary, const float* received, const T* logits,
                         std::int64_t stride, std::int64_t alignment_tokens, float* importance) {
  double received_sum = 0, guidance_sum = 0;
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (j == s.summary) continue;
    const float best = row_max(logits + j * stride, alignment_tokens);
    importance[j] = best < 0 ? 0 : best;  // NaN stays
    received_sum += received[j];
    guidance_sum += importance[j];
  }
  const float received_scale = received_sum == 0 ? 0 : float(1 / received_sum);
  const float guidance_scale = guidance_sum == 0 ? 0 : float(1 / guidance_sum);
  for (std::int64_t j = s.begin; j < s.end; ++j)
    importance[j] =
        j == s.summary ? 0 : (summary[j] + received[j] * received_scale + importance[j] * guidance_scale) / 3;
}

// max over N * kWidth alignment tokens of sum_j softmax_j((A_jk) / tau) deficit_j, NaN if one is; lanes from
// `count` on do not exist.
template <int N, typename T>
float block_threshold(const Sequence& s, const float* importance, float highest, const T* logits,
                      std::int64_t stride, std::int64_t count, float scale) {
  const auto lanes = [&](std::int64_t j, Vec* a) {
    const T* row = logits + j * stride;
    for (int n = 0; n < N; ++n) {
      const std::int64_t rest = count - n * kWidth;
      a[n] = rest >= kWidth ? load(row + n * kWidth) : load_part(row + n * kWidth, rest > 0 ? rest : 0);
    }
  };
  Vec a[N], best[N], weight[N] = {}, weighted[N] = {};
  for (int n = 0; n < N; ++n) best[n] = broadcast(-INFINITY);
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (j == s.summary) continue;
    lanes(j, a);
    for (int n = 0; n < N; ++n) best[n] = max(a[n], best[n]);
  }
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (j == s.summary) continue;
    lanes(j, a);
    const Vec deficit = broadcast(highest - importance[j]);
    for (int n = 0; n < N; ++n) {
      const Vec e = exp2_nonpositive((a[n] - best[n]) * broadcast(scale));
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
  const std::int64_t length = s.end - s.begin, prunable = length - (s.summary >= 0);
  if (temperature == 0 || prunable < 2) return length;

  float highest = -INFINITY, lowest = INFINITY;
  for (std::int64_t j = s.begin; j < s.end; ++j) {
    if (j == s.summary) continue;
    if (!std::isfinite(importance[j])) return length;
    if (importance[j] > highest) highest = importance[j];
    if (importance[j] < lowest) lowest = importance[j];
  }
  const double inverse = 1.4426950408889634 / temperature;  // log2(e) / tau
  const float scale = inverse > FLT_MAX ? FLT_MAX : inverse < FLT_MIN ? FLT_MIN : float(inverse);
  constexpr int kVectors = 4;
  float threshold = -INFINITY;
  for (std::int64_t k = 0; k < alignment_tokens; k += kVectors * kWidth) {
    const float value =
        block_threshold<kVectors>(s, importance, highest, logits + k, stride, alignment_tokens - k, scale);
    if (value != value) return length;
    if (value > threshold) threshold = value;
  }
  if (temperature < kArgmaxTemperature)
    threshold += float(1 - temperature / kArgmaxTemperature) * (highest - lowest - threshold);
  const auto goes = [&](std::int64_t j) { return j != s.summary && !(highest - importance[j] < threshold); };
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
  double total = 0;
  for (std::int64_t j = begin; j < end; ++j) {
    *row = std::int32_t(j);  // a pruned row is overwritten by the next, the last one by the merged row below
    row += keep[j];
    total += keep[j] ? 0 : importance[j];
  }
  const std::int64_t pruned = end - begin - (row - first);
  if (pruned > 0) *row = std::int32_t(-(b + 1));
  const bool weighted = total > 0;
  const float scale = float(1 / (weighted ? total : double(pruned)));
  for (std::int64_t j = begin; j < end; ++j)
    merge_weight[j] = keep[j] ? 0 : (weighted ? importance[j] : 1.0f) * scale;
}

// The layout of a batch from keep and, in cu_seqlens_out[b + 1], the rows that sequence b has after pruning.
void lay_out_batch(const float* importance, const std::int32_t* cu_seqlens, std::int64_t rows,
                   std::int64_t batch, const std::uint8_t* keep, std::int32_t* cu_seqlens_out,
                   std::int32_t* source, float* merge_weight, int threads) {
  cu_seqlens_out[0] = 0;
  for (std::int64_t b = 0; b < batch; ++b) cu_seqlens_out[b + 1] += cu_seqlens_out[b];
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1) schedule(static)
  for (std::int64_t b = 0; b < batch; ++b)
    lay_out(cu_seqlens[b], cu_seqlens[b + 1], b, importance, keep, source + cu_seqlens_out[b], merge_weight);
  for (std::int64_t row = cu_seqlens_out[batch]; row < rows; ++row) source[row] = padding_row;
}

}  // namespace

Status token_importance(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t batch, const std::int32_t* summary_index,
                        float* importance, int threads) {
  with_type(logits_dtype, [&](auto element) {
    const auto* logits = static_cast<const decltype(element)*>(mag_logits);
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1) schedule(dynamic)
    for (std::int64_t b = 0; b < batch; ++b)
      sequence_importance(sequence(cu_seqlens, summary_index, b), summary, received, logits, logits_stride,
                          alignment_tokens, importance);
  });
  return Status::ok;
}

Status select_tokens(const float* importance, const void* mag_logits, DType logits_dtype,
                     std::int64_t logits_stride, std::int64_t alignment_tokens,
                     const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                     const std::int32_t* summary_index, double temperature, std::uint8_t* keep,
                     std::int32_t* cu_seqlens_out, std::int32_t* source, float* merge_weight, int threads) {
  with_type(logits_dtype, [&](auto element) {
    const auto* logits = static_cast<const decltype(element)*>(mag_logits);
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1) schedule(dynamic)
    for (std::int64_t b = 0; b < batch; ++b)
      cu_seqlens_out[b + 1] =
          std::int32_t(sequence_keep(sequence(cu_seqlens, summary_index, b), importance, logits,
                                     logits_stride, alignment_tokens, temperature, keep));
  });
  lay_out_batch(importance, cu_seqlens, rows, batch, keep, cu_seqlens_out, source, merge_weight, threads);
  return Status::ok;
}

Status score_and_select(const float* summary, const float* received, const void* mag_logits,
                        DType logits_dtype, std::int64_t logits_stride, std::int64_t alignment_tokens,
                        const std::int32_t* cu_seqlens, std::int64_t rows, std::int64_t batch,
                        const std::int32_t* summary_index, double temperature, float* importance,
                        std::uint8_t* keep, std::int32_t* cu_seqlens_out, std::int32_t* source,
                        float* merge_weight, int threads) {
  with_type(logits_dtype, [&](auto element) {
    const auto* logits = static_cast<const decltype(element)*>(mag_logits);
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1) schedule(dynamic)
    for (std::int64_t b = 0; b < batch; ++b) {
      const Sequence s = sequence(cu_seqlens, summary_index, b);
      sequence_importance(s, summary, received, logits, logits_stride, alignment_tokens, importance);
      cu_seqlens_out[b + 1] = std::int32_t(
          sequence_keep(s, importance, logits, logits_stride, alignment_tokens, temperature, keep));
    }
  });
  lay_out_batch(importance, cu_seqlens, rows, batch, keep, cu_seqlens_out, source, merge_weight, threads);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
