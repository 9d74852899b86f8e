// SPDX-License-Identifier: Apache-2.0
#pragma once

// How a 2:4 weight becomes a layout. Groups and blocks are packed independently; what is written depends on
// the weight alone.

#include <cstdlib>

#include "cpu/kernels/layout.h"
#include "cpu/kernels/threads.h"
#include "madtp/sparse24.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kPairs = kGroupRows / 2;
constexpr int kCandidates = kGroupRows * (kGroupRows - 1) / 2;

constexpr int kWordGroups = 8;  // groups of 4 columns in a word of bits: of 6 entries each at most
constexpr int kWords = kBlock / 4 / kWordGroups;
static_assert(!kLookUp || kBlock / kWords == kSection);

// The entries of a panel that a row multiplies in a block, a bit each.
struct Entries {
  std::uint64_t word[kWords];
};

inline int count(std::uint64_t bits) { return __builtin_popcountll(bits); }

struct Pair {
  std::uint8_t a, b;
  int lead, shared;  // steps before the shared ones, and those
};

// Scratch of one thread.
struct PackWorkspace {
  Entries entries[kGroupRows];
  Pair pairs[kPairs];
  std::uint8_t matches[kCandidates];
  std::uint8_t candidates[kCandidates][2];  // sorted by entries in common, most first
};

// How many entries two rows have in common.
inline int count_shared(const Entries& x, const Entries& y) {
  int shared = 0;
  for (int i = 0; i < kWords; ++i) shared += count(x.word[i] & y.word[i]);
  return shared;
}

template <int EntriesOf4>
void read_entries(const Sparse24Weight& weight, std::int64_t row, std::int64_t block, int columns,
                  Entries& entries) {
  const std::uint8_t* const indices = weight.indices + row * (weight.in_features / 8) + block * (kBlock / 8);
  entries = {};
  for (int group = 0; group < columns / 4; ++group) {
    const unsigned nibble = indices[group / 2] >> (group % 2 * 4) & 15, a = nibble & 3, b = nibble >> 2;
    const std::uint64_t bits = EntriesOf4 == 4 ? 1u << a | 1u << b : 1u << (a == 0 ? b - 1 : a + b);
    entries.word[group / kWordGroups] |= bits << (group % kWordGroups * EntriesOf4);
  }
}

// Pairs rows greedily, those with the most entries in common first.
inline void pair_rows(int rows, PackWorkspace& w) {
  int ends[kBlock / 2 + 2] = {};  // of the candidates with so many or more entries in common
  int candidate = 0;
  for (int a = 0; a < rows; ++a) {
    for (int b = a + 1; b < rows; ++b) {
      const int match = count_shared(w.entries[a], w.entries[b]);
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
    const Entries &x = w.entries[a], &y = w.entries[b];
    const int shared = count_shared(x, y);
    const Pair pair{a, b, kLookUp ? count(x.word[0] & ~y.word[0]) : 0, shared};
    int at = pairs++;  // neighbours alike in both numbers, so that branches are foreseen
    for (; at > 0 && w.pairs[at - 1].shared == shared && w.pairs[at - 1].lead > pair.lead; --at)
      w.pairs[at] = w.pairs[at - 1];
    w.pairs[at] = pair;
  }
}

// Writes the steps of one row of a unit, in place r.
template <typename W, int EntriesOf4>
class RowWriter {
 public:
  RowWriter(W* weights, std::uint8_t* entries, const W* values, const Entries& kept)
      : weights_(weights), entries_(entries), values_(values), kept_(kept) {}

  // Appends the entries `which` of a word.
  void append(int word, std::uint64_t which) {
    constexpr int kWordSteps = kWordGroups * (EntriesOf4 == 4 ? 2 : 1);
    for (; which != 0; which &= which - 1) {
      const int entry = __builtin_ctzll(which);
      const std::uint64_t before = kept_.word[word] & ((std::uint64_t(1) << entry) - 1);
      if (values_ == nullptr) {
        *weights_ = W{};
      } else {
        __builtin_memcpy(weights_, values_ + word * kWordSteps + count(before), sizeof(W));
      }
      *entries_ = std::uint8_t(word * kWordGroups * EntriesOf4 + entry);
      weights_ += kUnitRows;
      entries_ += kUnitRows;
    }
  }

 private:
  W* weights_;
  std::uint8_t* entries_;
  const W* values_;  // of this row and block, a step each; null: zeros
  Entries kept_;
};

// One group and block. W: the weights of a step.
template <typename W, int EntriesOf4>
void pack_units(const Sparse24Weight& weight, const Layout& layout, void* data, std::int64_t group,
                std::int64_t block, PackWorkspace& w) {
  const int columns = layout.block_columns(block), rows = int(layout.unit_count(group)) * kUnitRows;
  const std::int64_t first = layout.first_row(group);
  for (int r = 0; r < rows; ++r) {  // rows past those of W: as the last
    const std::int64_t row = first + r < weight.out_features ? first + r : weight.out_features - 1;
    read_entries<EntriesOf4>(weight, row, block, columns, w.entries[r]);
  }
  pair_rows(rows, w);
  for (int u = 0; u < rows / kUnitRows; ++u) {
    const Unit unit = layout.unit(data, group, block, u);
    W* const weights = static_cast<W*>(const_cast<void*>(unit.weights()));
    std::uint8_t* const unit_entries = const_cast<std::uint8_t*>(unit.entries());
    std::uint8_t* const unit_rows = const_cast<std::uint8_t*>(unit.rows());
    std::uint8_t* const shared = const_cast<std::uint8_t*>(unit.shared());
    __builtin_memset(unit_rows, 0, kHeader);
    for (int r = 0; r < kUnitRows; ++r) {
      const Pair& pair = w.pairs[(u * kUnitRows + r) / 2];
      const int row = r % 2 == 0 ? pair.a : pair.b, other = r % 2 == 0 ? pair.b : pair.a;
      const Entries kept = w.entries[row], others = w.entries[other];
      const W* const values = first + row < weight.out_features
                                  ? static_cast<const W*>(weight.values) +
                                        (first + row) * layout.steps(int(weight.in_features)) +
                                        block * layout.steps(kBlock)
                                  : nullptr;
      RowWriter<W, EntriesOf4> writer(weights + r, unit_entries + r, values, kept);
      constexpr int kFirst = kLookUp ? 1 : 0;  // the words whose own entries come before the shared ones
      for (int i = 0; i < kFirst; ++i) writer.append(i, kept.word[i] & ~others.word[i]);
      for (int i = 0; i < kWords; ++i) writer.append(i, kept.word[i] & others.word[i]);
      for (int i = kFirst; i < kWords; ++i) writer.append(i, kept.word[i] & ~others.word[i]);
      unit_rows[r] = std::uint8_t(row);
      shared[r] = std::uint8_t(r % 2 == 0 ? pair.lead : pair.lead + pair.shared);
    }
  }
}

// All groups and blocks. W: the weights of a step.
template <typename W, int EntriesOf4>
Status pack_layout(const Sparse24Weight& weight, const Layout& layout, void* data, int threads) {
  const std::int64_t tasks = layout.groups * layout.blocks;
  if (threads > tasks) threads = tasks > 0 ? int(tasks) : 1;
  PackWorkspace* const workspaces =
      static_cast<PackWorkspace*>(std::malloc(sizeof(PackWorkspace) * std::size_t(threads)));
  if (workspaces == nullptr) return Status::out_of_memory;
  for_each_task(tasks, threads, [&](std::int64_t task, int thread) {
    pack_units<W, EntriesOf4>(weight, layout, data, task / layout.blocks, task % layout.blocks,
                              workspaces[thread]);
  });
  std::free(workspaces);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
