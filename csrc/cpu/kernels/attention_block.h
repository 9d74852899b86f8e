// SPDX-License-Identifier: Apache-2.0
#pragma once

// A block of R query rows of one head against all keys that it sees, in registers and L1: scores, softmax,
// output, and the running maximum over heads of the probabilities.
//
// Everything is laid out in panels of two vectors: keys [panel][cells of head_dim][kPanel], values [panel of
// head_dim][cells across keys][kPanel], scores and maxima [panel][R][kPanel]; strides are constants, and a
// micro-kernel of R x 2 accumulators serves both products. Scores and all that becomes of them are float32;
// where cells are pairs of bfloat16, the probabilities are rounded for the second product alone.

#include <cmath>

#include "cpu/kernels/attention_bias.h"
#include "cpu/kernels/attention_panels.h"

namespace madtp::cpu::MADTP_ISA {

constexpr float kMasked = -INFINITY;  // its exponential is nothing; every row sees a key that is not masked

// Floats for a number per row of a block, rounded up to whole vectors.
constexpr int kRowLanes = (kMaxBlockRows + kWidth - 1) / kWidth * kWidth;

struct QueryBlock {
  const float* queries;     // (R, cells of kBlockStride), as load_queries leaves them
  const float* keys;        // panels of the head, from the first that the block sees on
  const float* values;      // likewise
  std::int64_t value_rows;  // cells across keys in a panel of values
  std::int64_t head_dim;
  Visible visible;
  std::int64_t plain_begin, plain_end;  // keys that all rows see and whose scores stay as they are
  Bias bias;
  float* scores;  // panels of R rows; probabilities before normalisation when the block is done
  float* out;     // (R, head_dim up to the end of its last vector)
  std::int64_t out_stride;
  float* maxima;    // panels of R rows, the maximum over the heads so far; null: no statistics
  bool first_head;  // maxima hold nothing yet
  float* norms;     // (kRowLanes,) of the output rows; with maxima only
  float* inverse;   // (kRowLanes,) 1 / sum of the scores of each row
  float* lse;       // (R,) log of that sum before the maximum was taken off; null: not wanted
  Upcoming next_queries, next_keys, next_values;
  float* pairs;  // [panel][R][kPanel / 2]: the probabilities as cells; of Pairs only
  float scale;   // of the products with the keys that is not in the queries; of Pairs only
};

// Masks the stored scores of a panel that is not plain, and takes their row maxima. Out of line: inlined, its
// constants would cost the products their registers.
template <int R, int V>
__attribute__((noinline)) void mask_panel(const QueryBlock& block, std::int64_t panel, Vec (&highest)[R]) {
  if (block.bias) apply_bias(block.bias, panel, R, V, block.scores + panel * R * kPanel, nullptr);
  for (int r = 0; r < R; ++r) {
    const std::int64_t first = block.visible.first_key(r) - panel * kPanel;
    const std::int64_t end = block.visible.end_key(r) - panel * kPanel;
    for (int v = 0; v < V; ++v) {
      float* const at = block.scores + (panel * R + r) * kPanel + v * kWidth;
      const IntVec seen = (lane_numbers() >= broadcast(float(first - v * kWidth))) &
                          (lane_numbers() < broadcast(float(end - v * kWidth)));
      const Vec masked = select(seen, load(at), broadcast(kMasked));
      store(at, masked);
      highest[r] = max(masked, highest[r]);
    }
  }
}

// Scores of V vectors of one panel, and the running row maxima.
template <typename S, int R, int V>
inline __attribute__((always_inline)) void score_panel(const QueryBlock& block, std::int64_t panel,
                                                       Vec (&highest)[R]) {
  Vec acc[R][V] = {};
  const std::int64_t cells = block.head_dim / S::kTerms;
  accumulate<S, R, V, kBlockStride / S::kTerms>(block.queries, block.keys + panel * cells * kPanel, cells,
                                                acc);
  if constexpr (S::kTerms > 1) {
    const Vec scale = broadcast(block.scale);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] *= scale;
  }
  float* const scores = block.scores + panel * R * kPanel;
  if (panel * kPanel < block.plain_begin || panel * kPanel + V * kWidth > block.plain_end) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(scores + r * kPanel + v * kWidth, acc[r][v]);
    mask_panel<R, V>(block, panel, highest);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      store(scores + r * kPanel + v * kWidth, acc[r][v]);
      highest[r] = max(acc[r][v], highest[r]);
    }
  }
}

// Output columns of V vectors from `column` on, scaled; returns each row's sum of squares in `squares`.
template <typename S, int R, int V, bool kStatistics>
inline __attribute__((always_inline)) void value_panel(const QueryBlock& block, std::int64_t panel,
                                                       Vec (&squares)[R]) {
  const std::int64_t panels = block.visible.panels(), last = panels - 1;
  const std::int64_t value_panels = (block.head_dim + kPanel - 1) / kPanel;
  const float* const values = block.values + panel * block.value_rows * kPanel;
  Vec acc[R][V] = {};
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t count = p < last ? kPanel : block.visible.count - last * kPanel;
    const float* const scores = block.scores + p * R * kPanel;
    const std::int64_t step = panel * panels + p;
    block.next_keys.fetch(step, panels * value_panels);
    block.next_values.fetch(step, panels * value_panels);
    constexpr int kCells = kPanel / S::kTerms;
    accumulate<S, R, V, kCells>(S::kTerms == 1 ? scores : block.pairs + p * R * kCells,
                                values + p * kCells * kPanel, cells_across<S>(count), acc);
    if (kStatistics) {
      // Spread over the value panels, so that the maxima travel while the products compute.
      if (p % value_panels != panel) continue;
      float* const maxima = block.maxima + p * R * kPanel;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec inverse = broadcast(block.inverse[r]);
        for (int v = 0; v < 2; ++v) {
          float* const at = maxima + r * kPanel + v * kWidth;
          const Vec probability = load(scores + r * kPanel + v * kWidth) * inverse;
          store(at, block.first_head ? probability : max_nonnegative(load(at), probability));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec inverse = broadcast(block.inverse[r]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec y = acc[r][v] * inverse;
      store(block.out + r * block.out_stride + panel * kPanel + v * kWidth, y);
      squares[r] = y * y + squares[r];
    }
  }
}

template <typename S, int R>
inline void softmax(const QueryBlock& block, const Vec (&highest)[R]) {
  const std::int64_t vectors = (block.visible.count + kWidth - 1) / kWidth;
  float tops[kRowLanes], sums[kRowLanes];
  reduce_rows(highest, max_or_nan, tops);
  Vec totals[R];
  for (int r = 0; r < R; ++r) {
    block.next_queries.fetch(r, R);
    for (std::int64_t d = 0; d < block.head_dim; d += kWidth)
      __builtin_prefetch(block.out + r * block.out_stride + d, 1);
    const Vec top = broadcast(tops[r]);
    Vec total[2] = {};
    float* row = block.scores + r * kPanel;
    const auto store_both = [&](float* at, Vec probability) {
      store(at, probability);
      if constexpr (S::kTerms > 1)
        S::store_rounded(block.pairs + (at - block.scores) / S::kTerms, probability);
    };
    std::int64_t v = 0;
    for (; v + 2 <= vectors; v += 2, row += R * kPanel) {
      const Vec a = exp2_nonpositive(load(row) - top), b = exp2_nonpositive(load(row + kWidth) - top);
      store_both(row, a);
      store_both(row + kWidth, b);
      total[0] += a;
      total[1] += b;
    }
    if (v < vectors) {
      const Vec a = exp2_nonpositive(load(row) - top);
      store_both(row, a);
      store_both(row + kWidth, Vec{});
      total[0] += a;
    }
    totals[r] = total[0] + total[1];
  }
  reduce_rows(totals, add, sums);
  for (int first = 0; first < R; first += kWidth) {
    const Vec all = load(sums + first);
    store(block.inverse + first, 1.0f / all);
    if (block.lse != nullptr) store(sums + first, (load(tops + first) + log2_positive(all)) * kLogE2);
  }
  for (int r = 0; block.lse != nullptr && r < R; ++r) block.lse[r] = sums[r];
}

template <typename S, int R, bool kStatistics>
__attribute__((noinline)) void attend(const QueryBlock& block) {
  Vec highest[R];
  for (int r = 0; r < R; ++r) highest[r] = broadcast(-INFINITY);
  const std::int64_t whole = block.visible.count / kPanel, rest = block.visible.count % kPanel;
  for (std::int64_t p = 0; p < whole; ++p) score_panel<S, R, 2>(block, p, highest);
  if (rest > kWidth) {
    score_panel<S, R, 2>(block, whole, highest);
  } else if (rest > 0) {
    score_panel<S, R, 1>(block, whole, highest);
  }
  softmax<S, R>(block, highest);

  Vec squares[R] = {};
  const std::int64_t pairs = (block.head_dim + kWidth - 1) / kPanel;
  for (std::int64_t p = 0; p < pairs; ++p) value_panel<S, R, 2, kStatistics>(block, p, squares);
  if (block.head_dim > pairs * kPanel) value_panel<S, R, 1, kStatistics>(block, pairs, squares);
  if (kStatistics) {
    reduce_rows(squares, add, block.norms);
    for (int r = 0; r < R; ++r) block.norms[r] = std::sqrt(block.norms[r]);
  }
}

using AttendFunction = void (*)(const QueryBlock&);

// attend<S, rows, statistics>
template <typename S, int R = kMaxBlockRows>
inline AttendFunction attend_function(std::int64_t rows, bool statistics) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    if (rows == R) return statistics ? &attend<S, R, true> : &attend<S, R, false>;
    return attend_function<S, R - 1>(rows, statistics);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
