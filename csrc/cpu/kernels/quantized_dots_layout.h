// SPDX-License-Identifier: Apache-2.0
#pragma once

// How an int8 weight lies in memory where one instruction multiplies a vector of bytes of x with one of the
// weight and adds them up by fours, and another picks bytes of x (quantized_dots_vec.h): the lanes are output
// features.
//
// The rows of W are cut into units, its columns into blocks of kDotsColumns, both filled up with zeros. A
// unit ends with the corrections of its rows. Where x comes as unsigned bytes, x + 128, they are 128 times
// the sum of the weights, which is to be subtracted; else zeros.
//
// Dense, units of two vectors of lanes: for every 4 columns the 4 weights of all rows.
//
// 2:4, units of one vector of lanes: for every 8 columns, a step, the 4 weights that each row keeps, first
// the two of one group of columns, then those of the next. Four steps follow the vector of their indices:
// bits 2s and 2s + 1 of byte i of a lane say which column of its group weight i of step s has. That is 0.625
// bytes for a weight of the dense matrix.
//
// Twins, units of two vectors of lanes: 2:4 for many rows of x, where there is such a form
// (quantized_twins.h).

#include <cstdint>

#include "cpu/kernels/quantized_dots_vec.h"
#include "cpu/kernels/threads.h"
#include "madtp/quantized.h"

namespace madtp::cpu::MADTP_ISA {

constexpr int kIndexedSteps = 4;  // that have their indices in one vector
constexpr int kIndexedColumns = 8 * kIndexedSteps;
constexpr int kIndexedBytes = (1 + kIndexedSteps) * int(sizeof(IntVec));
constexpr int kDotsColumns = kPickedColumns > kIndexedColumns ? kPickedColumns : kIndexedColumns;

enum class DotsForm { dense, sparse, twins };

inline DotsForm dots_form(bool sparse, bool many_rows) {
  return !sparse ? DotsForm::dense : many_rows && MADTP_HAS_TWINS ? DotsForm::twins : DotsForm::sparse;
}

struct DotsLayout {
  DotsForm form;
  int unit_rows, tile_tokens;  // their product is that of the accumulators
  std::int64_t units, blocks;

  DotsLayout(std::int64_t out_features, std::int64_t in_features, DotsForm form_)
      : form(in_features > 0 ? form_ : DotsForm::dense),  // no columns: no indices to tell it by
        unit_rows(form == DotsForm::sparse ? kWidth : 2 * kWidth),
        tile_tokens(kDotsSums * kWidth / unit_rows),
        units((out_features + unit_rows - 1) / unit_rows),
        blocks((in_features + kDotsColumns - 1) / kDotsColumns) {}

  std::int64_t columns() const { return blocks * kDotsColumns; }
  // Of twins at most: shared steps leave a part of it empty.
  std::int64_t stream_bytes() const {
    return form == DotsForm::sparse ? columns() / kIndexedColumns * kIndexedBytes : columns() * unit_rows;
  }
  std::int64_t unit_bytes() const {
    const std::int64_t twins = form == DotsForm::twins ? unit_rows * 4 + (blocks * 4 + 63) / 64 * 64 : 0;
    return stream_bytes() + unit_rows * 4 + twins;
  }
  std::int64_t bytes() const { return units * unit_bytes(); }
};

struct DotsUnit {
  char* stream;
  std::int32_t* corrections;

  DotsUnit(const DotsLayout& layout, const void* data, std::int64_t unit)
      : stream(const_cast<char*>(static_cast<const char*>(data)) + unit * layout.unit_bytes()),
        corrections(reinterpret_cast<std::int32_t*>(stream + layout.stream_bytes())) {}
};

// The row of a 2:4 weight that is in this lane.
inline void pack_sparse_row(const QuantizedWeight& weight, const DotsLayout& layout, std::int64_t row,
                            const DotsUnit& to, int lane) {
  std::int32_t sum = 0;
  for (std::int64_t group = 0; group < layout.columns() / 4; ++group) {
    unsigned nibble = 4;  // past the columns of W: zeros
    std::int8_t values[2] = {};
    if (group < weight.in_features / 4) {
      nibble = weight.indices[row * (weight.in_features / 8) + group / 2] >> (group % 2 * 4) & 15;
      __builtin_memcpy(values, weight.values + (row * (weight.in_features / 4) + group) * 2, sizeof values);
    }
    const int step = int(group / 2 % kIndexedSteps);
    char* const indices = to.stream + group / (2 * kIndexedSteps) * kIndexedBytes;
    char* const weights = indices + (1 + step) * int(sizeof(IntVec));
    for (int i = 0; i < 2; ++i) {
      const std::int64_t at = lane * 4 + group % 2 * 2 + i;
      indices[at] = char(unsigned(indices[at]) | (nibble >> (2 * i) & 3) << (2 * step));
      weights[at] = char(values[i]);
      sum += values[i];
    }
  }
  to.corrections[lane] = kDotsOffset * sum;
}

inline void pack_dense_row(const QuantizedWeight& weight, const DotsLayout& layout, std::int64_t row,
                           const DotsUnit& to, int lane) {
  std::int32_t sum = 0;
  for (std::int64_t c = 0; c < weight.in_features; ++c) {
    const std::int8_t w = weight.values[row * weight.in_features + c];
    to.stream[c / 4 * (4 * layout.unit_rows) + lane * 4 + c % 4] = char(w);
    sum += w;
  }
  to.corrections[lane] = kDotsOffset * sum;
}

// Of the first two forms.
inline void pack_dots(const QuantizedWeight& weight, const DotsLayout& layout, void* data, int threads) {
  for_each_task(layout.units, threads, [&](std::int64_t u, int) {
    const DotsUnit unit(layout, data, u);
    __builtin_memset(unit.stream, 0, std::size_t(layout.unit_bytes()));
    for (int lane = 0; lane < layout.unit_rows; ++lane) {
      const std::int64_t row = u * layout.unit_rows + lane;
      if (row >= weight.out_features) break;
      (layout.form == DotsForm::dense ? pack_dense_row : pack_sparse_row)(weight, layout, row, unit, lane);
    }
  });
}

}  // namespace madtp::cpu::MADTP_ISA
