// The layout of a 2:4 weight. Groups and blocks are packed independently; what is written depends on the
// weight alone.

#include <cstdlib>

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/sparse24.h"
#include "cpu/kernels/sparse24_layout.h"
#include "cpu/kernels/threads.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr int kPairs = kGroupRows / 2;
constexpr int kCandidates = kGroupRows * (kGroupRows - 1) / 2;

// The columns of a block that a row keeps, a bit each.
struct Columns {
  std::uint64_t section[2];
};

int count(std::uint64_t bits) { return __builtin_popcountll(bits); }

struct Pair {
  std::uint8_t a, b;
  int lead, shared;  // steps before the shared ones, and those
};

// Scratch of one thread.
struct Workspace {
  Columns columns[kGroupRows];
  Pair pairs[kPairs];
  std::uint8_t matches[kCandidates];
  std::uint8_t candidates[kCandidates][2];  // sorted by columns in common, most first
};

void read_columns(const Sparse24Weight& weight, std::int64_t row, std::int64_t block, int width,
                  Columns& columns) {
  const std::uint8_t* const indices = weight.indices + row * (weight.channels / 8) + block * (kBlock / 8);
  columns = {};
  for (int group = 0; group < width / 4; ++group) {
    const unsigned nibble = indices[group / 2] >> (group % 2 * 4) & 15;
    const std::uint64_t bits = 1u << (nibble & 3) | 1u << (nibble >> 2);
    columns.section[group * 4 / kSection] |= bits << (group * 4 % kSection);
  }
}

// Pairs rows greedily, those with the most columns in common first.
void pair_rows(int rows, Workspace& w) {
  int ends[kBlock / 2 + 2] = {};  // of the candidates with so many or more columns in common
  int candidate = 0;
  for (int a = 0; a < rows; ++a) {
    for (int b = a + 1; b < rows; ++b) {
      const Columns &x = w.columns[a], &y = w.columns[b];
      const int match = count(x.section[0] & y.section[0]) + count(x.section[1] & y.section[1]);
      w.matches[candidate++] = std::uint8_t(match);
      ++ends[match];
    }
  }
  for (int match = kBlock / 2; match >= 0; --match) ends[match] += ends[match + 1];
  candidate = 0;
  for (int a = 0; a < rows; ++a) {
    for (int b = a + 1; b < rows; ++b) {
      std::uint8_t* const at = w.candidates[ends[w.matches[candidate++] + 1]++];
      at[0] = std::uint8_t(a);
      at[1] = std::uint8_t(b);
    }
  }
  bool taken[kGroupRows] = {};
  int pairs = 0;
  for (int i = 0; i < candidate && pairs < rows / 2; ++i) {
    const std::uint8_t a = w.candidates[i][0], b = w.candidates[i][1];
    if (taken[a] || taken[b]) continue;
    taken[a] = taken[b] = true;
    const Columns &x = w.columns[a], &y = w.columns[b];
    const int shared = count(x.section[0] & y.section[0]) + count(x.section[1] & y.section[1]);
    const Pair pair{a, b, kLookUp ? count(x.section[0] & ~y.section[0]) : 0, shared};
    int at = pairs++;  // neighbours alike in both numbers, so that branches are foreseen
    for (; at > 0 && w.pairs[at - 1].shared == shared && w.pairs[at - 1].lead > pair.lead; --at)
      w.pairs[at] = w.pairs[at - 1];
    w.pairs[at] = pair;
  }
}

// Writes the steps of one row of a unit, in place r.
template <typename W>
class RowWriter {
 public:
  RowWriter(W* weights, std::uint8_t* columns, const W* values, const Columns& kept)
      : weights_(weights), columns_(columns), values_(values), kept_(kept) {}

  // Appends the columns `which` of a section.
  void append(int section, std::uint64_t which) {
    for (; which != 0; which &= which - 1) {
      const int column = __builtin_ctzll(which);
      const std::uint64_t before = kept_.section[section] & ((std::uint64_t(1) << column) - 1);
      *weights_ = values_ == nullptr ? W{} : values_[section * kSection / 2 + count(before)];
      *columns_ = std::uint8_t(section * kSection + column);
      weights_ += kUnitRows;
      columns_ += kUnitRows;
    }
  }

 private:
  W* weights_;
  std::uint8_t* columns_;
  const W* values_;  // of this row and block; null: zeros
  Columns kept_;
};

template <typename W>
void pack(const Sparse24Weight& weight, const Layout& layout, void* data, std::int64_t group,
          std::int64_t block, Workspace& w) {
  const int columns = layout.block_columns(block), rows = int(layout.unit_count(group)) * kUnitRows;
  const std::int64_t first = layout.first_row(group);
  for (int r = 0; r < rows; ++r) {  // rows past the features: as the last
    const std::int64_t row = first + r < weight.features ? first + r : weight.features - 1;
    read_columns(weight, row, block, columns, w.columns[r]);
  }
  pair_rows(rows, w);
  for (int u = 0; u < rows / kUnitRows; ++u) {
    const Unit unit = layout.unit(data, group, block, u);
    W* const weights = static_cast<W*>(const_cast<void*>(unit.weights()));
    std::uint8_t* const unit_columns = const_cast<std::uint8_t*>(unit.columns());
    std::uint8_t* const unit_rows = const_cast<std::uint8_t*>(unit.rows());
    std::uint8_t* const shared = const_cast<std::uint8_t*>(unit.shared());
    __builtin_memset(unit_rows, 0, kHeader);
    for (int r = 0; r < kUnitRows; ++r) {
      const Pair& pair = w.pairs[(u * kUnitRows + r) / 2];
      const int row = r % 2 == 0 ? pair.a : pair.b, other = r % 2 == 0 ? pair.b : pair.a;
      const Columns kept = w.columns[row], others = w.columns[other];
      const W* const values = first + row < weight.features
                                  ? static_cast<const W*>(weight.values) +
                                        (first + row) * (weight.channels / 2) + block * (kBlock / 2)
                                  : nullptr;
      RowWriter<W> writer(weights + r, unit_columns + r, values, kept);
      if (kLookUp) writer.append(0, kept.section[0] & ~others.section[0]);
      writer.append(0, kept.section[0] & others.section[0]);
      writer.append(1, kept.section[1] & others.section[1]);
      if (!kLookUp) writer.append(0, kept.section[0] & ~others.section[0]);
      writer.append(1, kept.section[1] & ~others.section[1]);
      unit_rows[r] = std::uint8_t(row);
      shared[r] = std::uint8_t(r % 2 == 0 ? pair.lead : pair.lead + pair.shared);
    }
  }
}

}  // namespace

Status sparse24_layout_bytes(std::int64_t features, std::int64_t channels, DType weight_dtype,
                             std::int64_t* bytes) {
  *bytes = Layout(features, channels, weight_dtype).bytes();
  return Status::ok;
}

Status sparse24_pack(const Sparse24Weight& weight, void* data, int threads) {
  const Layout layout(weight.features, weight.channels, weight.dtype);
  const std::int64_t tasks = layout.groups * layout.blocks;
  if (threads > tasks) threads = tasks > 0 ? int(tasks) : 1;
  Workspace* const workspaces =
      static_cast<Workspace*>(std::malloc(sizeof(Workspace) * std::size_t(threads)));
  if (workspaces == nullptr) return Status::out_of_memory;
  with_type(weight.dtype, [&](auto element) {
    for_each_task(tasks, threads, [&](std::int64_t task, int thread) {
      pack<decltype(element)>(weight, layout, data, task / layout.blocks, task % layout.blocks,
                              workspaces[thread]);
    });
  });
  std::free(workspaces);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
