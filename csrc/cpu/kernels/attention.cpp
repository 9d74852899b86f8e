// SPDX-License-Identifier: Apache-2.0
// Attention with statistics in one pass. A task is a run of query rows of one sequence: for each key head it
// packs the keys and values that those rows see into panels, then runs row blocks (attention_block.h) of all
// query heads that read it, whose head-maximum stays in cache; at the end it sums the columns of that
// maximum, chunk by chunk. Chunks depend on the sequence alone and are added in order, so neither threads nor
// the rest of the batch change a bit.

#include "cpu/kernels/attention.h"

#include <cstring>

#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/dtype.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr std::int64_t kMostChunks = 64;     // of a sequence: each has sums of all its columns in memory
constexpr std::int64_t kTaskRows = 600;      // more is packed less often, but the maxima leave L2
constexpr std::int64_t kLeastTaskRows = 28;  // less takes longer to pack and to hand out than to compute
constexpr std::int64_t kTasksOfThread = 4;   // with so many, no thread waits long for the last one

// The blocks of a sequence's queries in chunks of as few as kMostChunks allow, so that they spread evenly
// over threads.
struct Chunks {
  Blocks blocks;
  std::int64_t size;    // in blocks
  std::int64_t number;  // of them

  explicit Chunks(std::int64_t rows)
      : blocks(rows),
        size(blocks.number > kMostChunks ? blocks.chunks(kMostChunks) : 1),
        number(blocks.chunks(size)) {}
  std::int64_t first_block(std::int64_t chunk) const {
    return chunk * size < blocks.number ? chunk * size : blocks.number;
  }
};

// What tasks leave for the end: floats per query row of the batch.
struct Results {
  float* norms;         // (tokens_q, heads) of the outputs
  float* from_summary;  // (tokens_q, heads): P[h, s, j] of key j
  float* column_sums;   // (chunks, padded keys) of every sequence, one after another
  float* offsets;       // (batch,) std::int64_t: where those of a sequence begin

  float* column_sums_of(std::int64_t b) const {
    std::int64_t offset;
    std::memcpy(&offset, offsets + 2 * b, sizeof offset);  // a workspace may be at any address
    return column_sums + offset;
  }
};

// Scratch of one thread.
struct Workspace {
  float* keys;    // panels of one head
  float* values;  // panels of one head
  float* scores;  // panels of one block
  float* pairs;   // the same, rounded to cells of bfloat16
  float* maxima;  // panels of every block of a task
  float* queries;
  float* out;
};

template <typename T>
class Attention {
 public:
  using Operand = typename OperandOf<T>::Type;

  Attention(const AttentionInputs& inputs, void* out, float* lse, bool statistics, const Results& results)
      : a_(inputs), out_(static_cast<T*>(out)), lse_(lse), statistics_(statistics), results_(results) {}

  // Chunks [first, last) of a sequence whose column sums go to column_sums (chunks, padded keys).
  void run(const Sequence& s, std::int64_t first, std::int64_t last, float* column_sums,
           const Workspace& w) const {
    const Chunks chunks(s.queries);
    const Blocks& blocks = chunks.blocks;
    const std::int64_t begin = chunks.first_block(first), end = chunks.first_block(last);
    const std::int64_t first_row = blocks.begin(begin),
                       group = a_.key_heads > 0 ? a_.heads / a_.key_heads : 0;
    const Packed packed(a_, s, first_row, blocks.begin(end) - first_row);
    const std::int64_t first_key = s.key + packed.first, count = packed.count;
    for (std::int64_t key_head = 0; key_head < a_.key_heads; ++key_head) {
      pack_keys<Operand>(head_row<T>(a_.k, a_.k_strides, first_key, key_head), a_.k_strides[0], count,
                         a_.head_dim, w.keys);
      pack_values<Operand>(head_row<T>(a_.v, a_.v_strides, first_key, key_head), a_.v_strides[0], count,
                           a_.head_dim, w.values);
      std::int64_t step = 0;
      const std::int64_t steps = (end - begin) * group;
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t i = blocks.begin(block), rows = blocks.begin(block + 1) - i;
        for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h, ++step) {
          QueryBlock task;
          if (h + 1 < (key_head + 1) * group)
            task.next_queries = upcoming(a_.q, a_.q_strides, s.query + i, h + 1, rows);
          else
            task.next_queries = upcoming(a_.q, a_.q_strides, s.query + i + rows, key_head * group,
                                         block + 1 < end ? rows : 0);
          if (key_head + 1 < a_.key_heads) {  // each block fetches its share of the next head
            const std::int64_t from = count * step / steps, share = count * (step + 1) / steps - from;
            task.next_keys = upcoming(a_.k, a_.k_strides, first_key + from, key_head + 1, share);
            task.next_values = upcoming(a_.v, a_.v_strides, first_key + from, key_head + 1, share);
          }
          attend_block(s, h, i, rows, packed, w.maxima + (i - first_row) * padded(s.keys), w, task);
        }
      }
    }
    if (!statistics_) return;
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      float* const sums = column_sums + chunk * padded(s.keys);
      for (std::int64_t j = 0; j < padded(s.keys); ++j) sums[j] = 0;
      for (std::int64_t block = chunks.first_block(chunk); block < chunks.first_block(chunk + 1); ++block) {
        const std::int64_t i = blocks.begin(block), rows = blocks.begin(block + 1) - i;
        const Visible visible(a_, s, i, rows);
        add_columns(w.maxima + (i - first_row) * padded(s.keys), rows, s.summary_row - i,
                    padded(visible.count), sums + visible.first);
      }
    }
  }

  // The results of queries that see no key.
  void clear_blind(const Sequence& s) const {
    const std::int64_t first = s.query - s.blind, row = a_.heads * a_.head_dim;
    __builtin_memset(static_cast<void*>(out_ + first * row), 0, std::size_t(s.blind * row) * sizeof(T));
    for (std::int64_t h = 0; lse_ != nullptr && h < a_.heads; ++h)
      for (std::int64_t i = first; i < s.query; ++i) lse_[h * a_.tokens_q + i] = -INFINITY;
  }

 private:
  // The keys that a task packs: those that its rows see, and whole cells of them, so that what these hold
  // does not depend on the task.
  struct Packed {
    std::int64_t first, count;
    Packed(const AttentionInputs& a, const Sequence& s, std::int64_t i, std::int64_t rows) {
      const Visible visible(a, s, i, rows);
      first = visible.first;
      count = cells_across<Operand>(visible.count) * Operand::kTerms;
      if (count > s.keys - first) count = s.keys - first;
    }
  };

  Upcoming upcoming(const void* base, const std::int64_t (&strides)[2], std::int64_t first, std::int64_t head,
                    std::int64_t rows) const {
    const std::int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(head_row<T>(base, strides, first, head)), strides[0] * size, rows,
            a_.head_dim * size};
  }

  void attend_block(const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t rows,
                    const Packed& packed, float* maxima, const Workspace& w, QueryBlock& block) const {
    const std::int64_t dim = a_.head_dim;
    const Visible visible(a_, s, i, rows);
    const std::int64_t skipped = visible.first - packed.first;
    load_queries<Operand, T>(a_, s.query + i, rows, h, w.queries);
    T* const out = out_ + ((s.query + i) * a_.heads + h) * dim;
    const bool direct = sizeof(T) == sizeof(float) && (kWidth <= kHeadStep || dim % kWidth == 0);
    float norms[kRowLanes], inverse[kRowLanes];
    block.queries = w.queries;
    block.keys = w.keys + skipped / Operand::kTerms * dim;
    block.values = w.values + skipped / Operand::kTerms * kPanel;
    block.value_rows = cells_across<Operand>(packed.count);
    block.head_dim = dim;
    block.visible = visible;
    block.bias = Bias(a_, s, h, visible);
    block.plain_begin = visible.first_key(rows - 1);
    block.plain_end = block.bias ? 0 : visible.end_key(0);
    block.scores = w.scores;
    block.out = direct ? reinterpret_cast<float*>(out) : w.out;
    block.out_stride = direct ? a_.heads * dim : padded(dim);
    block.maxima = statistics_ ? maxima : nullptr;
    block.first_head = h == 0;
    block.norms = norms;
    block.inverse = inverse;
    block.pairs = w.pairs;
    block.scale = score_scale(a_);
    block.lse = lse_ == nullptr ? nullptr : lse_ + h * a_.tokens_q + s.query + i;
    attend_function<Operand>(rows, statistics_)(block);
    if (!direct)
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t d = 0; d < dim; d += kWidth)
          store_head(out + r * a_.heads * dim + d, load(w.out + r * padded(dim) + d), dim - d);
    if (!statistics_) return;
    for (std::int64_t r = 0; r < rows; ++r) results_.norms[(s.query + i + r) * a_.heads + h] = norms[r];
    if (const std::int64_t r = s.summary_row - i; r >= 0 && r < rows)
      for (std::int64_t key = 0; key < s.keys; ++key) {
        const std::int64_t j = key - visible.first;
        const bool seen = j >= 0 && j < visible.count;
        results_.from_summary[(s.query + key) * a_.heads + h] =
            seen ? w.scores[(j / kPanel * rows + r) * kPanel + j % kPanel] * inverse[r] : 0;
      }
  }

  // sums[j] += maxima of rows 0 to `rows` but `skipped`, column j.
  static void add_columns(const float* maxima, std::int64_t rows, std::int64_t skipped, std::int64_t keys,
                          float* sums) {
    for (std::int64_t j = 0; j < keys; j += kWidth) {
      const float* const column = maxima + j / kPanel * kPanel * rows + j % kPanel;
      Vec total = load(sums + j);
      for (std::int64_t r = 0; r < rows; ++r)
        if (r != skipped) total += load(column + r * kPanel);
      store(sums + j, total);
    }
  }

  const AttentionInputs& a_;
  T* const out_;
  float* const lse_;
  const bool statistics_;
  const Results results_;
};

// From what the tasks left to the two numbers of each token of a sequence.
void finish(const AttentionInputs& a, const Sequence& s, const Results& results, const float* column_sums,
            float* summary_attention, float* received_attention) {
  const std::int64_t chunks = Chunks(s.queries).number;
  float observed[kWidth];  // what a vector of tokens receives
  for (std::int64_t j = 0; j < s.queries; ++j) {
    if (j % kWidth == 0) {
      Vec total{};
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
        total += load(column_sums + chunk * padded(s.keys) + j);
      store(observed, total);
    }
    received_attention[s.query + j] = observed[j % kWidth] / observers(a, s, j);

    const float* const norms = results.norms + (s.query + j) * a.heads;
    const float* const weights = results.from_summary + (s.query + j) * a.heads;
    float norm_sum = 0, weighted = 0;
    for (std::int64_t h = 0; h < a.heads; ++h) norm_sum += norms[h], weighted += norms[h] * weights[h];
    summary_attention[s.query + j] = s.summary_row < 0 || norm_sum == 0 ? 0 : weighted / norm_sum;
  }
}

// How the work is cut, and the memory for it.
struct Plan {
  const AttentionInputs& a;
  const bool statistics;
  int threads;
  std::int64_t terms = 1;  // elements of a cell
  std::int64_t longest_key = 0, task_rows = 0, tasks_of_sequence = 1;
  std::int64_t column_sums = 0;  // floats of all sequences

  Plan(const AttentionInputs& inputs, bool with_statistics, int max_threads)
      : a(inputs), statistics(with_statistics), threads(max_threads) {
    with_type(a.dtype, [&](auto element) { terms = OperandOf<decltype(element)>::Type::kTerms; });
    std::int64_t longest_query = 0;
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const Sequence s(a, b);
      if (s.keys > longest_key) longest_key = s.keys;
      if (s.queries > longest_query) longest_query = s.queries;
      column_sums += column_sums_of(s);
    }
    // As few tasks as share the work evenly among the threads, as each packs the keys and values again.
    const Chunks chunks(longest_query);
    tasks_of_sequence = (longest_query + kTaskRows - 1) / kTaskRows;
    if (tasks_of_sequence < 1) tasks_of_sequence = 1;
    const std::int64_t most =
        chunks.number < longest_query / kLeastTaskRows ? chunks.number : longest_query / kLeastTaskRows;
    while (tasks_of_sequence < most && tasks() % threads != 0 && tasks() < threads * kTasksOfThread)
      ++tasks_of_sequence;
    task_rows = (chunks.number + tasks_of_sequence - 1) / tasks_of_sequence * chunks.size * kMaxBlockRows;
    if (task_rows > longest_query) task_rows = longest_query;
    if (threads > tasks()) threads = tasks() > 0 ? int(tasks()) : 1;
  }

  std::int64_t tasks() const { return a.batch * tasks_of_sequence; }

  std::int64_t column_sums_of(const Sequence& s) const {
    return statistics ? Chunks(s.queries).number * padded(s.keys) : 0;
  }

  Results results(Arena& arena) const {
    const std::int64_t rows = statistics ? a.tokens_q : 0, batch = statistics ? a.batch : 0;
    return {arena.take({rows, a.heads}), arena.take({rows, a.heads}), arena.take({column_sums}),
            arena.take({2, batch})};
  }

  void write_offsets(const Results& results) const {
    std::int64_t offset = 0;
    for (std::int64_t b = 0; statistics && b < a.batch; ++b) {
      std::memcpy(results.offsets + 2 * b, &offset, sizeof offset);
      offset += column_sums_of(Sequence(a, b));
    }
  }

  // The scratch of one thread.
  Workspace workspace(Arena& arena) const {
    const std::int64_t keys = padded(longest_key), cells = keys / terms;
    return {arena.take({cells, a.head_dim}),
            arena.take({cells, padded(a.head_dim)}),
            arena.take({keys, kMaxBlockRows}),
            arena.take({terms > 1 ? cells : 0, kMaxBlockRows}),
            arena.take({statistics ? keys : 0, task_rows}),
            arena.take({kMaxBlockRows, kBlockStride}),
            arena.take({kMaxBlockRows, padded(a.head_dim)})};
  }
};

}  // namespace

Status varlen_attention_workspace(const AttentionInputs& a, bool statistics, int threads,
                                  std::int64_t* bytes) {
  return workspace_bytes(Plan(a, statistics, threads), bytes);
}

Status varlen_attention(const AttentionInputs& a, void* out, float* lse, float* summary_attention,
                        float* received_attention, void* memory, int threads) {
  const bool statistics = summary_attention != nullptr;
  const Plan plan(a, statistics, threads);
  if (bytes_of(plan) == kTooLarge) return Status::invalid_argument;
  Arena arena(static_cast<float*>(memory));
  const Results results = plan.results(arena);
  plan.write_offsets(results);
  float* const own = arena.next();

  with_type(a.dtype, [&](auto element) {
    const Attention<decltype(element)> attention(a, out, lse, statistics, results);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
    {
      const Workspace workspace = workspace_of_thread(plan, own);
#pragma omp for schedule(dynamic)
      for (std::int64_t task = 0; task < plan.tasks(); ++task) {
        const std::int64_t b = task / plan.tasks_of_sequence, part = task % plan.tasks_of_sequence;
        const Sequence s(a, b);
        if (part == 0 && s.blind > 0) attention.clear_blind(s);
        const std::int64_t chunks = Chunks(s.queries).number;
        const std::int64_t first = chunks * part / plan.tasks_of_sequence;
        const std::int64_t last = chunks * (part + 1) / plan.tasks_of_sequence;
        if (first < last)
          attention.run(s, first, last, statistics ? results.column_sums_of(b) : nullptr, workspace);
      }
      if (statistics) {
#pragma omp for schedule(dynamic)
        for (std::int64_t b = 0; b < a.batch; ++b)
          finish(a, Sequence(a, b), results, results.column_sums_of(b), summary_attention,
                 received_attention);
      }
    }
  });
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
