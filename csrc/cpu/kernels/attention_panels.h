// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the forward and the backward of attention share: how rows are cut into blocks, which keys those see,
// how keys and values are laid out in panels of two vectors of cells (attention_operands.h), and the inner
// loop of every product.

#include "cpu/kernels/attention_operands.h"
#include "cpu/kernels/threads.h"
#include "madtp/attention.h"
#include "sizes.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kPanel = 2 * kWidth;
// Accumulators, two vectors of the panel and one broadcast must fit the register file: 32 or 16 of them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxBlockRows = 14;
#else
constexpr int kMaxBlockRows = 6;
#endif
// Between rows of a block: the largest head_dim, and a cache line, so that rows lie in different sets of L1.
constexpr std::int64_t kBlockStride = 256 + 16;

// Rows 0 to count, split evenly into blocks of at most kMaxBlockRows.
struct Blocks {
  std::int64_t count, number;
  explicit Blocks(std::int64_t rows) : count(rows), number((rows + kMaxBlockRows - 1) / kMaxBlockRows) {}
  std::int64_t begin(std::int64_t block) const {
    return block * (count / number) + (block < count % number ? block : count % number);
  }
  // How many runs of `blocks` blocks.
  std::int64_t chunks(std::int64_t blocks) const { return (number + blocks - 1) / blocks; }
};

inline std::int64_t padded(std::int64_t keys) { return (keys + kPanel - 1) / kPanel * kPanel; }

struct Sequence {
  std::int64_t number;
  // First row and number of rows. Queries that see no key, the first ones if any, are not among them.
  std::int64_t query, queries, key, keys;
  std::int64_t blind;        // how many those are, before `query`
  std::int64_t summary_row;  // row inside the sequence, -1: none

  Sequence(const AttentionInputs& a, std::int64_t b)
      : number(b),
        query(a.cu_seqlens_q[b]),
        queries(a.cu_seqlens_q[b + 1] - query),
        key(a.cu_seqlens_k[b]),
        keys(a.cu_seqlens_k[b + 1] - key),
        blind(a.window_right < 0 ? 0 : queries - keys - a.window_right),
        summary_row(a.summary_index == nullptr ? 0 : a.summary_index[b]) {
    if (blind < 0) blind = 0;
    query += blind;
    queries -= blind;
    if (summary_row >= queries) summary_row = -1;  // a row that does not exist is none
  }
};

// Whether some key is hidden from some query, as far as the arguments say.
inline bool is_masked(const AttentionInputs& a) { return a.window_left >= 0 || a.window_right >= 0; }

// Self-attention: by how many queries that see key j, the summary token not among them, what j receives is
// divided.
inline float observers(const AttentionInputs& a, const Sequence& s, std::int64_t j) {
  if (!is_masked(a)) return 1;
  const std::int64_t first = a.window_right < 0 || j < a.window_right ? 0 : j - a.window_right;
  const std::int64_t end =
      a.window_left < 0 || s.queries - j <= a.window_left ? s.queries : j + a.window_left + 1;
  const std::int64_t count = end - first - (s.summary_row >= first && s.summary_row < end ? 1 : 0);
  return float(count > 1 ? count : 1);
}

// The keys that a block of query rows sees. They are counted from `first` on, the first of a panel.
struct Visible {
  std::int64_t first;                 // in the sequence
  std::int64_t count;                 // up to the last one that some row sees
  std::int64_t begin, end;            // row 0 sees keys from begin on and below end, if below count
  std::int64_t begin_step, end_step;  // how far these move from row to row: 1 in a window, else 0
  std::int64_t position;              // where row 0 stands among the keys

  Visible() = default;
  // Rows [i, i + rows) of a sequence.
  Visible(const AttentionInputs& a, const Sequence& s, std::int64_t i, std::int64_t rows)
      : begin_step(a.window_left < 0 ? 0 : 1), end_step(a.window_right < 0 ? 0 : 1) {
    position = i + s.keys - s.queries;
    const std::int64_t lowest = a.window_left < 0 ? 0 : position - a.window_left;
    first = lowest > 0 ? lowest / kPanel * kPanel : 0;
    const std::int64_t last = position + rows + a.window_right;
    count = (a.window_right < 0 || last > s.keys ? s.keys : last) - first;
    begin = lowest - first;
    end = a.window_right < 0 ? count : position + a.window_right + 1 - first;
    position -= first;
  }

  std::int64_t panels() const { return (count + kPanel - 1) / kPanel; }
  std::int64_t first_key(std::int64_t row) const {
    const std::int64_t own = begin + row * begin_step;
    return own > 0 ? own : 0;
  }
  std::int64_t end_key(std::int64_t row) const {
    const std::int64_t own = end + row * end_step;
    return own < count ? own : count;
  }
};

// Rows of memory to fetch while something else computes: rows of one head lie too far apart for the hardware
// to foresee.
struct Upcoming {
  const char* first = nullptr;
  std::int64_t stride = 0;  // bytes
  std::int64_t rows = 0;
  std::int64_t bytes = 0;  // of a row

  // The part of the rows that belongs to step `step` of `steps`.
  void fetch(std::int64_t step, std::int64_t steps) const {
    for (std::int64_t r = rows * step / steps; r < rows * (step + 1) / steps; ++r)
      for (std::int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(first + r * stride + byte, 0, 2);
  }
};

// rows (count, head_dim) -> panels [key / kPanel][cells of head_dim][kPanel], zeros up to the end of the last
// vector.
template <typename S, typename T>
void pack_keys(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* panels) {
  const std::int64_t cells = head_dim / S::kTerms;
  for (std::int64_t first = 0; first < count; first += kWidth) {
    float* const to = panels + first / kPanel * kPanel * cells + first % kPanel;
    for (std::int64_t c = 0; c < cells; c += kWidth) {
      const std::int64_t d = c * S::kTerms;
      Vec tile[kWidth];
      for (int i = 0; i < kWidth; ++i)
        tile[i] = first + i < count ? S::load_row(rows + (first + i) * stride + d, head_dim - d) : Vec{};
      transpose(tile);
      // Where no head ends inside a vector this is known at compile time.
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        if (kWidth * S::kTerms <= kHeadStep || c + i < cells) store(to + (c + i) * kPanel, tile[i]);
    }
  }
}

// Cells across `count` rows.
template <typename S>
constexpr std::int64_t cells_across(std::int64_t count) {
  return (count + S::kTerms - 1) / S::kTerms;
}

// rows (count, head_dim) -> panels [head_dim / kPanel][cells across rows][kPanel].
template <typename S, typename T>
void pack_values(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t head_dim,
                 float* panels) {
  for (std::int64_t d = 0; d < head_dim; d += kWidth) {
    float* const to = panels + d / kPanel * kPanel * cells_across<S>(count) + d % kPanel;
    for (std::int64_t j = 0; j < count; j += S::kTerms)
      store(to + j / S::kTerms * kPanel,
            S::load_rows(rows + j * stride + d, stride, count - j, head_dim - d));
  }
}

constexpr float kLog2E = 1.44269504088896341f, kLogE2 = 0.693147180559945309f;

// One head of one row.
template <typename T>
const T* head_row(const void* base, const std::int64_t (&strides)[2], std::int64_t row, std::int64_t head) {
  return static_cast<const T*>(base) + row * strides[0] + head * strides[1];
}

// What makes a product of a query and a key a score to base 2.
inline float score_scale(const AttentionInputs& a) { return a.softmax_scale * kLog2E; }

// Query rows [first, first + count) of the batch, one head -> (count, cells of kBlockStride). Floats are
// multiplied with the scale of the scores; pairs would be rounded by that.
template <typename S, typename T>
void load_queries(const AttentionInputs& a, std::int64_t first, std::int64_t count, std::int64_t head,
                  float* queries) {
  const Vec scale = broadcast(score_scale(a));
  for (std::int64_t r = 0; r < count; ++r) {
    const T* const q = head_row<T>(a.q, a.q_strides, first + r, head);
    for (std::int64_t d = 0; d < a.head_dim; d += S::kTerms * kWidth) {
      const Vec cells = S::load_row(q + d, a.head_dim - d);
      store(queries + (r * kBlockStride + d) / S::kTerms, S::kTerms == 1 ? cells * scale : cells);
    }
  }
}

// acc[r] += left[r * kRow + i * kStep] * right[i * kPanel ...] over i < count cells: every product of
// attention.
template <typename S, int R, int V, int kRow, int kStep = 1>
inline __attribute__((always_inline)) void accumulate(const float* __restrict left,
                                                      const float* __restrict right, std::int64_t count,
                                                      Vec (&acc)[R][V]) {
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < count; ++i) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(right + i * kPanel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a = S::spread(left + r * kRow + i * kStep);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = S::add(a, b[v], acc[r][v]);
    }
  }
}

// Floats, counted while sizes are added up and handed out afterwards, each piece on a cache line.
class Arena {
 public:
  explicit Arena(float* base = nullptr) : base_(base) {}
  // A piece of as many floats as the product of the sizes.
  float* take(std::initializer_list<std::int64_t> sizes) {
    float* const piece = next();
    used_ = sum_of({used_, (product_of(sizes) + 15) / 16 * 16});
    return piece;
  }
  float* next() const { return base_ == nullptr ? nullptr : base_ + used_; }
  std::int64_t used() const { return used_; }

 private:
  float* const base_;
  std::int64_t used_ = 0;
};

// A plan has the `threads` it runs on, and takes its shared `results` and the `workspace` of each thread from
// an arena, in that order.
template <typename Plan>
std::int64_t floats_of_thread(const Plan& plan) {
  Arena arena;
  plan.workspace(arena);
  return arena.used();
}

// kTooLarge where no memory could be that large.
template <typename Plan>
std::int64_t bytes_of(const Plan& plan) {
  Arena arena;
  plan.results(arena);
  const std::int64_t floats = sum_of({arena.used(), product_of({plan.threads, floats_of_thread(plan)})});
  return product_of({floats, sizeof(float)});
}

template <typename Plan>
Status workspace_bytes(const Plan& plan, std::int64_t* bytes) {
  const std::int64_t needed = bytes_of(plan);
  if (needed == kTooLarge) return Status::invalid_argument;
  *bytes = needed;
  return Status::ok;
}

template <typename Plan>
auto workspace_of_thread(const Plan& plan, float* base) {
  Arena arena(base + thread_number() * floats_of_thread(plan));
  return plan.workspace(arena);
}

}  // namespace madtp::cpu::MADTP_ISA
