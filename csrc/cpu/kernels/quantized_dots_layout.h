// SPDX-License-Identifier: Apache-2.0
#pragma once

// How an int8 weight lies in memory where one instruction multiplies a vector of bytes of x with one of the
// weight and adds them up by fours, and another picks any of kDotsColumns bytes (quantized_dots_vec.h): the
// lanes are output features.
//
// The rows of W are cut into units of two vectors of lanes, its columns into blocks of kDotsColumns, both
// filled up with zeros. Where x comes as unsigned bytes, x + 128, every row has a correction to subtract: 128
// times the sum of its weights.
//
// Dense: for every 4 columns the 4 weights of all rows of a unit.
//
// 2:4: a row keeps half of the columns of a block, 4 to a step. The rows of a unit are paired into twins, one
// row of each in the lanes of set 0 and one in those of set 1. Where all twins have 4 columns in common, a
// step is shared: one vector of columns and one of weights for each set. In a block the shared steps come
// first, then those of the two sets in turn:
//
//   shared  {columns, weights of set 0, weights of set 1}
//   own     {columns, weights of set 0, columns, weights of set 1}
//
// The blocks of a unit are sorted by how many steps they share, so that the kernel's branches are foreseen;
// sums of integers do not depend on the order.

#include <cstdint>
#include <cstdlib>

#include "cpu/kernels/quantized_dots_vec.h"
#include "cpu/kernels/threads.h"
#include "madtp/quantized.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kDotsRows = 2 * kWidth;         // of a unit
constexpr int kDotsSteps = kDotsColumns / 8;  // of a row in a block, where W is 2:4
constexpr int kSharedBytes = 3 * sizeof(IntVec), kOwnBytes = 4 * sizeof(IntVec);

struct DotsLayout {
  std::int64_t units, blocks;
  bool sparse;

  DotsLayout(std::int64_t out_features, std::int64_t in_features, bool sparse_)
      : units((out_features + kDotsRows - 1) / kDotsRows),
        blocks((in_features + kDotsColumns - 1) / kDotsColumns),
        sparse(sparse_) {}

  // What a unit begins with: the corrections of its rows; of a 2:4 weight also the place of every row among
  // the lanes, and a word for every block: its number, and above 16 bits how many steps it shares.
  std::int64_t header_bytes() const {
    return kDotsRows * 4 + (sparse ? kDotsRows * 4 + (blocks * 4 + 63) / 64 * 64 : 0);
  }
  // At most: shared steps leave a part of it empty.
  std::int64_t stream_bytes() const {
    return blocks * (sparse ? kDotsSteps * kOwnBytes : kDotsRows * kDotsColumns);
  }
  std::int64_t unit_bytes() const { return header_bytes() + stream_bytes(); }
  std::int64_t bytes() const { return units * unit_bytes(); }
};

struct DotsUnit {
  char* data;
  const DotsLayout& layout;

  DotsUnit(const DotsLayout& layout_, const void* layout_data, std::int64_t unit)
      : data(const_cast<char*>(static_cast<const char*>(layout_data)) + unit * layout_.unit_bytes()),
        layout(layout_) {}
  std::int32_t* corrections() const { return reinterpret_cast<std::int32_t*>(data); }
  std::int32_t* lanes() const { return corrections() + kDotsRows; }
  std::uint32_t* blocks() const { return reinterpret_cast<std::uint32_t*>(lanes() + kDotsRows); }
  char* stream() const { return data + layout.header_bytes(); }
};

namespace detail {

// The weights of one row in one block, and the columns it keeps.
inline std::uint64_t expand_block(const QuantizedWeight& weight, std::int64_t row, std::int64_t block,
                                  std::int8_t (&to)[kDotsColumns]) {
  std::uint64_t kept = 0;
  __builtin_memset(to, 0, sizeof to);
  for (int c = 0; c < kDotsColumns; c += 4) {
    const std::int64_t group = (block * kDotsColumns + c) / 4;
    unsigned a = 0, b = 1;  // past the rows and columns of W: zeros
    if (row < weight.out_features && group < weight.in_features / 4) {
      const unsigned nibble =
          weight.indices[row * (weight.in_features / 8) + group / 2] >> (group % 2 * 4) & 15;
      a = nibble & 3;
      b = nibble >> 2;
      const std::int8_t* const values = weight.values + (row * (weight.in_features / 4) + group) * 2;
      to[c + a] = values[0];
      to[c + b] = values[1];
    }
    kept |= (std::uint64_t(1) << a | std::uint64_t(1) << b) << c;
  }
  return kept;
}

inline int count_bits(std::uint64_t bits) { return __builtin_popcountll(bits); }

// The lowest n set bits.
inline std::uint64_t lowest_bits(std::uint64_t bits, int n) {
  std::uint64_t lowest = 0;
  for (; n > 0; --n, bits &= bits - 1) lowest |= bits & (~bits + 1);
  return lowest;
}

// Rows in the lanes: order[lane] and order[kWidth + lane] are twins. At first greedily those with most
// columns in common; then rows are swapped as long as blocks share more steps. In blocks of 16 columns there
// is next to nothing to gain from that: of the steps of random masks a tenth at most.
class TwinOrder {
 public:
  TwinOrder(const std::uint64_t* kept, std::int64_t blocks) : kept_(kept), blocks_(blocks) {
    pair_greedily();
    if (kDotsColumns > 16) improve();
  }
  int order[kDotsRows];

  // Columns that a pair of twins has in common, of the pair with the fewest.
  int fewest_common(std::int64_t block) const {
    int fewest = kDotsColumns;
    for (int lane = 0; lane < kWidth; ++lane) {
      const int common = count_common(order[lane], order[kWidth + lane], block);
      fewest = common < fewest ? common : fewest;
    }
    return fewest;
  }

 private:
  int count_common(int a, int b, std::int64_t block) const {
    return count_bits(kept_[a * blocks_ + block] & kept_[b * blocks_ + block]);
  }

  void pair_greedily() {
    std::int64_t common[kDotsRows][kDotsRows];
    for (int a = 0; a < kDotsRows; ++a) {
      for (int b = 0; b < a; ++b) {
        common[a][b] = 0;
        for (std::int64_t block = 0; block < blocks_; ++block) common[a][b] += count_common(a, b, block);
      }
    }
    bool taken[kDotsRows] = {};
    for (int lane = 0; lane < kWidth; ++lane) {
      int best_a = -1, best_b = -1;
      for (int a = 0; a < kDotsRows; ++a) {
        for (int b = 0; b < a; ++b) {
          if (taken[a] || taken[b]) continue;
          if (best_a < 0 || common[a][b] > common[best_a][best_b]) best_a = a, best_b = b;
        }
      }
      taken[best_a] = taken[best_b] = true;
      order[lane] = best_a;
      order[kWidth + lane] = best_b;
    }
  }

  // Shared steps count most; beside them pairs that are close to sharing more than they do.
  std::int64_t value() const {
    std::int64_t value = 0;
    for (std::int64_t block = 0; block < blocks_; ++block) {
      int fewest = kDotsColumns, missing = 0;
      for (int lane = 0; lane < kWidth; ++lane) {
        const int common = count_common(order[lane], order[kWidth + lane], block);
        fewest = common < fewest ? common : fewest;
        missing += common < 12 ? 12 - common : 0;
      }
      value += 100 * (fewest / 4) - missing;
    }
    return value;
  }

  void improve() {
    std::uint32_t state = 1;  // always the same: the layout depends on the weight alone
    const auto random_row = [&] {
      state = state * 1664525u + 1013904223u;
      return int((state >> 8) % kDotsRows);
    };
    std::int64_t best = value();
    for (int tries = 0; tries < 3000; ++tries) {
      const int a = random_row(), b = random_row();
      if (a % kWidth == b % kWidth) continue;
      const int row = order[a];
      order[a] = order[b];
      order[b] = row;
      if (const std::int64_t now = value(); now >= best) {
        best = now;
      } else {
        order[b] = order[a];
        order[a] = row;
      }
    }
  }

  const std::uint64_t* kept_;  // (kDotsRows, blocks)
  std::int64_t blocks_;
};

// Writes the columns and weights of one lane, four to a step; null: not.
inline void write_steps(std::uint64_t columns, const std::int8_t* row, int lane, char* columns_at,
                        char* weights_at, int stride) {
  for (int i = 0; columns != 0; columns &= columns - 1, ++i) {
    const int column = __builtin_ctzll(columns), at = i / 4 * stride + lane * 4 + i % 4;
    if (columns_at != nullptr) columns_at[at] = char(column);
    weights_at[at] = char(row[column]);
  }
}

}  // namespace detail

// The kernel has code for these numbers of shared steps.
constexpr int shared_steps(int fewest_common) {
  const int steps = fewest_common / 4;
  return kDotsSteps <= 4 || steps == kDotsSteps ? steps : steps > 4 ? 4 : steps < 2 ? 0 : steps;
}

// kept: scratch (kDotsRows, blocks)
inline void pack_twins(const QuantizedWeight& weight, const DotsLayout& layout, void* data, std::int64_t unit,
                       std::uint64_t* kept) {
  const DotsUnit to(layout, data, unit);
  const std::int64_t first = unit * kDotsRows;
  std::int8_t rows[kDotsRows][kDotsColumns];
  std::int32_t* const corrections = to.corrections();
  for (int r = 0; r < kDotsRows; ++r) {
    std::int32_t sum = 0;
    for (std::int64_t block = 0; block < layout.blocks; ++block) {
      kept[r * layout.blocks + block] = detail::expand_block(weight, first + r, block, rows[0]);
      for (std::int8_t w : rows[0]) sum += w;
    }
    corrections[r] = kDotsOffset * sum;
  }
  const detail::TwinOrder twins(kept, layout.blocks);
  for (int lane = 0; lane < kDotsRows; ++lane) to.lanes()[twins.order[lane]] = lane;
  char* at = to.stream();
  std::uint32_t* words = to.blocks();
  for (int shared = kDotsSteps; shared >= 0; --shared) {
    for (std::int64_t block = 0; block < layout.blocks; ++block) {
      if (shared_steps(twins.fewest_common(block)) != shared) continue;
      *words++ = std::uint32_t(block) | std::uint32_t(shared) << 16;
      for (int r = 0; r < kDotsRows; ++r) detail::expand_block(weight, first + r, block, rows[r]);
      constexpr int kVector = sizeof(IntVec);
      char* const own = at + shared * kSharedBytes;
      for (int lane = 0; lane < kWidth; ++lane) {
        const int a = twins.order[lane], b = twins.order[kWidth + lane];
        const std::uint64_t kept_a = kept[a * layout.blocks + block],
                            kept_b = kept[b * layout.blocks + block];
        const std::uint64_t both = detail::lowest_bits(kept_a & kept_b, 4 * shared);
        detail::write_steps(both, rows[a], lane, at, at + kVector, kSharedBytes);
        detail::write_steps(both, rows[b], lane, nullptr, at + 2 * kVector, kSharedBytes);
        detail::write_steps(kept_a & ~both, rows[a], lane, own, own + kVector, kOwnBytes);
        detail::write_steps(kept_b & ~both, rows[b], lane, own + 2 * kVector, own + 3 * kVector, kOwnBytes);
      }
      at = own + (kDotsSteps - shared) * kOwnBytes;
    }
  }
}

inline void pack_dense(const QuantizedWeight& weight, const DotsLayout& layout, void* data,
                       std::int64_t unit) {
  const DotsUnit to(layout, data, unit);
  char* const stream = to.stream();
  for (int r = 0; r < kDotsRows; ++r) {
    const std::int64_t row = unit * kDotsRows + r;
    std::int32_t sum = 0;
    for (std::int64_t c = 0; c < layout.blocks * kDotsColumns; ++c) {
      const bool has = row < weight.out_features && c < weight.in_features;
      const std::int8_t w = has ? weight.values[row * weight.in_features + c] : std::int8_t(0);
      stream[c / 4 * (4 * kDotsRows) + r * 4 + c % 4] = char(w);
      sum += w;
    }
    to.corrections()[r] = kDotsOffset * sum;
  }
}

inline Status pack_dots(const QuantizedWeight& weight, const DotsLayout& layout, void* data, int threads) {
  if (threads > layout.units) threads = layout.units > 0 ? int(layout.units) : 1;
  const std::int64_t kept = kDotsRows * layout.blocks;
  std::uint64_t* const scratch =
      static_cast<std::uint64_t*>(std::malloc(std::size_t(kept * threads + 1) * sizeof(std::uint64_t)));
  if (scratch == nullptr) return Status::out_of_memory;
  for_each_task(layout.units, threads, [&](std::int64_t unit, int thread) {
    if (layout.sparse) {
      pack_twins(weight, layout, data, unit, scratch + kept * thread);
    } else {
      pack_dense(weight, layout, data, unit);
    }
  });
  std::free(scratch);
  return Status::ok;
}

}  // namespace madtp::cpu::MADTP_ISA
