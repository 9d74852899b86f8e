// SPDX-License-Identifier: Apache-2.0
#pragma once

// TokenSelection: what its host side must obey, and what its device side means. Nothing on the device is
// trusted: a row or a sequence that does not exist reads as none.

#include <cstdint>

#include "madtp/tokens.h"
#include "sizes.h"

namespace madtp::cuda {

constexpr std::int64_t kNone = -1;

// --- host

inline bool is_present(const void* data, std::int64_t rows, std::int64_t columns = 1) {
  return data != nullptr || rows == 0 || columns == 0;
}

// Counts fit int32; padding_row then names no sequence.
inline bool is_valid(const TokenSelection& s) {
  return is_count(s.tokens) && is_count(s.capacity) && is_count(s.batch) && is_present(s.keep, s.tokens) &&
         is_present(s.source, s.capacity) && is_present(s.merge_weight, s.tokens) &&
         s.cu_seqlens_in != nullptr && s.cu_seqlens_out != nullptr;
}

inline bool is_matrix(const void* data, DType dtype, std::int64_t rows, std::int64_t channels,
                      std::int64_t stride) {
  return size_of(dtype) != 0 && is_count(channels) &&
         is_addressable(rows, channels, stride, size_of(dtype)) && is_present(data, rows, channels);
}

inline bool is_matrix(const void* data, DType dtype, std::int64_t rows, std::int64_t channels) {
  return is_matrix(data, dtype, rows, channels, channels);
}

// How many sequences get blocks of their own for the merged row, `slices` each, ahead of the blocks of the
// rows: all, but for a batch beyond what a grid can count.
inline std::int64_t early_sequences(const TokenSelection& s, std::int64_t slices) {
  return s.batch <= (std::int64_t{1} << 30) / slices ? s.batch : 0;
}

// --- device

// Input rows [begin, end) of sequence b.
struct Span {
  std::int64_t begin, end;
};

__device__ inline Span span_of(const TokenSelection& s, std::int64_t b) {
  const auto within = [&](std::int64_t row, std::int64_t least) {
    return row < least ? least : row > s.tokens ? s.tokens : row;
  };
  const std::int64_t begin = within(s.cu_seqlens_in[b], 0);
  return {begin, within(s.cu_seqlens_in[b + 1], begin)};
}

// The output row of the merged token of sequence b: its last row, if `source` agrees.
__device__ inline std::int64_t merged_row(const TokenSelection& s, std::int64_t b) {
  const std::int64_t row = std::int64_t{s.cu_seqlens_out[b + 1]} - 1;
  return row >= 0 && row < s.capacity && s.source[row] == -(b + 1) ? row : kNone;
}

// What an output row holds: input row `kept`, the merged token of `sequence`, or (neither) zeros.
struct Origin {
  std::int64_t kept, sequence;
};

__device__ inline Origin origin_of(const TokenSelection& s, std::int64_t row) {
  const std::int64_t source = s.source[row], sequence = -(source + 1);
  return {source >= 0 && source < s.tokens ? source : kNone,
          source < 0 && sequence < s.batch ? sequence : kNone};
}

// The sequence whose merged row no early block writes to output row `row`, so that the block of the row must:
// one past the early sequences, or one named by a row that is not its last (never by select_tokens).
__device__ inline std::int64_t late_sequence(const TokenSelection& s, const Origin& origin, std::int64_t row,
                                             std::int64_t early) {
  const bool is_early = origin.sequence < early && merged_row(s, origin.sequence) == row;
  return is_early ? kNone : origin.sequence;
}

// The sequence of an input row: the last one that begins at or before it, if it reaches that far.
__device__ inline std::int64_t sequence_of(const TokenSelection& s, std::int64_t row) {
  std::int64_t low = 0, high = s.batch;  // cu_seqlens_in[b] <= row below low, > row from high on
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (s.cu_seqlens_in[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const std::int64_t b = low - 1;
  return b >= 0 && s.cu_seqlens_in[b] <= row && row < s.cu_seqlens_in[b + 1] ? b : kNone;
}

}  // namespace madtp::cuda
