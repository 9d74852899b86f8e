// SPDX-License-Identifier: Apache-2.0
#pragma once

// The form of a 2:4 weight for many rows of x, where 64 columns can be picked from. Its rows are paired into
// twins, one in the lanes of set 0 and one in those of set 1 of a unit. Where all twins have 4 columns in
// common, a step is shared: one vector of columns and one of weights for each set, so that one pick serves
// two products. A step has bytes of columns in place of two bits, and 4 weights of each row; in a block the
// shared steps come first, then those of the two sets in turn:
//
//   shared  {columns, weights of set 0, weights of set 1}
//   own     {columns, weights of set 0, columns, weights of set 1}
//
// The blocks of a unit are sorted by how many steps they share, so that the kernel's branches are foreseen;
// sums of integers do not depend on the order. After the corrections a unit has the place of every row among
// the lanes, and a word for every block: its number, and above 16 bits how many steps it shares.

#include <cstdlib>

#include "cpu/kernels/quantized_dots_layout.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kTwinsRows = 2 * kWidth;         // of a unit
constexpr int kTwinsSteps = kDotsColumns / 8;  // of a row in a block
constexpr int kSharedBytes = 3 * sizeof(IntVec), kOwnBytes = 4 * sizeof(IntVec);

inline std::int32_t* twins_lanes(const DotsUnit& unit) { return unit.corrections + kTwinsRows; }
inline std::uint32_t* twins_blocks(const DotsUnit& unit) {
  return reinterpret_cast<std::uint32_t*>(twins_lanes(unit) + kTwinsRows);
}

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
// columns in common; then rows are swapped as long as blocks share more steps.
class TwinOrder {
 public:
  TwinOrder(const std::uint64_t* kept, std::int64_t blocks) : kept_(kept), blocks_(blocks) {
    pair_greedily();
    improve();
  }
  int order[kTwinsRows];

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
    std::int64_t common[kTwinsRows][kTwinsRows];
    for (int a = 0; a < kTwinsRows; ++a) {
      for (int b = 0; b < a; ++b) {
        common[a][b] = 0;
        for (std::int64_t block = 0; block < blocks_; ++block) common[a][b] += count_common(a, b, block);
      }
    }
    bool taken[kTwinsRows] = {};
    for (int lane = 0; lane < kWidth; ++lane) {
      int best_a = -1, best_b = -1;
      for (int a = 0; a < kTwinsRows; ++a) {
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
      return int((state >> 8) % kTwinsRows);
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

  const std::uint64_t* kept_;  // (kTwinsRows, blocks)
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
  return steps == kTwinsSteps ? steps : steps > 4 ? 4 : steps < 2 ? 0 : steps;
}

// kept: scratch (kTwinsRows, blocks)
inline void pack_twins(const QuantizedWeight& weight, const DotsLayout& layout, void* data, std::int64_t unit,
                       std::uint64_t* kept) {
  const DotsUnit to(layout, data, unit);
  std::int32_t* const lanes = twins_lanes(to);
  const std::int64_t first = unit * kTwinsRows;
  std::int8_t rows[kTwinsRows][kDotsColumns];
  for (int r = 0; r < kTwinsRows; ++r) {
    std::int32_t sum = 0;
    for (std::int64_t block = 0; block < layout.blocks; ++block) {
      kept[r * layout.blocks + block] = detail::expand_block(weight, first + r, block, rows[0]);
      for (std::int8_t w : rows[0]) sum += w;
    }
    to.corrections[r] = kDotsOffset * sum;
  }
  const detail::TwinOrder twins(kept, layout.blocks);
  for (int lane = 0; lane < kTwinsRows; ++lane) lanes[twins.order[lane]] = lane;
  char* at = to.stream;
  std::uint32_t* words = twins_blocks(to);
  for (int shared = kTwinsSteps; shared >= 0; --shared) {
    for (std::int64_t block = 0; block < layout.blocks; ++block) {
      if (shared_steps(twins.fewest_common(block)) != shared) continue;
      *words++ = std::uint32_t(block) | std::uint32_t(shared) << 16;
      for (int r = 0; r < kTwinsRows; ++r) detail::expand_block(weight, first + r, block, rows[r]);
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
      at = own + (kTwinsSteps - shared) * kOwnBytes;
    }
  }
}

inline Status pack_twins(const QuantizedWeight& weight, const DotsLayout& layout, void* data, int threads) {
  if (threads > layout.units) threads = layout.units > 0 ? int(layout.units) : 1;
  const std::int64_t kept = kTwinsRows * layout.blocks;
  std::uint64_t* const scratch =
      static_cast<std::uint64_t*>(std::malloc(std::size_t(kept * threads + 1) * sizeof(std::uint64_t)));
  if (scratch == nullptr) return Status::out_of_memory;
  for_each_task(layout.units, threads, [&](std::int64_t unit, int thread) {
    pack_twins(weight, layout, data, unit, scratch + kept * thread);
  });
  std::free(scratch);
  return Status::ok;
}

// x of a tile is (blocks, T, kDotsColumns).
template <int T>
inline __attribute__((always_inline)) void add_own_step(const char* x, const char* step, IntVec (&sums)[T]) {
  const IntVec columns = load_bytes(step), weights = load_bytes(step + sizeof(IntVec));
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) add_picked(x + t * kDotsColumns, columns, weights, sums[t]);
}

template <int T>
inline __attribute__((always_inline)) void add_shared_step(const char* x, const char* step,
                                                           IntVec (&sums0)[T], IntVec (&sums1)[T]) {
  const IntVec columns = load_bytes(step), weights0 = load_bytes(step + sizeof(IntVec)),
               weights1 = load_bytes(step + 2 * sizeof(IntVec));
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
    add_picked(x + t * kDotsColumns, columns, weights0, weights1, sums0[t], sums1[t]);
}

// The blocks that share Shared steps, from the one at `words` on.
template <int T, int Shared>
inline __attribute__((always_inline)) void add_blocks(const char* x, std::int64_t blocks,
                                                      const std::uint32_t*& words, const std::uint32_t* end,
                                                      const char*& stream, IntVec (&sums0)[T],
                                                      IntVec (&sums1)[T]) {
  constexpr int kBytes = Shared * kSharedBytes + (kTwinsSteps - Shared) * kOwnBytes, kAhead = 2048;
  for (; words < end && (Shared == 0 || *words >> 16 == Shared); ++words, stream += kBytes) {
    const std::int64_t block = *words & 0xffff;
    const char* at = x + (block < blocks ? block : 0) * (T * kDotsColumns);
    asm("" : "+r"(at));  // one register, not one for every token
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(stream + kAhead + i);
#pragma GCC unroll 8
    for (int s = 0; s < Shared; ++s) add_shared_step<T>(at, stream + s * kSharedBytes, sums0, sums1);
#pragma GCC unroll 8
    for (int s = 0; s < kTwinsSteps - Shared; ++s) {
      const char* const own = stream + Shared * kSharedBytes + s * kOwnBytes;
      add_own_step<T>(at, own, sums0);
      add_own_step<T>(at, own + kOwnBytes / 2, sums1);
    }
  }
}

// x (blocks, T, kDotsColumns) -> sums int32 (T, kTwinsRows), corrected.
template <int T>
__attribute__((noinline)) void multiply_twins(const char* x, const DotsUnit& unit, std::int64_t blocks,
                                              std::int32_t* sums) {
  IntVec sums0[T], sums1[T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) sums0[t] = sums1[t] = IntVec{};
  const char* stream = unit.stream;
  const std::uint32_t* words = twins_blocks(unit);
  const std::uint32_t* const end = words + blocks;
  add_blocks<T, kTwinsSteps>(x, blocks, words, end, stream, sums0, sums1);
  add_blocks<T, 4>(x, blocks, words, end, stream, sums0, sums1);
  add_blocks<T, 3>(x, blocks, words, end, stream, sums0, sums1);
  add_blocks<T, 2>(x, blocks, words, end, stream, sums0, sums1);
  add_blocks<T, 0>(x, blocks, words, end, stream, sums0, sums1);
  const std::int32_t* const lanes = twins_lanes(unit);
  const IntVec from0 = load_ints(lanes), from1 = load_ints(lanes + kWidth),
               corrections0 = load_ints(unit.corrections),
               corrections1 = load_ints(unit.corrections + kWidth);
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    store(sums + t * kTwinsRows, pick_lanes(sums0[t], sums1[t], from0) - corrections0);
    store(sums + t * kTwinsRows + kWidth, pick_lanes(sums0[t], sums1[t], from1) - corrections1);
  }
}

}  // namespace madtp::cpu::MADTP_ISA
