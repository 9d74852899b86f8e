// SPDX-License-Identifier: Apache-2.0
#pragma once

// A linear layer by units of its weight. A task is a tile of tokens times a span of output features: block by
// block of the input features it transposes x into a panel that stays in L1 and runs the units over it; the
// sums stay in L2, and when they are complete each row gets its bias, activation, scale and residual. A few
// tokens are not worth vectors of their own: where there is a kernel for it, the lanes then are output
// features.

#include <cstdlib>
#include <type_traits>

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/threads.h"

namespace madtp::cpu::MADTP_ISA {

constexpr std::int64_t kSpanGroups = 3;      // groups that share a panel: sums of 768 rows of W stay in L2
constexpr double kShare = 1 << 17;           // products worth a thread of their own: some microseconds
constexpr std::int64_t kPanelEntries = 256;  // what a byte can name, so that none is out of bounds

// Cuts `count` into `parts` even parts.
struct Cut {
  std::int64_t count, parts;
  std::int64_t begin(std::int64_t part) const { return count * part / parts; }
  std::int64_t largest() const { return (count + parts - 1) / parts; }
};

inline std::int64_t at_least(std::int64_t parts, std::int64_t wanted, std::int64_t max) {
  parts = parts > wanted ? parts : wanted;
  return parts < max ? parts : max;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Scratch of one thread.
struct Workspace {
  float* panel;
  float* sums;
  float* weights;  // of one unit, converted
  float* rows;     // (kWidth, kGroupRows)
};

// How the work is cut, which changes no bit of it.
struct Plan {
  bool by_rows;      // lanes are output features
  Cut tiles, spans;  // of vectors of tokens, and of groups of output features
  std::int64_t panel, sums;

  // tile_vectors: of tokens at most in a tile; row_tokens: at most for features in the lanes.
  Plan(const Layout& layout, std::int64_t tokens, int tile_vectors, int row_tokens, int threads) {
    const std::int64_t groups = layout.groups;
    by_rows = tokens <= row_tokens;
    if (by_rows) {
      tiles = {1, 1};
      spans = {groups, groups};
      panel = tokens * kBlock;
      sums = row_stride(int(tokens)) * kGroupRows;
      return;
    }
    const std::int64_t vectors = ceil_div(tokens, kWidth), few = ceil_div(vectors, tile_vectors);
    spans = {groups, at_least(ceil_div(groups, kSpanGroups), ceil_div(threads, few), groups)};
    tiles = {vectors, at_least(few, ceil_div(threads, spans.parts), vectors)};
    const std::int64_t tile_tokens = tiles.largest() * kWidth;
    panel = kPanelEntries * tile_tokens;
    sums =
        (spans.largest() + 1) * kGroupRows * tile_tokens;  // one more: row numbers of any value stay inside
  }

  std::int64_t tasks() const { return tiles.parts * spans.parts; }
  std::int64_t floats() const { return panel + sums + kBlock / 2 * kUnitRows + kWidth * kGroupRows; }
  Workspace workspace(float* memory) const {
    return {memory, memory + panel, memory + panel + sums, memory + panel + sums + kBlock / 2 * kUnitRows};
  }
};

// The rows that a weight is multiplied with.
template <typename X>
struct Rows {
  const X* data;
  std::int64_t stride;
  const X* operator[](std::int64_t row) const { return data + row * stride; }
};

// M says how the products are made: what an epilogue asks of it (epilogue.h), and
//   X         the elements of the rows
//   Step      how a panel is multiplied (step.h)
//   LookUp    the same for at most kRowTokens tokens (multiply.h); kRowTokens 0: there is none
//   static const Step::Weight* weights(unit, scratch)     the weights of a unit as its steps take them
template <typename M>
class Linear {
  using X = typename M::X;
  using Step = typename M::Step;

 public:
  Linear(const M& method, const typename M::Inputs& inputs, const Layout& layout, Rows<X> x,
         std::int64_t tokens, void* out, std::int64_t out_stride)
      : epilogue_(method, inputs, out, out_stride), a_(inputs), layout_(layout), x_(x), tokens_(tokens) {}

  // Tokens in the lanes: vectors [first, last) of tokens, groups [first_group, last_group) of output
  // features.
  void run_tile(std::int64_t first, std::int64_t last, std::int64_t first_group, std::int64_t last_group,
                const Workspace& w) const {
    const int vectors = int(last - first);
    const MultiplyTokens<Step> multiply = multiply_tokens_function<Step>(vectors);
    const std::int64_t stride = vectors * kWidth;
    const auto sums = [&](std::int64_t group) {
      return w.sums + (layout_.first_row(group) - layout_.first_row(first_group)) * stride;
    };
    if (layout_.blocks == 0) clear(w.sums, sums(last_group));
    for (std::int64_t block = 0; block < layout_.blocks; ++block) {
      pack_panel(first * kWidth, vectors, block, w.panel);
      for (std::int64_t group = first_group; group < last_group; ++group) {
        const TokenTile tile{w.panel, sums(group), block == 0};
        for (std::int64_t u = 0; u < layout_.unit_count(group); ++u) {
          const Unit unit = layout_.unit(a_.layout, group, block, u);
          multiply(unit, M::weights(unit, w.weights), tile);
        }
      }
    }
    for (std::int64_t group = first_group; group < last_group; ++group) {
      const std::int64_t out_features = layout_.row_count(group);
      for (std::int64_t v = 0; v < vectors; ++v) {
        const std::int64_t token = (first + v) * kWidth;
        for (std::int64_t n = 0; n < out_features; n += kWidth) {
          Vec tile[kWidth];
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) tile[i] = load(sums(group) + (n + i) * stride + v * kWidth);
          transpose(tile);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) store(w.rows + i * kGroupRows + n, tile[i]);
        }
        finish(w.rows, token, tokens_ - token < kWidth ? tokens_ - token : kWidth, group);
      }
    }
  }

  // Features in the lanes: all tokens, one group.
  void run_rows(std::int64_t group, const Workspace& w) const {
    using LookUp = typename M::LookUp;
    using BlockX = typename LookUp::X;
    const MultiplyRows<LookUp> multiply = multiply_rows_function<LookUp>(int(tokens_));
    BlockX* const block_x = reinterpret_cast<BlockX*>(w.panel);
    const int stride = row_stride(int(tokens_));
    if (layout_.blocks == 0) clear(w.sums, w.sums + kGroupRows * stride);
    for (std::int64_t block = 0; block < layout_.blocks; ++block) {
      const int columns = layout_.block_columns(block);
      for (std::int64_t t = 0; t < tokens_; ++t) {
        for (int c = 0; c < kBlock; c += kWidth)
          store(block_x + t * kBlock + c, c < columns ? load(x_[t] + block * kBlock + c) : Vec{});
      }
      multiply(layout_.unit(a_.layout, group, block, 0), layout_.unit_count(group), block_x, w.sums,
               block == 0);
    }
    for (std::int64_t t = 0; t < tokens_; ++t)
      for (int r = 0; r < kGroupRows; ++r) w.rows[t * kGroupRows + r] = w.sums[r * stride + t];
    finish(w.rows, 0, tokens_, group);
  }

 private:
  // Sums without input features, which no block begins.
  static void clear(float* sums, const float* end) {
    while (sums < end) *sums++ = 0;
  }

  // The entries of one block, tokens in the lanes; zeros where there is no token.
  void pack_panel(std::int64_t token, int vectors, std::int64_t block, float* panel) const {
    const int columns = layout_.block_columns(block);
    const std::int64_t stride = vectors * kWidth;
    for (int v = 0; v < vectors; ++v, token += kWidth, panel += kWidth) {
      for (int c = 0; c < columns; c += Step::kColumns) {
        Vec tile[kWidth];
        const X* const from = x_[token] + block * kBlock + c;
        // So many rows far apart are more streams than the hardware follows: the next block is asked for
        // here.
        for (int i = 0; i < kWidth; ++i) __builtin_prefetch(from + kBlock + i * x_.stride, 0, 2);
        if (token + kWidth <= tokens_) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) tile[i] = Step::load_columns(from + i * x_.stride, columns - c);
        } else {
          for (int i = 0; i < kWidth; ++i)
            tile[i] = token + i < tokens_ ? Step::load_columns(from + i * x_.stride, columns - c) : Vec{};
        }
        transpose(tile);
        Step::store_entries(tile, panel + c / 4 * Step::kEntries * stride, stride);
      }
    }
  }

  // sums (count, kGroupRows) of the output features of a group -> rows of the output from `token` on.
  void finish(const float* sums, std::int64_t token, std::int64_t count, std::int64_t group) const {
    epilogue_.run(sums, kGroupRows, token, count, layout_.first_row(group), layout_.row_count(group));
  }

  Epilogue<M> epilogue_;
  const typename M::Inputs& a_;
  const Layout& layout_;
  Rows<X> x_;
  std::int64_t tokens_;
};

// The first `tokens` rows of the output, of which there are some, as there are output features.
template <typename M>
Status multiply(const M& method, const typename M::Inputs& a, const Layout& layout, Rows<typename M::X> x,
                std::int64_t tokens, void* out, std::int64_t out_stride, int threads) {
  const Plan plan(layout, tokens, M::Step::kTileVectors, M::kRowTokens, threads);
  if (threads > plan.tasks()) threads = int(plan.tasks());
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::size_t(plan.floats() * threads) * sizeof(float)) != 0)
    return Status::out_of_memory;

  const Linear<M> linear(method, a, layout, x, tokens, out, out_stride);
  for_each_task(plan.tasks(), threads, [&](std::int64_t task, int thread) {
    const Workspace w = plan.workspace(static_cast<float*>(memory) + plan.floats() * thread);
    const std::int64_t tile = task / plan.spans.parts, span = task % plan.spans.parts;
    if constexpr (M::kRowTokens > 0) {
      if (plan.by_rows) return linear.run_rows(span, w);
    }
    linear.run_tile(plan.tiles.begin(tile), plan.tiles.begin(tile + 1), plan.spans.begin(span),
                    plan.spans.begin(span + 1), w);
  });
  std::free(memory);
  return Status::ok;
}

// The rows of the output: compute(tokens, threads) -> Status writes the valid ones, the others are zeros.
template <typename T, typename Inputs, typename Compute>
Status run_valid_rows(const Inputs& a, void* out, std::int64_t out_stride, int threads, Compute&& compute) {
  std::int64_t tokens = a.tokens;
  if (a.num_rows != nullptr && *a.num_rows < tokens) tokens = *a.num_rows > 0 ? *a.num_rows : 0;
  if (a.out_features == 0) return Status::ok;
  const double shares = 1 + double(tokens) * double(a.out_features) * double(a.in_features) / 2 / kShare;
  if (threads > shares) threads = int(shares);
  if (tokens > 0) {
    const Status status = compute(tokens, threads);
    if (status != Status::ok) return status;
  }
  for_each_task(a.tokens - tokens, threads, [&](std::int64_t token, int) {
    __builtin_memset(static_cast<T*>(out) + (tokens + token) * out_stride, 0,
                     std::size_t(a.out_features) * sizeof(T));
  });
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
