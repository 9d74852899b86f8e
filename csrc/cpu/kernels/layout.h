// SPDX-License-Identifier: Apache-2.0
#pragma once

// How a 2:4 weight, or a dense one of int8, lies in memory for the kernels of one instruction set.
//
// The rows of W (output features) are cut into groups, its columns (input features) into blocks. Within a
// group and a block, rows that keep many of the same columns are paired, and units of a few pairs follow one
// another:
//
//   weights  W[steps][kUnitRows]        step s of a unit's row r multiplies entry entries[s][r] of the panel
//   entries  uint8[steps][kUnitRows]; a dense weight has none, as entry s there is that of step s
//   rows     uint8[kUnitRows]           rows 2p and 2p + 1 are a pair; numbers inside the group
//   shared   uint8[kUnitRows]           in steps shared[2p] <= s < shared[2p + 1] the pair has one entry
//
// A panel of tokens has an entry for every column of the block, a step then is one weight; or, for int8 and
// where the CPU has dot products of bfloat16, one for each of the six pairs that a group of four columns can
// keep, and a step is both its weights, side by side. Of a dense weight every group has two fixed pairs.
//
// A pair's shared entries come first, then those of its own. Only where one instruction can look up a
// section, half a block, are the steps of the first section kept before those of the second: there the own
// entries of the first come before the shared ones, so that these still are one run. A row is always summed
// in the order of its steps, by every kernel: that is why no bit depends on the row count.

#include "cpu/kernels/vec.h"
#include "madtp/dtype.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kUnitRows = kWidth > 8 ? kWidth : 8;
constexpr int kBlock = kWidth == 16 ? 64 : 128;  // a panel of tokens for one block stays in L1
constexpr int kSection = kBlock / 2;             // with AVX-512 what one permute looks up
constexpr bool kLookUp = kWidth == 16;           // there is a kernel that needs that
constexpr int kGroupRows = 256;                  // row numbers are bytes
constexpr int kHeader = 4 * kUnitRows;           // rows and shared, padded

#if defined(__AVX512BF16__)
constexpr bool kHasDots = true;
#else
constexpr bool kHasDots = false;
#endif

// What the layout takes of every 4 columns.
struct StepShape {
  int steps, entries;
  std::size_t weight_bytes, entry_bytes;
};

constexpr StepShape step_of(DType weight_dtype) {
  return kHasDots && weight_dtype == DType::bfloat16 ? StepShape{1, 6, 4, 1}
                                                     : StepShape{2, 4, size_of(weight_dtype), 1};
}
constexpr StepShape kInt8Pairs{1, 6, 2, 1};       // of a 2:4 weight
constexpr StepShape kInt8DensePairs{2, 2, 2, 0};  // columns 0 and 2, then 1 and 3

struct Unit {
  const char* data;
  int steps;
  std::size_t weight_bytes, entry_bytes;

  const void* weights() const { return data; }
  const std::uint8_t* entries() const {
    return reinterpret_cast<const std::uint8_t*>(data) + std::size_t(steps) * kUnitRows * weight_bytes;
  }
  const std::uint8_t* rows() const { return entries() + std::size_t(steps) * kUnitRows * entry_bytes; }
  const std::uint8_t* shared() const { return rows() + kUnitRows; }
  std::int64_t bytes() const { return reinterpret_cast<const char*>(rows()) + kHeader - data; }
  // What to fetch while this unit computes. Units come from far away, in an order of lines that the hardware
  // does not foresee.
  const char* ahead() const { return data + 3 * bytes(); }
};

struct Layout {
  std::int64_t out_features, in_features;
  StepShape step;
  std::int64_t units, groups, blocks;

  Layout(std::int64_t out_features_, std::int64_t in_features_, StepShape step_)
      : out_features(out_features_),
        in_features(in_features_),
        step(step_),
        units((out_features + kUnitRows - 1) / kUnitRows),
        groups(group_count(units)),
        blocks((in_features + kBlock - 1) / kBlock) {}

  // Small layers have two as well, so that two threads can share them.
  static std::int64_t group_count(std::int64_t units) {
    const std::int64_t fewest = (units * kUnitRows + kGroupRows - 1) / kGroupRows;
    return fewest == 1 && units * kUnitRows > kGroupRows / 2 ? 2 : fewest;
  }
  std::int64_t first_unit(std::int64_t group) const { return units * group / groups; }
  std::int64_t first_row(std::int64_t group) const { return first_unit(group) * kUnitRows; }
  std::int64_t unit_count(std::int64_t group) const { return first_unit(group + 1) - first_unit(group); }
  // The rows of a group that W has; its last unit may have rows beyond them, of zeros.
  std::int64_t row_count(std::int64_t group) const {
    const std::int64_t end = first_row(group + 1) < out_features ? first_row(group + 1) : out_features;
    return end - first_row(group);
  }

  int block_columns(std::int64_t block) const {
    const std::int64_t rest = in_features - block * kBlock;
    return int(rest < kBlock ? rest : kBlock);
  }
  int steps(int columns) const { return columns / 4 * step.steps; }
  std::int64_t unit_bytes(int columns) const {
    return std::int64_t(steps(columns)) * kUnitRows * std::int64_t(step.weight_bytes + step.entry_bytes) +
           kHeader;
  }
  std::int64_t row_of_units_bytes() const {  // one unit of every block
    return blocks == 0 ? 0 : (blocks - 1) * unit_bytes(kBlock) + unit_bytes(block_columns(blocks - 1));
  }
  std::int64_t bytes() const { return units * row_of_units_bytes(); }

  // Unit `unit` of a group and a block, in a layout that starts at `data`.
  Unit unit(const void* data, std::int64_t group, std::int64_t block, std::int64_t unit) const {
    const int columns = block_columns(block);
    return {static_cast<const char*>(data) + first_unit(group) * row_of_units_bytes() +
                unit_count(group) * block * unit_bytes(kBlock) + unit * unit_bytes(columns),
            steps(columns), step.weight_bytes, step.entry_bytes};
  }
};

}  // namespace madtp::cpu::MADTP_ISA
