// Attention with statistics in one pass. A task is a run of query rows of one sequence: for each head it
// packs keys and values into panels, then runs row blocks (attention_block.h) whose head-maximum stays in
// cache; at the end it sums the columns of that maximum, chunk by chunk. Chunks depend on the sequence alone
// and are added in order, so neither threads nor the rest of the batch change a bit.

#include "cpu/kernels/attention.h"

#include <cstdlib>

#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/dtype.h"
#include "cpu/kernels/threads.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr std::int64_t kBlocksPerChunk = 84 / kMaxBlockRows;  // about 84 rows
constexpr std::int64_t kTaskRows = 600;  // more is packed less often, but the maxima leave L2

// Rows 0 to count, split evenly into blocks of at most kMaxBlockRows.
struct Blocks {
  std::int64_t count, number;
  explicit Blocks(std::int64_t rows) : count(rows), number((rows + kMaxBlockRows - 1) / kMaxBlockRows) {}
  std::int64_t begin(std::int64_t block) const {
    return block * (count / number) + (block < count % number ? block : count % number);
  }
  std::int64_t chunks() const { return (number + kBlocksPerChunk - 1) / kBlocksPerChunk; }
};

std::int64_t padded(std::int64_t keys) { return (keys + kPanel - 1) / kPanel * kPanel; }

struct Sequence {
  std::int64_t query, queries, key, keys;  // first row and number of rows
  std::int64_t summary;                    // row inside the sequence, -1: none

  Sequence(const AttentionInputs& a, std::int64_t b)
      : query(a.cu_seqlens_q[b]),
        queries(a.cu_seqlens_q[b + 1] - query),
        key(a.cu_seqlens_k[b]),
        keys(a.cu_seqlens_k[b + 1] - key),
        summary(a.summary_index == nullptr ? 0 : a.summary_index[b]) {
    if (summary >= queries) summary = -1;  // a row that does not exist is none
  }
};

// What tasks leave for the end: floats per query row of the batch.
struct Results {
  float* norms;         // (rows_q, heads) of the outputs
  float* from_summary;  // (rows_q, heads): P[h, s, j] of key j
  float* column_sums;   // (batch, chunks, padded keys), strides those of the longest sequence
};

// Scratch of one thread.
struct Workspace {
  float* keys;    // panels of one head
  float* values;  // panels of one head
  float* tail;    // (kTailKeys, kMaxHeadDim)
  float* scores;  // panels of one block
  float* maxima;  // panels of every block of a task
  float* queries;
  float* out;
};

// rows (count, head_dim) -> panels [key / kPanel][head_dim][kPanel], zeros where there is no key.
template <typename T>
void pack_keys(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* panels) {
  for (std::int64_t first = 0; first < padded(count); first += kWidth) {
    float* const to = panels + first / kPanel * kPanel * head_dim + first % kPanel;
    for (std::int64_t d = 0; d < head_dim; d += kWidth) {
      Vec tile[kWidth];
      for (int i = 0; i < kWidth; ++i)
        tile[i] = first + i < count ? load(rows + (first + i) * stride + d) : Vec{};
      transpose(tile);
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kPanel, tile[i]);
    }
  }
}

// rows (count, head_dim) -> panels [head_dim / kPanel][count][kPanel].
template <typename T>
void pack_values(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t head_dim,
                 float* panels) {
  for (std::int64_t d = 0; d < head_dim; d += kWidth) {
    float* const to = panels + d / kPanel * kPanel * count + d % kPanel;
    for (std::int64_t j = 0; j < count; ++j) store(to + j * kPanel, load(rows + j * stride + d));
  }
}

template <typename T>
class Attention {
 public:
  Attention(const AttentionInputs& inputs, void* out, bool statistics, const Results& results)
      : a_(inputs), out_(static_cast<T*>(out)), statistics_(statistics), results_(results) {}

  // Chunks [first, last) of a sequence whose column sums go to column_sums (chunks, padded keys).
  void run(const Sequence& s, std::int64_t first, std::int64_t last, float* column_sums,
           const Workspace& w) const {
    const Blocks blocks(s.queries);
    const std::int64_t begin = first * kBlocksPerChunk;
    const std::int64_t end = last * kBlocksPerChunk < blocks.number ? last * kBlocksPerChunk : blocks.number;
    const std::int64_t first_row = blocks.begin(begin);
    for (std::int64_t h = 0; h < a_.heads; ++h) {
      const std::int64_t seen = a_.causal ? blocks.begin(end) : s.keys;
      pack_keys(row(a_.k, a_.k_strides, s.key, h), a_.k_strides[0], seen, a_.head_dim, w.keys);
      pack_values(row(a_.v, a_.v_strides, s.key, h), a_.v_strides[0], seen, a_.head_dim, w.values);
      for (std::int64_t j = 0; j < s.keys % kPanel && j < kTailKeys; ++j) {
        const T* const key = row(a_.k, a_.k_strides, s.key + s.keys / kPanel * kPanel + j, h);
        for (std::int64_t d = 0; d < a_.head_dim; d += kWidth)
          store(w.tail + j * kMaxHeadDim + d, load(key + d));
      }
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t i = blocks.begin(block), rows = blocks.begin(block + 1) - i;
        QueryBlock task;
        task.next_queries = upcoming(a_.q, a_.q_strides, s.query + i + rows, h, block + 1 < end ? rows : 0);
        if (h + 1 < a_.heads) {  // each block fetches its share of the next head
          const std::int64_t from = seen * (block - begin) / (end - begin);
          const std::int64_t share = seen * (block + 1 - begin) / (end - begin) - from;
          task.next_keys = upcoming(a_.k, a_.k_strides, s.key + from, h + 1, share);
          task.next_values = upcoming(a_.v, a_.v_strides, s.key + from, h + 1, share);
        }
        attend_block(s, h, i, rows, seen, w.maxima + (i - first_row) * padded(s.keys), w, task);
      }
    }
    if (!statistics_) return;
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      float* const sums = column_sums + chunk * padded(s.keys);
      for (std::int64_t j = 0; j < padded(s.keys); ++j) sums[j] = 0;
      for (std::int64_t block = chunk * kBlocksPerChunk; block < (chunk + 1) * kBlocksPerChunk && block < end;
           ++block) {
        const std::int64_t i = blocks.begin(block), rows = blocks.begin(block + 1) - i;
        const std::int64_t keys = a_.causal ? i + rows : s.keys;
        add_columns(w.maxima + (i - first_row) * padded(s.keys), rows, s.summary - i, padded(keys), sums);
      }
    }
  }

 private:
  Upcoming upcoming(const void* base, const std::int64_t (&strides)[2], std::int64_t first, std::int64_t head,
                    std::int64_t rows) const {
    const std::int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(row(base, strides, first, head)), strides[0] * size, rows,
            a_.head_dim * size};
  }

  const T* row(const void* base, const std::int64_t (&strides)[2], std::int64_t row,
               std::int64_t head) const {
    return static_cast<const T*>(base) + row * strides[0] + head * strides[1];
  }

  void attend_block(const Sequence& s, std::int64_t h, std::int64_t i, std::int64_t rows,
                    std::int64_t value_rows, float* maxima, const Workspace& w, QueryBlock& block) const {
    const std::int64_t dim = a_.head_dim;
    const Vec scale = broadcast(a_.softmax_scale * 1.44269504088896341f);
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* const q = row(a_.q, a_.q_strides, s.query + i + r, h);
      for (std::int64_t d = 0; d < dim; d += kWidth)
        store(w.queries + r * kMaxHeadDim + d, load(q + d) * scale);
    }
    T* const out = out_ + ((s.query + i) * a_.heads + h) * dim;
    const bool direct = sizeof(T) == sizeof(float);
    float norms[kMaxBlockRows], inverse[kMaxBlockRows];
    block.queries = w.queries;
    block.keys = w.keys;
    block.tail = w.tail;
    block.values = w.values;
    block.value_rows = value_rows;
    block.key_count = a_.causal ? i + rows : s.keys;
    block.head_dim = dim;
    block.first_limit = a_.causal ? i + 1 : s.keys;
    block.limit_step = a_.causal ? 1 : 0;
    block.scores = w.scores;
    block.out = direct ? reinterpret_cast<float*>(out) : w.out;
    block.out_stride = direct ? a_.heads * dim : dim;
    block.maxima = statistics_ ? maxima : nullptr;
    block.first_head = h == 0;
    block.norms = norms;
    block.inverse = inverse;
    attend_function(rows, statistics_)(block);
    if (!direct)
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t d = 0; d < dim; d += kWidth)
          store(out + r * a_.heads * dim + d, load(w.out + r * dim + d));
    if (!statistics_) return;
    for (std::int64_t r = 0; r < rows; ++r) results_.norms[(s.query + i + r) * a_.heads + h] = norms[r];
    if (const std::int64_t r = s.summary - i; r >= 0 && r < rows)
      for (std::int64_t j = 0; j < s.keys; ++j)
        results_.from_summary[(s.query + j) * a_.heads + h] =
            j < block.key_count ? w.scores[(j / kPanel * rows + r) * kPanel + j % kPanel] * inverse[r] : 0;
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
  const bool statistics_;
  const Results results_;
};

// From what the tasks left to the two numbers of each token of a sequence.
void finish(const AttentionInputs& a, const Sequence& s, const Results& results, const float* column_sums,
            float* summary, float* received) {
  const std::int64_t chunks = Blocks(s.queries).chunks();
  for (std::int64_t j = 0; j < s.queries; ++j) {
    float total = 0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total += column_sums[chunk * padded(s.keys) + j];
    if (a.causal) {
      const std::int64_t observers = s.queries - j - (s.summary >= j ? 1 : 0);
      total /= float(observers > 1 ? observers : 1);
    }
    received[s.query + j] = total;

    const float* const norms = results.norms + (s.query + j) * a.heads;
    const float* const weights = results.from_summary + (s.query + j) * a.heads;
    float norm_sum = 0, weighted = 0;
    for (std::int64_t h = 0; h < a.heads; ++h) norm_sum += norms[h], weighted += norms[h] * weights[h];
    summary[s.query + j] = s.summary < 0 || norm_sum == 0 ? 0 : weighted / norm_sum;
  }
}

// Floats, counted while sizes are added up and handed out afterwards, each piece on a cache line.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(std::int64_t count) {
    float* const piece = base_ + used_;
    used_ += (count + 15) / 16 * 16;
    return piece;
  }
  std::int64_t used() const { return used_; }

 private:
  float* const base_;
  std::int64_t used_ = 0;
};

struct Plan {
  std::int64_t longest_key = 0, task_rows = 0, tasks_of_sequence = 1;
  std::int64_t column_sums = 0;  // floats of a sequence

  Plan(const AttentionInputs& a, bool statistics, int threads) {
    std::int64_t longest_query = 0;
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const Sequence s(a, b);
      if (s.keys > longest_key) longest_key = s.keys;
      if (s.queries > longest_query) longest_query = s.queries;
      const std::int64_t sums = statistics && s.queries > 0 ? Blocks(s.queries).chunks() * padded(s.keys) : 0;
      if (sums > column_sums) column_sums = sums;
    }
    // Enough tasks for the threads, and no more than that: each packs the keys and values again.
    const std::int64_t by_cache = (longest_query + kTaskRows - 1) / kTaskRows;
    const std::int64_t by_threads = a.batch > 0 ? (threads + a.batch - 1) / a.batch : 1;
    tasks_of_sequence = by_cache > by_threads ? by_cache : by_threads;
    const std::int64_t chunks = longest_query > 0 ? Blocks(longest_query).chunks() : 1;
    if (tasks_of_sequence > chunks) tasks_of_sequence = chunks;
    if (tasks_of_sequence < 1) tasks_of_sequence = 1;
    task_rows = ((chunks + tasks_of_sequence - 1) / tasks_of_sequence + 1) * kBlocksPerChunk * kMaxBlockRows;
  }

  Workspace workspace(const AttentionInputs& a, bool statistics, Arena& arena) const {
    const std::int64_t keys = padded(longest_key);
    return {arena.take(keys * a.head_dim),
            arena.take(keys * padded(a.head_dim)),
            arena.take(kTailKeys * kMaxHeadDim),
            arena.take(keys * kMaxBlockRows),
            arena.take(statistics ? keys * task_rows : 0),
            arena.take(kMaxBlockRows * kMaxHeadDim),
            arena.take(kMaxBlockRows * a.head_dim)};
  }

  Results results(const AttentionInputs& a, bool statistics, Arena& arena) const {
    const std::int64_t count = statistics ? a.rows_q * a.heads : 0;
    return {arena.take(count), arena.take(count), arena.take(a.batch * column_sums)};
  }
};

}  // namespace

Status varlen_attention(const AttentionInputs& a, void* out, float* summary, float* received, int threads) {
  const bool statistics = summary != nullptr;
  const Plan plan(a, statistics, threads);
  const std::int64_t tasks = a.batch * plan.tasks_of_sequence;
  if (threads > tasks) threads = tasks > 0 ? int(tasks) : 1;

  Arena sizes(nullptr);
  plan.results(a, statistics, sizes);
  const std::int64_t shared = sizes.used();
  plan.workspace(a, statistics, sizes);
  const std::int64_t each = sizes.used() - shared;
  void* memory = nullptr;
  const std::size_t bytes = std::size_t(shared + each * threads) * sizeof(float);
  if (posix_memalign(&memory, 64, bytes > 0 ? bytes : 64) != 0) return Status::out_of_memory;
  float* const base = static_cast<float*>(memory);
  Arena shared_arena(base);
  const Results results = plan.results(a, statistics, shared_arena);

  with_type(a.dtype, [&](auto element) {
    const Attention<decltype(element)> attention(a, out, statistics, results);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Arena own(base + shared + each * thread_number());
      const Workspace workspace = plan.workspace(a, statistics, own);
#pragma omp for schedule(dynamic)
      for (std::int64_t task = 0; task < tasks; ++task) {
        const std::int64_t b = task / plan.tasks_of_sequence, part = task % plan.tasks_of_sequence;
        const Sequence s(a, b);
        const std::int64_t chunks = Blocks(s.queries).chunks();
        const std::int64_t first = chunks * part / plan.tasks_of_sequence;
        const std::int64_t last = chunks * (part + 1) / plan.tasks_of_sequence;
        if (first < last)
          attention.run(s, first, last, results.column_sums + b * plan.column_sums, workspace);
      }
      if (statistics) {
#pragma omp for schedule(dynamic)
        for (std::int64_t b = 0; b < a.batch; ++b)
          finish(a, Sequence(a, b), results, results.column_sums + b * plan.column_sums, summary, received);
      }
    }
  });
  std::free(memory);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
