// SPDX-License-Identifier: Apache-2.0
#pragma once

// The backward of a block of R query rows of one head: probabilities again from the log-sum-exp, gradients of
// the scores and of the queries. A chunk of blocks then adds to the gradients of its keys and values.
// Panels are those of attention_panels.h: probabilities and gradients of scores [panel of keys][R][kPanel].

#include "cpu/kernels/attention_bias.h"
#include "cpu/kernels/attention_panels.h"

namespace madtp::cpu::MADTP_ISA {

// Keys per tile of the products that sum over queries: kKeyTile x 2 accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kKeyTile = 8;
#else
constexpr int kKeyTile = 4;
#endif

struct GradientBlock {
  const float* queries;       // (R, kBlockStride), scaled by softmax_scale * log2(e)
  const float* grad_out;      // (R, kBlockStride)
  const float* keys;          // panels [panel][head_dim][kPanel], from the first that the block sees on
  const float* values;        // likewise
  const float* key_rows;      // panels [panel of head_dim][key][kPanel], from the first key on
  std::int64_t key_capacity;  // keys in a panel of key_rows
  std::int64_t head_dim;
  Visible visible;
  Bias bias;
  const float* lse;  // (R,) of the scores
  float* probabilities;
  float* grad_scores;
  float* derivatives;   // panels of R rows: those of what the soft cap makes of the scores; null without one
  float* grad_queries;  // (R, head_dim up to the end of its last vector), row stride grad_stride
  std::int64_t grad_stride;
  float grad_scale;  // of grad_queries
  // What the statistics add to the gradient of the probabilities; null without them.
  const std::int32_t* best;  // the head that reaches the maximum, panels of R rows
  std::int32_t head;
  const float* grad_maximum;     // of each key, gradient of that maximum
  const float* through_summary;  // of each key, gradient of the summary row's probabilities
  std::int64_t summary_row;      // that row in the block, if it is there
};

// to[r] = left[r] . panel, for V vectors of one panel: to is [R][kPanel].
template <int R, int V>
inline __attribute__((always_inline)) void product_panel(const float* left, const float* panel,
                                                         std::int64_t head_dim, float* to) {
  Vec acc[R][V] = {};
  accumulate<Floats, R, V, kBlockStride>(left, panel, head_dim, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + r * kPanel + v * kWidth, acc[r][v]);
}

// left (R, head_dim) times all key columns that the block sees.
template <int R>
inline __attribute__((always_inline)) void product(const GradientBlock& block, const float* left,
                                                   const float* panels, float* to) {
  const std::int64_t whole = block.visible.count / kPanel, rest = block.visible.count % kPanel;
  const std::int64_t size = block.head_dim * kPanel;
  for (std::int64_t p = 0; p < whole; ++p)
    product_panel<R, 2>(left, panels + p * size, block.head_dim, to + p * R * kPanel);
  if (rest > kWidth)
    product_panel<R, 2>(left, panels + whole * size, block.head_dim, to + whole * R * kPanel);
  if (rest > 0 && rest <= kWidth)
    product_panel<R, 1>(left, panels + whole * size, block.head_dim, to + whole * R * kPanel);
}

// Zeros where a row sees no key, up to the end of the last panel.
template <int R>
inline void clear_unseen(const GradientBlock& block, float* panels) {
  for (int r = 0; r < R; ++r) {
    const auto clear = [&](std::int64_t j) { panels[(j / kPanel * R + r) * kPanel + j % kPanel] = 0; };
    for (std::int64_t j = 0; j < block.visible.first_key(r); ++j) clear(j);
    for (std::int64_t j = block.visible.end_key(r); j < block.visible.panels() * kPanel; ++j) clear(j);
  }
}

// Makes the rows of the probabilities add up to 1. Slopes can lower all scores of a row so far that its
// log-sum-exp is too coarse for that, and a row that sees one key alone hands exactly nothing to its scores.
template <int R>
inline void normalize(const GradientBlock& block) {
  const std::int64_t panels = block.visible.panels();
  for (int r = 0; r < R; ++r) {
    float* const row = block.probabilities + r * kPanel;
    Vec total = {};
    for (std::int64_t p = 0; p < panels; ++p)
      total += load(row + p * R * kPanel) + load(row + p * R * kPanel + kWidth);
    const float all = sum(total);
    const Vec divisor = broadcast(all == 0 ? 1 : all);
    for (std::int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < 2; ++v) {
        float* const at = row + p * R * kPanel + v * kWidth;
        store(at, load(at) / divisor);
      }
    }
  }
}

template <int R>
inline void recompute_probabilities(const GradientBlock& block) {
  product<R>(block, block.queries, block.keys, block.probabilities);
  const std::int64_t panels = block.visible.panels();
  for (std::int64_t p = 0; block.bias && p < panels; ++p)
    apply_bias(block.bias, p, R, 2, block.probabilities + p * R * kPanel,
               block.derivatives == nullptr ? nullptr : block.derivatives + p * R * kPanel);
  for (int r = 0; r < R; ++r) {
    const Vec lse = broadcast(block.lse[r] * kLog2E);
    float* row = block.probabilities + r * kPanel;
    for (std::int64_t p = 0; p < panels; ++p, row += R * kPanel) {
      store(row, exp2_nonpositive(load(row) - lse));
      store(row + kWidth, exp2_nonpositive(load(row + kWidth) - lse));
    }
  }
  clear_unseen<R>(block, block.probabilities);
  if (block.bias.slope != 0 || block.visible.begin_step != 0) normalize<R>(block);
}

// Adds what the statistics send back to the gradient of the probabilities of one panel.
template <int R>
inline void add_statistics(const GradientBlock& block, std::int64_t panel, float* grads) {
  const IntVec head = IntVec{} + block.head;
  for (int v = 0; v < 2; ++v) {
    const std::int64_t first = panel * kPanel + v * kWidth;
    const Vec grad_maximum = load(block.grad_maximum + first);
    const Vec through_summary = load(block.through_summary + first);
    for (int r = 0; r < R; ++r) {
      float* const at = grads + r * kPanel + v * kWidth;
      const Vec more = r == block.summary_row
                           ? through_summary
                           : select(load_ints(block.best + (panel * R + r) * kPanel + v * kWidth) == head,
                                    grad_maximum, Vec{});
      store(at, load(at) + more);
    }
  }
}

// The gradient of the scores: probabilities * (grad - sum_j probabilities grad).
template <int R, bool kStatistics>
inline void score_gradients(const GradientBlock& block) {
  product<R>(block, block.grad_out, block.values, block.grad_scores);
  const std::int64_t panels = block.visible.panels();
  if (kStatistics)
    for (std::int64_t p = 0; p < panels; ++p) add_statistics<R>(block, p, block.grad_scores + p * R * kPanel);
  clear_unseen<R>(block, block.grad_scores);
  for (int r = 0; r < R; ++r) {
    const float* probability = block.probabilities + r * kPanel;
    float* const grads = block.grad_scores + r * kPanel;
    Vec total[2] = {};
    for (std::int64_t p = 0; p < panels; ++p)
      for (int v = 0; v < 2; ++v)
        total[v] +=
            load(probability + p * R * kPanel + v * kWidth) * load(grads + p * R * kPanel + v * kWidth);
    const Vec mean = broadcast(sum(total[0] + total[1]));
    for (std::int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < 2; ++v) {
        float* const at = grads + p * R * kPanel + v * kWidth;
        store(at, load(probability + p * R * kPanel + v * kWidth) * (load(at) - mean));
      }
    }
  }
  for (std::int64_t i = 0; block.derivatives != nullptr && i < panels * R * kPanel; i += kWidth)
    store(block.grad_scores + i, load(block.grad_scores + i) * load(block.derivatives + i));
  if (block.derivatives != nullptr) clear_unseen<R>(block, block.grad_scores);
}

// V vectors of the gradient of the queries.
template <int R, int V>
inline __attribute__((always_inline)) void query_gradient_panel(const GradientBlock& block,
                                                                std::int64_t panel) {
  const float* const keys = block.key_rows + panel * block.key_capacity * kPanel;
  Vec acc[R][V] = {};
  for (std::int64_t p = 0; p < block.visible.panels(); ++p) {
    const std::int64_t left = block.visible.count - p * kPanel;
    accumulate<Floats, R, V, kPanel>(block.grad_scores + p * R * kPanel, keys + p * kPanel * kPanel,
                                     left < kPanel ? left : kPanel, acc);
  }
  const Vec scale = broadcast(block.grad_scale);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      store(block.grad_queries + r * block.grad_stride + panel * kPanel + v * kWidth, acc[r][v] * scale);
}

// Probabilities only.
template <int R>
__attribute__((noinline)) void recompute(const GradientBlock& block) {
  recompute_probabilities<R>(block);
}

template <int R, bool kStatistics>
__attribute__((noinline)) void differentiate(const GradientBlock& block) {
  recompute_probabilities<R>(block);
  score_gradients<R, kStatistics>(block);
  const std::int64_t pairs = (block.head_dim + kWidth - 1) / kPanel;
  for (std::int64_t p = 0; p < pairs; ++p) query_gradient_panel<R, 2>(block, p);
  if (block.head_dim > pairs * kPanel) query_gradient_panel<R, 1>(block, pairs);
}

using GradientFunction = void (*)(const GradientBlock&);

struct GradientFunctions {
  GradientFunction recompute, differentiate;
};

// Those of blocks of so many rows.
template <int R = kMaxBlockRows>
inline GradientFunctions gradient_functions(std::int64_t rows, bool statistics) {
  if constexpr (R == 0) {
    return {};
  } else {
    if (rows == R) return {&recompute<R>, statistics ? &differentiate<R, true> : &differentiate<R, false>};
    return gradient_functions<R - 1>(rows, statistics);
  }
}

// Blocks of one chunk, as the products over queries see them.
struct GradientChunk {
  std::int64_t blocks;
  const std::int64_t* rows;         // (blocks,)
  const std::int64_t* first_panel;  // (blocks,) of keys that the block sees
  const std::int64_t* panels;       // (blocks,) how many those are
  const std::int64_t* first_value;  // (blocks,) offset of its probabilities
};

// to[j] += sum over the chunk's rows i of left[i, j] * right[i], for a tile of keys and V vectors of a panel
// of head_dim: right is [row][kPanel]. With kApart the chunk is summed by itself first, which is more exact
// where the chunks of many heads meet in one sum.
template <int V, bool kApart>
inline __attribute__((always_inline)) void add_tile(const GradientChunk& chunk, std::int64_t panel,
                                                    std::int64_t key, const float* left, const float* right,
                                                    float* to) {
  Vec acc[kKeyTile][V];
#pragma GCC unroll 16
  for (int j = 0; j < kKeyTile; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[j][v] = kApart ? Vec{} : load(to + j * kPanel + v * kWidth);
  for (std::int64_t b = 0; b < chunk.blocks; ++b) {
    const std::int64_t rows = chunk.rows[b];
    const std::int64_t own = panel - chunk.first_panel[b];
    if (own >= 0 && own < chunk.panels[b]) {
      const float* const columns = left + chunk.first_value[b] + own * rows * kPanel + key;
      accumulate<Floats, kKeyTile, V, 1, kPanel>(columns, right, rows, acc);
    }
    right += rows * kPanel;
  }
#pragma GCC unroll 16
  for (int j = 0; j < kKeyTile; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* const at = to + j * kPanel + v * kWidth;
      store(at, kApart ? load(at) + acc[j][v] : acc[j][v]);
    }
  }
}

// The same for all keys in [first_key, end_key), the first one that of a panel, and one panel of head_dim; to
// is [key][kPanel].
template <int V, bool kApart>
__attribute__((noinline)) void add_products(const GradientChunk& chunk, std::int64_t first_key,
                                            std::int64_t end_key, const float* left, const float* right,
                                            float* to) {
  for (std::int64_t j = first_key; j < end_key; j += kKeyTile)
    add_tile<V, kApart>(chunk, j / kPanel, j % kPanel, left, right, to + j * kPanel);
}

}  // namespace madtp::cpu::MADTP_ISA
