// SPDX-License-Identifier: Apache-2.0
// The chosen rows of a sequence that read the same key head go through its keys in blocks: the keys are read
// once for a block, its scores are kept, and after the softmax of each row its probabilities are summed by
// key. Sums of blocks of rows, and of key heads, are added in an order that the sequence alone decides.

#include "cpu/kernels/attention_rows.h"

#include <cmath>
#include <type_traits>

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/threads.h"
#include "sizes.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr std::int64_t kBlockRows = 8;  // rows that share a tile of keys: what they have of scores fits L2
constexpr std::int64_t kMaxParts = 8;   // tasks of a sequence and key head, each with a sum of its own
constexpr float kLog2E = 1.442695040888963f;

std::int64_t padded(std::int64_t count) { return quotient_up(count, kWidth) * kWidth; }

// A sequence, and its rows: number r is query r / group, head r % group of those of a key head.
struct Sequence {
  std::int64_t query, queries, key, keys, rows;

  Sequence(const AttentionRowsInputs& a, std::int64_t b)
      : query(a.cu_seqlens_q[b]),
        queries(a.cu_seqlens_q[b + 1] - query),
        key(a.cu_seqlens_k[b]),
        keys(a.cu_seqlens_k[b + 1] - key),
        rows(queries * (a.heads / a.key_heads)) {}

  std::int64_t blocks() const { return quotient_up(rows, kBlockRows); }
  std::int64_t parts() const { return blocks() < kMaxParts ? blocks() : kMaxParts; }
};

// How many keys query i of a sequence sees, from the first on.
std::int64_t visible(const AttentionRowsInputs& a, const Sequence& s, std::int64_t i) {
  if (a.row_position == nullptr) return s.keys;
  const std::int64_t seen = std::int64_t(a.row_position[s.query + i]) + 1;
  return seen < 0 ? 0 : seen < s.keys ? seen : s.keys;
}

// The scratch of one thread.
struct Scratch {
  float* queries;  // (kBlockRows, row)
  float* tile;     // (kWidth, row)
  float* scores;   // (kBlockRows, longest)
};

// How the memory is cut.
struct Plan {
  const std::int64_t row;  // floats of a query or a key, filled up with zeros to whole vectors
  std::int64_t longest = 0, parts = 0;

  explicit Plan(const AttentionRowsInputs& a) : row(padded(a.head_dim)) {
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const Sequence s(a, b);
      if (padded(s.keys) > longest) longest = padded(s.keys);
      if (s.parts() > parts) parts = s.parts();
    }
  }

  std::int64_t scratch() const {
    return sum_of({product_of({kBlockRows + kWidth, row}), product_of({kBlockRows, longest})});
  }
  std::int64_t sums(const AttentionRowsInputs& a) const { return product_of({parts, a.key_heads, a.tokens}); }

  Scratch scratch_of(int thread, float* memory) const {
    float* const own = memory + thread * scratch();
    return {own, own + kBlockRows * row, own + (kBlockRows + kWidth) * row};
  }
};

template <typename T>
void widen(const T* from, std::int64_t count, float* to) {
  for_each_vector(count, [&](std::int64_t i, auto load, auto) { store(to + i, load(from + i)); });
}

// The products of a query with kWidth keys, `stride` from one to the next; all have `count` elements, which
// are whole vectors.
Vec products(const float* query, const float* keys, std::int64_t stride, std::int64_t count) {
  Vec sums[kWidth] = {};
  for (std::int64_t d = 0; d < count; d += kWidth) {
    const Vec q = load(query + d);
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n) sums[n] = load(keys + n * stride + d) * q + sums[n];
  }
  float result[kWidth];
  reduce_rows<kWidth>(sums, add, result);
  return load(result);
}

// sums_j += softmax_j(scores), of `count` scores to base 2 that end in -infinity up to a whole vector.
void add_softmax(float* scores, std::int64_t count, float* sums) {
  Vec highest = broadcast(-INFINITY), total = {};
  for (std::int64_t j = 0; j < count; j += kWidth) highest = max_or_nan(highest, load(scores + j));
  const Vec top = broadcast(highest_or_nan(highest));
  for (std::int64_t j = 0; j < count; j += kWidth) {
    const Vec e = exp2_nonpositive(load(scores + j) - top);
    store(scores + j, e);
    total += e;
  }
  const Vec scale = broadcast(1 / sum(total));
  for_each_vector(count, [&](std::int64_t j, auto load, auto store) {
    store(sums + j, load(scores + j) * scale + load(sums + j));
  });
}

template <typename T>
struct Rows {
  const AttentionRowsInputs& a;
  const Plan& plan;
  const float scale = a.softmax_scale * kLog2E;

  // sums (keys,) of the probabilities of one part of the rows of key head h.
  void run(const Sequence& s, std::int64_t h, std::int64_t part, float* sums, const Scratch& scratch) const {
    for (std::int64_t j = 0; j < s.keys; ++j) sums[j] = 0;
    const std::int64_t first = s.blocks() * part / s.parts(), last = s.blocks() * (part + 1) / s.parts();
    for (std::int64_t block = first; block < last; ++block)
      add_block(s, h, block * kBlockRows, sums, scratch);
  }

 private:
  void add_block(const Sequence& s, std::int64_t h, std::int64_t first, float* sums,
                 const Scratch& scratch) const {
    const std::int64_t group = a.heads / a.key_heads;
    const std::int64_t count = s.rows - first < kBlockRows ? s.rows - first : kBlockRows;
    std::int64_t seen[kBlockRows], most = 0;
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t i = (first + r) / group, head = h * group + (first + r) % group;
      seen[r] = visible(a, s, i);
      if (seen[r] > most) most = seen[r];
      const T* const query =
          static_cast<const T*>(a.q_rows) + (s.query + i) * a.q_strides[0] + head * a.q_strides[1];
      float* const to = scratch.queries + r * plan.row;
      widen(query, a.head_dim, to);
      for (std::int64_t d = a.head_dim; d < plan.row; ++d) to[d] = 0;
    }
    const T* const keys = static_cast<const T*>(a.k) + s.key * a.k_strides[0] + h * a.k_strides[1];
    for (std::int64_t j = 0; j < most; j += kWidth) {
      std::int64_t stride = a.k_strides[0];
      const float* const tile = load_tile(keys + j * stride, most - j, scratch.tile, &stride);
      for (std::int64_t r = 0; r < count; ++r) {
        if (j >= seen[r]) continue;
        store(scratch.scores + r * plan.longest + j,
              products(scratch.queries + r * plan.row, tile, stride, plan.row) * broadcast(scale));
      }
    }
    for (std::int64_t r = 0; r < count; ++r) {
      float* const scores = scratch.scores + r * plan.longest;
      for (std::int64_t j = seen[r]; j < padded(seen[r]); ++j) scores[j] = -INFINITY;
      if (seen[r] > 0) add_softmax(scores, seen[r], sums);
    }
  }

  // kWidth keys as rows of plan.row floats, `*stride` apart: where they are, or a copy. Of keys past `left`
  // there are zeros.
  const float* load_tile(const T* keys, std::int64_t left, float* tile, std::int64_t* stride) const {
    if constexpr (std::is_same_v<T, float>) {
      if (left >= kWidth && plan.row == a.head_dim) return keys;
    }
    for (std::int64_t n = 0; n < kWidth; ++n) {
      const std::int64_t count = n < left ? a.head_dim : 0;
      float* const to = tile + n * plan.row;
      if (count > 0) widen(keys + n * *stride, count, to);
      for (std::int64_t d = count; d < plan.row; ++d) to[d] = 0;
    }
    *stride = plan.row;
    return tile;
  }
};

// The mean over heads and rows, from the sums of the parts.
void finish(const AttentionRowsInputs& a, const Sequence& s, const float* sums, float* attention) {
  std::int64_t rows = 0;
  for (std::int64_t i = 0; i < s.queries; ++i) rows += visible(a, s, i) > 0;
  for (std::int64_t j = 0; j < s.keys; ++j) attention[s.key + j] = 0;
  if (rows == 0) return;
  for (std::int64_t task = 0; task < s.parts() * a.key_heads; ++task) {
    const float* const own = sums + task * a.tokens + s.key;
    for (std::int64_t j = 0; j < s.keys; ++j) attention[s.key + j] += own[j];
  }
  const float scale = float(1.0 / (double(rows) * double(a.heads)));
  for (std::int64_t j = 0; j < s.keys; ++j) attention[s.key + j] *= scale;
}

std::int64_t floats_of(const AttentionRowsInputs& a, const Plan& plan, int threads) {
  return sum_of({product_of({threads, plan.scratch()}), plan.sums(a)});
}

}  // namespace

Status attention_rows_workspace(const AttentionRowsInputs& a, int threads, std::int64_t* bytes) {
  const std::int64_t size = product_of({floats_of(a, Plan(a), threads), sizeof(float)});
  if (size >= kTooLarge) return Status::invalid_argument;
  *bytes = size;
  return Status::ok;
}

Status attention_rows(const AttentionRowsInputs& a, float* attention, void* workspace, int threads) {
  const Plan plan(a);
  if (product_of({floats_of(a, plan, threads), sizeof(float)}) >= kTooLarge) return Status::invalid_argument;
  float* const sums = static_cast<float*>(workspace);
  float* const scratch = sums + plan.sums(a);
  with_type(a.dtype, [&](auto element) {
    const Rows<decltype(element)> rows{a, plan};
    for_each_task(a.batch * a.key_heads * plan.parts, threads, [&](std::int64_t task, int thread) {
      const std::int64_t part = task % plan.parts, h = task / plan.parts % a.key_heads;
      const Sequence s(a, task / plan.parts / a.key_heads);
      if (part < s.parts())
        rows.run(s, h, part, sums + (part * a.key_heads + h) * a.tokens + s.key,
                 plan.scratch_of(thread, scratch));
    });
  });
  for_each_task(a.batch, a.batch > 1 ? threads : 1,
                [&](std::int64_t b, int) { finish(a, Sequence(a, b), sums, attention); });
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
