// SPDX-License-Identifier: Apache-2.0
// The backward of attention. Per key head, the queries of a sequence go through, head by head, in chunks of a
// few blocks (attention_backward_block.h): a chunk's probabilities and gradients of scores stay in cache
// until its keys and values have taken their part. With statistics, a pass over all heads finds first, for a
// slab of query rows, which head reaches the maximum of each pair; slabs bound the memory that takes. Every
// sum runs in an order that depends on the sequence alone.

#include "cpu/kernels/attention_backward.h"

#include <cmath>

#include "cpu/kernels/attention_backward_block.h"
#include "cpu/kernels/dtype.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr std::int64_t kBlocksPerChunk = 42 / kMaxBlockRows;
constexpr std::int64_t kChunkRows = kBlocksPerChunk * kMaxBlockRows;
constexpr std::int64_t kChunksPerSlab = 14;
constexpr std::int64_t kSlabRows = kChunksPerSlab * kChunkRows;  // 588
constexpr float kTiny = 1.17549435e-38f;

std::int64_t slabs_of(const Sequence& s) {
  return (Blocks(s.queries).chunks(kBlocksPerChunk) + kChunksPerSlab - 1) / kChunksPerSlab;
}

// What the statistics send back, prepared for every row of the batch.
struct StatisticGradients {
  std::int64_t stride;     // of through_summary: rows, and what a vector may read past them
  float* grad_maximum;     // (stride,) gradient of the head-maximum of column j
  float* through_summary;  // (heads, stride) gradient of P[h, s, j]
  float* norm_gain;        // (rows, heads) gradient of the norm of out over that norm
};

// Scratch of one thread.
struct Workspace {
  float* keys;            // panels [panel][head_dim][kPanel] of one head, of the keys that are seen
  float* values;          // likewise
  float* key_rows;        // panels [panel of head_dim][key][kPanel]
  float* queries;         // (kMaxBlockRows, kBlockStride), scaled
  float* grad_out;        // (kMaxBlockRows, kBlockStride)
  float* chunk_queries;   // panels [panel of head_dim][row of the chunk][kPanel]
  float* chunk_grad_out;  // likewise
  float* probabilities;   // panels of every block of the chunk
  float* grad_scores;     // likewise
  float* derivatives;     // panels of one block
  float* grad_queries;    // (kMaxBlockRows, kBlockStride)
  float* maxima;          // panels of every block of a slab
};

template <typename T>
class AttentionBackward {
 public:
  AttentionBackward(const AttentionInputs& inputs, const AttentionGradients& gradients, bool statistics,
                    const StatisticGradients& prepared)
      : a_(inputs), g_(gradients), statistics_(statistics), prepared_(prepared) {}

  // Rows [begin, end) of a sequence: from the gradients of the two statistics to those of what they are made
  // of.
  void prepare(const Sequence& s, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t j = begin; j < end; ++j) {
      const std::int64_t row = s.query + j;
      prepared_.grad_maximum[row] = g_.grad_received_attention[row] / observers(a_, s, j);
      const bool seen = s.summary_row >= 0 && (a_.window_right < 0 || j - s.summary_row <= a_.window_right) &&
                        (a_.window_left < 0 || s.summary_row - j <= a_.window_left);
      float* const gain = prepared_.norm_gain + row * a_.heads;
      float* const through = prepared_.through_summary + row;
      float norm_sum = 0, mean = 0;
      for (std::int64_t h = 0; h < a_.heads; ++h) {
        const T* const out = static_cast<const T*>(g_.out) + (row * a_.heads + h) * a_.head_dim;
        gain[h] = std::sqrt(dot(out, out));
        norm_sum += gain[h];
        through[h * prepared_.stride] = seen ? g_.grad_summary_attention[row] * from_summary(s, h, j) : 0;
      }
      norm_sum = norm_sum > kTiny ? norm_sum : kTiny;
      for (std::int64_t h = 0; h < a_.heads; ++h) mean += through[h * prepared_.stride] * gain[h] / norm_sum;
      for (std::int64_t h = 0; h < a_.heads; ++h) {
        const float norm = gain[h];
        // An output of zeros has no direction to grow in: no gradient, where 0 times infinity would be NaN.
        gain[h] =
            norm == 0 ? 0 : (through[h * prepared_.stride] - mean) / norm_sum / (norm > kTiny ? norm : kTiny);
        through[h * prepared_.stride] = seen ? g_.grad_summary_attention[row] * norm / norm_sum : 0;
      }
    }
  }

  // Chunks [first, last): the head that reaches the maximum of each pair, panels block by block.
  void find_best(const Sequence& s, std::int64_t first, std::int64_t last, std::int32_t* best,
                 const Workspace& w) const {
    const Range r(s, a_, first, last);
    for (std::int64_t h = 0; h < a_.heads; ++h) {
      if (h % group() == 0)
        pack_keys<Floats>(head_row<T>(a_.k, a_.k_strides, s.key + r.first_key, h / group()), a_.k_strides[0],
                          r.seen, a_.head_dim, w.keys);
      for (std::int64_t block = r.begin; block < r.end; ++block) {
        const std::int64_t i = r.blocks.begin(block), rows = r.blocks.begin(block + 1) - i;
        const std::int64_t at = (i - r.first_row) * padded(s.keys);
        GradientBlock task = block_of(s, r, h, i, rows, w);
        load_queries<Floats, T>(a_, s.query + i, rows, h, w.queries);
        gradient_functions(rows, true).recompute(task);
        const std::int64_t count = task.visible.panels() * rows * kPanel;
        const IntVec head = IntVec{} + std::int32_t(h);
        for (std::int64_t v = 0; v < count; v += kWidth) {
          const Vec probability = load(w.probabilities + v);
          if (h == 0) {
            store(w.maxima + at + v, probability);
            store(best + at + v, head);
          } else {
            const Vec highest = load(w.maxima + at + v);
            const IntVec better = probability > highest;
            store(w.maxima + at + v, select(better, probability, highest));
            store(best + at + v, better ? head : load_ints(best + at + v));
          }
        }
      }
    }
  }

  // Chunks [first, last) of the query heads that read one key head: their gradients of the queries, and what
  // they add to those of the keys and values, panels [panel of head_dim][key][kPanel].
  void differentiate(const Sequence& s, std::int64_t key_head, std::int64_t first, std::int64_t last,
                     const std::int32_t* best, float* grad_keys, float* grad_values,
                     const Workspace& w) const {
    const Range r(s, a_, first, last);
    const std::int64_t dim = a_.head_dim, key = s.key + r.first_key;
    const T* const k = head_row<T>(a_.k, a_.k_strides, key, key_head);
    pack_keys<Floats>(k, a_.k_strides[0], r.seen, dim, w.keys);
    pack_keys<Floats>(head_row<T>(a_.v, a_.v_strides, key, key_head), a_.v_strides[0], r.seen, dim, w.values);
    pack_values<Floats>(k, a_.k_strides[0], r.seen, dim, w.key_rows);
    for (std::int64_t h = key_head * group(); h < (key_head + 1) * group(); ++h)
      differentiate_head(s, r, h, first, last, best, grad_keys, grad_values, w);
  }

  // Panels [panel of head_dim][key][kPanel] of one head -> its rows of a gradient.
  void store_rows(const Sequence& s, std::int64_t h, const float* panels, void* grad) const {
    const std::int64_t row = a_.key_heads * a_.head_dim;
    T* const to = static_cast<T*>(grad) + s.key * row + h * a_.head_dim;
    for (std::int64_t j = 0; j < s.keys; ++j)
      for (std::int64_t d = 0; d < a_.head_dim; d += kWidth)
        store_head(to + j * row + d, load(panels + (d / kPanel * padded(s.keys) + j) * kPanel + d % kPanel),
                   a_.head_dim - d);
  }

  // The gradient of queries that see no key.
  void clear_blind(const Sequence& s) const {
    const std::int64_t row = a_.heads * a_.head_dim;
    __builtin_memset(static_cast<void*>(static_cast<T*>(g_.grad_q) + (s.query - s.blind) * row), 0,
                     std::size_t(s.blind * row) * sizeof(T));
  }

 private:
  // The blocks of some chunks, and the keys that they see.
  struct Range {
    Blocks blocks;
    std::int64_t begin, end, first_row;
    std::int64_t first_key, seen;
    Range(const Sequence& s, const AttentionInputs& a, std::int64_t first, std::int64_t last)
        : blocks(s.queries),
          begin(first * kBlocksPerChunk),
          end(last * kBlocksPerChunk < blocks.number ? last * kBlocksPerChunk : blocks.number),
          first_row(blocks.begin(begin)) {
      const Visible visible(a, s, first_row, blocks.begin(end) - first_row);
      first_key = visible.first;
      seen = visible.count;
    }
  };

  // Query heads that read the same key head.
  std::int64_t group() const { return a_.heads / a_.key_heads; }

  void differentiate_head(const Sequence& s, const Range& r, std::int64_t h, std::int64_t first,
                          std::int64_t last, const std::int32_t* best, float* grad_keys, float* grad_values,
                          const Workspace& w) const {
    const std::int64_t dim = a_.head_dim, capacity = padded(s.keys);
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      std::int64_t row_counts[kBlocksPerChunk], first_panels[kBlocksPerChunk], panels[kBlocksPerChunk],
          offsets[kBlocksPerChunk];
      GradientChunk sums{0, row_counts, first_panels, panels, offsets};
      const std::int64_t begin = chunk * kBlocksPerChunk;
      const std::int64_t chunk_row = r.blocks.begin(begin);
      std::int64_t first_key = 0, end_key = 0;
      for (std::int64_t block = begin; block < begin + kBlocksPerChunk && block < r.end; ++block) {
        const std::int64_t i = r.blocks.begin(block), rows = r.blocks.begin(block + 1) - i;
        GradientBlock task = block_of(s, r, h, i, rows, w);
        const std::int64_t at = (i - chunk_row) * capacity;
        task.probabilities += at;
        task.grad_scores += at;
        if (statistics_) task.best = best + (i - r.first_row) * capacity;
        T* const grad_q = static_cast<T*>(g_.grad_q) + ((s.query + i) * a_.heads + h) * dim;
        const bool direct = sizeof(T) == sizeof(float) && (kWidth <= kHeadStep || dim % kWidth == 0);
        if (direct) task.grad_queries = reinterpret_cast<float*>(grad_q), task.grad_stride = a_.heads * dim;
        load_queries<Floats, T>(a_, s.query + i, rows, h, w.queries);
        load_grad_out(s, h, i, rows, w);
        gradient_functions(rows, statistics_).differentiate(task);
        if (!direct)
          for (std::int64_t q = 0; q < rows; ++q)
            for (std::int64_t d = 0; d < dim; d += kWidth)
              store_head(grad_q + q * a_.heads * dim + d, load(w.grad_queries + q * kBlockStride + d),
                         dim - d);
        to_chunk(w.queries, rows, i - chunk_row, 1 / kLog2E, w.chunk_queries);
        to_chunk(w.grad_out, rows, i - chunk_row, 1, w.chunk_grad_out);
        if (sums.blocks == 0) first_key = task.visible.first;
        end_key = task.visible.first + task.visible.count;
        row_counts[sums.blocks] = rows;
        first_panels[sums.blocks] = task.visible.first / kPanel;
        panels[sums.blocks] = task.visible.panels();
        offsets[sums.blocks++] = at;
      }
      add(sums, first_key, end_key, capacity, w.probabilities, w.chunk_grad_out, grad_values);
      add(sums, first_key, end_key, capacity, w.grad_scores, w.chunk_queries, grad_keys);
    }
  }

  float dot(const T* x, const T* y) const {
    Vec total = {};
    for (std::int64_t d = 0; d < a_.head_dim; d += kWidth)
      total = load_head(x + d, a_.head_dim - d) * load_head(y + d, a_.head_dim - d) + total;
    return sum(total);
  }

  // P[h, s, j] of the summary row s, which sees j.
  float from_summary(const Sequence& s, std::int64_t h, std::int64_t j) const {
    const std::int64_t query = s.query + s.summary_row;
    const float product = dot(head_row<T>(a_.q, a_.q_strides, query, h),
                              head_row<T>(a_.k, a_.k_strides, s.key + j, h / group()));
    const float lse = g_.lse[h * a_.tokens_q + query];
    const Bias bias(a_, s, h, Visible(a_, s, s.summary_row, 1));
    if (!bias) return exp2_nonpositive(broadcast((product * a_.softmax_scale - lse) * kLog2E))[0];
    const std::int64_t distance = s.summary_row > j ? s.summary_row - j : j - s.summary_row;
    Vec derivative{};
    const Vec score =
        bias.apply(broadcast(product * score_scale(a_)), broadcast(float(distance)), derivative);
    return exp2_nonpositive(score - lse * kLog2E)[0];
  }

  GradientBlock block_of(const Sequence& s, const Range& r, std::int64_t h, std::int64_t i, std::int64_t rows,
                         const Workspace& w) const {
    GradientBlock block{};
    block.visible = Visible(a_, s, i, rows);
    block.bias = Bias(a_, s, h, block.visible);
    const std::int64_t skipped = block.visible.first - r.first_key;
    block.queries = w.queries;
    block.grad_out = w.grad_out;
    block.keys = w.keys + skipped * a_.head_dim;
    block.values = w.values + skipped * a_.head_dim;
    block.key_rows = w.key_rows + skipped * kPanel;
    block.key_capacity = r.seen;
    block.head_dim = a_.head_dim;
    block.derivatives = a_.softcap > 0 ? w.derivatives : nullptr;
    block.lse = g_.lse + h * a_.tokens_q + s.query + i;
    block.probabilities = w.probabilities;
    block.grad_scores = w.grad_scores;
    block.grad_queries = w.grad_queries;
    block.grad_stride = kBlockStride;
    block.grad_scale = a_.softmax_scale;
    if (statistics_) {
      block.head = std::int32_t(h);
      const std::int64_t first = s.query + block.visible.first;  // self-attention: queries are keys
      block.grad_maximum = prepared_.grad_maximum + first;
      block.through_summary = prepared_.through_summary + h * prepared_.stride + first;
      block.summary_row = s.summary_row < 0 ? -1 : s.summary_row - i;
    }
    return block;
  }

  // The gradient of the output, and what reaches the output through its norm.
  void load_grad_out(const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t rows,
                     const Workspace& w) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = ((s.query + i + r) * a_.heads + h) * a_.head_dim;
      const T* const grad = static_cast<const T*>(g_.grad_out) + at;
      float* const to = w.grad_out + r * kBlockStride;
      for (std::int64_t d = 0; d < a_.head_dim; d += kWidth) {
        const std::int64_t left = a_.head_dim - d;
        Vec x = load_head(grad + d, left);
        if (statistics_)
          x += broadcast(prepared_.norm_gain[(s.query + i + r) * a_.heads + h]) *
               load_head(static_cast<const T*>(g_.out) + at + d, left);
        store(to + d, x);
      }
    }
  }

  // rows (count, kBlockStride) -> rows [first, first + count) of panels [panel of
  // head_dim][kChunkRows][kPanel].
  void to_chunk(const float* rows, std::int64_t count, std::int64_t first, float scale, float* panels) const {
    for (std::int64_t d = 0; d < a_.head_dim; d += kWidth)
      for (std::int64_t r = 0; r < count; ++r)
        store(panels + (d / kPanel * kChunkRows + first + r) * kPanel + d % kPanel,
              load(rows + r * kBlockStride + d) * scale);
  }

  void add(const GradientChunk& chunk, std::int64_t first_key, std::int64_t end_key, std::int64_t capacity,
           const float* left, const float* right, float* to) const {
    for (std::int64_t d = 0; d < a_.head_dim; d += kPanel) {
      const std::int64_t panel = d / kPanel;
      const bool two = a_.head_dim - d > kWidth, apart = group() > 1;
      const auto run = apart ? two ? &add_products<2, true> : &add_products<1, true>
                       : two ? &add_products<2, false>
                             : &add_products<1, false>;
      run(chunk, first_key, end_key, left, right + panel * kChunkRows * kPanel,
          to + panel * capacity * kPanel);
    }
  }

  const AttentionInputs& a_;
  const AttentionGradients& g_;
  const bool statistics_;
  const StatisticGradients prepared_;
};

// What all threads share.
struct Results {
  StatisticGradients statistics;
  float* grads;        // slots of two accumulators: gradients of keys and of values in the making
  std::int32_t* best;  // the head that reaches the maximum, for a slab of each sequence of the wave
};

// How the work is cut, and the memory for it.
struct Plan {
  const AttentionInputs& a;
  const bool statistics;
  const int threads;
  std::int64_t longest_key = 0, max_slabs = 1, slab_rows = 0;
  std::int64_t wave = 1;   // sequences at a time
  std::int64_t parts = 1;  // of a slab, when its heads have to be looked at together

  Plan(const AttentionInputs& inputs, bool with_statistics, int thread_count)
      : a(inputs), statistics(with_statistics), threads(thread_count) {
    std::int64_t longest_query = 0;
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const Sequence s(a, b);
      if (s.keys > longest_key) longest_key = s.keys;
      if (s.queries > longest_query) longest_query = s.queries;
      if (slabs_of(s) > max_slabs) max_slabs = slabs_of(s);
    }
    wave = a.batch;
    if (statistics && wave > 2 * std::int64_t{threads}) wave = 2 * std::int64_t{threads};
    if (wave < 1) wave = 1;
    parts = (threads + wave - 1) / wave;
    if (parts > kChunksPerSlab) parts = kChunksPerSlab;
    slab_rows = longest_query < kSlabRows ? longest_query : kSlabRows;
  }

  std::int64_t best_size() const { return statistics ? slab_rows * padded(longest_key) : 0; }
  std::int64_t grad_size() const { return padded(longest_key) * padded(a.head_dim); }

  Results results(Arena& arena) const {
    StatisticGradients prepared{};
    if (statistics) {
      const std::int64_t stride = a.tokens_q + kPanel;
      prepared = {stride, arena.take({stride}), arena.take({a.heads, stride}),
                  arena.take({a.tokens_q, a.heads})};
    }
    // A slot for the head that a thread is at, or for every head of the wave when they wait for another slab.
    const std::int64_t slots = max_slabs == 1 ? threads : wave * a.key_heads;
    float* const grads = arena.take({slots, 2, grad_size()});
    return {prepared, grads, reinterpret_cast<std::int32_t*>(arena.take({wave, best_size()}))};
  }

  // The scratch of one thread.
  Workspace workspace(Arena& arena) const {
    const std::int64_t keys = padded(longest_key), dim = padded(a.head_dim);
    return {arena.take({keys, dim}),
            arena.take({keys, dim}),
            arena.take({keys, dim}),
            arena.take({kMaxBlockRows, kBlockStride}),
            arena.take({kMaxBlockRows, kBlockStride}),
            arena.take({kChunkRows, dim}),
            arena.take({kChunkRows, dim}),
            arena.take({kChunkRows, keys}),
            arena.take({kChunkRows, keys}),
            arena.take({a.softcap > 0 ? kMaxBlockRows : 0, keys}),
            arena.take({kMaxBlockRows, kBlockStride}),
            arena.take({best_size()})};
  }
};

// Query rows that are looked at together: slab `number` of each of the `sequences` from `first_sequence` on.
struct Slab {
  std::int64_t first_sequence, sequences, number;

  std::int64_t first_chunk() const { return number * kChunksPerSlab; }
  // One past the last chunk of sequence s in this slab; first_chunk() or less where s has none.
  std::int64_t end_chunk(const Sequence& s) const {
    const std::int64_t chunks = Blocks(s.queries).chunks(kBlocksPerChunk);
    return chunks < first_chunk() + kChunksPerSlab ? chunks : first_chunk() + kChunksPerSlab;
  }
};

// The steps of the backward as one thread sees them. All threads of a team call each step together: it shares
// its tasks out over them, and returns to all when the last one is done.
template <typename T>
struct ThreadSteps {
  const AttentionBackward<T>& backward;
  const AttentionInputs& a;
  const AttentionGradients& g;
  const Plan& plan;
  const Results& results;
  const Workspace workspace;

  void run() const {
    if (plan.statistics) prepare();
    for (std::int64_t first = 0; first < a.batch; first += plan.wave) {
      const std::int64_t sequences = a.batch - first < plan.wave ? a.batch - first : plan.wave;
      for (std::int64_t number = 0; number < plan.max_slabs; ++number) {
        const Slab slab{first, sequences, number};
        if (plan.statistics) find_best(slab);
        differentiate(slab);
      }
    }
  }

 private:
  // One task for each part of each sequence.
  void prepare() const {
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < a.batch * plan.parts; ++task) {
      const Sequence s(a, task / plan.parts);
      const std::int64_t part = task % plan.parts;
      backward.prepare(s, s.queries * part / plan.parts, s.queries * (part + 1) / plan.parts);
    }
  }

  // One task for each part of the slab of each sequence.
  void find_best(const Slab& slab) const {
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < slab.sequences * plan.parts; ++task) {
      const std::int64_t index = task / plan.parts, part = task % plan.parts;
      const Sequence s(a, slab.first_sequence + index);
      const std::int64_t begin = slab.first_chunk(), chunks = slab.end_chunk(s) - begin;
      const std::int64_t first = begin + chunks * part / plan.parts;
      const std::int64_t last = begin + chunks * (part + 1) / plan.parts;
      if (first >= last) continue;
      const Blocks blocks(s.queries);
      const std::int64_t rows = blocks.begin(first * kBlocksPerChunk) - blocks.begin(begin * kBlocksPerChunk);
      backward.find_best(s, first, last, results.best + index * plan.best_size() + rows * padded(s.keys),
                         workspace);
    }
  }

  // One task for each key head of each sequence.
  void differentiate(const Slab& slab) const {
    const std::int64_t heads = a.key_heads;
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < slab.sequences * heads; ++task)
      differentiate_head(slab, task / heads, task % heads, plan.max_slabs == 1 ? thread_number() : task);
  }

  // Key head h of the sequence `index` places into the slab, whose gradients of keys and values add up in
  // `slot`.
  void differentiate_head(const Slab& slab, std::int64_t index, std::int64_t h, std::int64_t slot) const {
    const Sequence s(a, slab.first_sequence + index);
    const std::int64_t slabs = slabs_of(s), last_slab = slabs > 0 ? slabs - 1 : 0;
    if (slab.number > last_slab) return;
    float* const grad_keys = results.grads + slot * 2 * plan.grad_size();
    float* const grad_values = grad_keys + plan.grad_size();
    if (slab.number == 0) {
      if (h == 0 && s.blind > 0) backward.clear_blind(s);
      const std::int64_t size = padded(s.keys) * padded(a.head_dim);
      for (std::int64_t i = 0; i < size; i += kWidth)
        store(grad_keys + i, Vec{}), store(grad_values + i, Vec{});
    }
    if (slab.first_chunk() < slab.end_chunk(s))
      backward.differentiate(s, h, slab.first_chunk(), slab.end_chunk(s),
                             results.best + index * plan.best_size(), grad_keys, grad_values, workspace);
    if (slab.number == last_slab) {
      backward.store_rows(s, h, grad_keys, g.grad_k);
      backward.store_rows(s, h, grad_values, g.grad_v);
    }
  }
};

}  // namespace

Status varlen_attention_backward_workspace(const AttentionInputs& a, bool statistics, int threads,
                                           std::int64_t* bytes) {
  return workspace_bytes(Plan(a, statistics, threads), bytes);
}

Status varlen_attention_backward(const AttentionInputs& a, const AttentionGradients& g, void* memory,
                                 int threads) {
  const bool statistics = g.grad_summary_attention != nullptr;
  const Plan plan(a, statistics, threads);
  if (bytes_of(plan) == kTooLarge) return Status::invalid_argument;
  Arena arena(static_cast<float*>(memory));
  const Results results = plan.results(arena);
  float* const own = arena.next();

  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    const AttentionBackward<T> backward(a, g, statistics, results.statistics);
#pragma omp parallel num_threads(threads) if (threads > 1)
    ThreadSteps<T>{backward, a, g, plan, results, workspace_of_thread(plan, own)}.run();
  });
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
