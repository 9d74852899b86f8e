// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a call of linear_sm90.cu should take, by counting, and what a dense layer should take beside it. It
// chooses configurations, and `python -m benchmarks.aot_cuda` prints it. Plain C++: it runs where no GPU is.
// docs/gpu-model.md has the formula in words, and the source of every constant.

#include <algorithm>
#include <cstdint>

#include "madtp/sparse24.h"
#include "sizes.h"

namespace madtp::cuda::model_sm90 {

// --- the device: an H100 SXM. What is said to be a guess there is marked so here.

struct Gpu {
  int multiprocessors = 132;
  int clusters2 = 66, clusters4 = 32;  // that run at once, of 2 and of 4 blocks

  int clusters(int blocks) const {
    return blocks == 1 ? multiprocessors : blocks == 2 ? clusters2 : clusters4;
  }
};

constexpr double kClocksPerUs = 1755;
constexpr double kDenseMacs = 2048;    // of a multiprocessor and clock, of 16-bit types
constexpr double kSharedBytes = 128;   // of a multiprocessor and clock
constexpr double kL2Bytes = 32 * 132;  // of all multiprocessors and clock
constexpr double kL2BytesOfOne = 64;   // of one
constexpr double kL2Capacity = 40e6;   // of 50 MB, guess: what a layer finds of the one before
constexpr double kHbmBytes = 0.9 * 3.35e6 / kClocksPerUs;  // per clock; 0.9 is a guess
constexpr double kIssue = 128;   // instructions of a lane, of a multiprocessor and clock
constexpr double kSpecial = 16;  // rcp and ex2, likewise
constexpr double kIssueOfTwo = 0.75, kIssueOfOne = 0.5;  // of that, by two warps or one a scheduler: guesses
constexpr double kEnds = 1000;                           // the other ends of a tile, clocks: a guess
constexpr double kL2Latency = 300, kHbmLatency = 800;    // clocks; of a load that waits for others: guesses
constexpr double kLaunch = 1.2 * kClocksPerUs;           // from kernel to kernel, or memset: a guess
constexpr double kDenseRate = 0.8;                       // of the peak that a dense loop reaches: a guess

// --- the call

struct Layer {
  std::int64_t rows, out_features, in_features;
  Activation activation = Activation::none;
  bool has_residual = false;
  bool is_cold = false;  // whether the weight comes from HBM; else from L2
  int bytes = 2;         // of an element of x and the weight; the output and the residual have 16 bits
};

struct Schedule {
  int tokens, cluster, features = 128;
};

inline bool is_tile(const Schedule& s) {
  return s.features == 128 || (s.features == 64 && s.tokens == 64) || (s.features == 256 && s.tokens == 128);
}

// Warpgroups share a tile; one of 64 output features has one warpgroup. Tiles of 128 tokens by 128 output
// features are each one warpgroup's, and the two take turns, where there are more of them than run at once.
inline bool is_in_turn(const Schedule& s, std::int64_t tiles, int clusters) {
  return s.tokens == 128 && s.features == 128 && tiles > clusters;
}

// Of one value from the accumulator to the output, bias and scale included, as compiled: what
// tests/kernels/test_cuda_sass.py holds.
inline double instructions(const Layer& layer, bool has_two_halves) {
  // Quantised, the conversion of the sum, which counts twice, both scales, and no FMA; of two halves, tokens
  // come 16 at a time.
  const double quantized = layer.bytes == 2 ? 0 : has_two_halves ? 15 : 7;
  const double more = quantized + (layer.has_residual ? 2.5 : 0);
  switch (layer.activation) {
    case Activation::gelu:
      return 22 + more;
    case Activation::gelu_tanh:
      return 15 + more;
    case Activation::quick_gelu:
      return 13 + more;
    case Activation::relu:
      return 10 + more;
    default:
      return 8 + more;
  }
}

inline double specials(Activation activation) {
  return activation == Activation::none || activation == Activation::relu ? 0 : 2;
}

constexpr int kRowBytes = 128;  // of x, that a step takes

inline int step_of(int bytes) { return kRowBytes / bytes; }  // input features
// Of a 2:4 weight, of an output feature and a step: half of the values, and a quarter of a byte of metadata
// for each dense one.
inline double weight_bytes_of(int bytes) { return kRowBytes / 2 + step_of(bytes) / 8; }

inline std::int64_t steps_of(const Layer& layer) {
  return quotient_up(layer.in_features, step_of(layer.bytes));
}

// Multiply-adds of a multiprocessor and clock, dense: twice as many of 8-bit types.
inline double dense_macs(const Layer& layer) { return kDenseMacs * 2 / layer.bytes; }

// Clocks for the bytes that pass through L2 of all of a layer, from HBM those that L2 did not keep.
inline double hbm_clocks(const Layer& layer, double weight_bytes) {
  const double x = double(layer.bytes) * double(layer.rows) * double(layer.in_features);
  const double y = 2.0 * double(layer.rows) * double(layer.out_features) * (layer.has_residual ? 2 : 1);
  const double passing = x + y > kL2Capacity ? x + y : 0;
  return (passing + (layer.is_cold ? weight_bytes : 0)) / kHbmBytes;
}

struct Clocks {
  double tensor, shared, l2, issue, tile, rounds, hbm, total;  // the first five of a work tile
};

inline int steps_ahead(const Schedule& s, bool in_turn) {
  if (s.tokens == 64) return s.features == 64 ? 8 : 4;
  return s.tokens == 128 && s.features == 128 && !in_turn ? 3 : 2;
}

inline Clocks clocks(const Layer& layer, const Schedule& s, const Gpu& gpu) {
  const double n = s.tokens, values = s.features * n;
  const std::int64_t groups = quotient_up(layer.out_features, std::int64_t(s.features) * s.cluster);
  const std::int64_t tiles = quotient_up(layer.rows, s.tokens) * groups;
  const int clusters = gpu.clusters(s.cluster);
  const double active = double(std::min<std::int64_t>(tiles, clusters)) * s.cluster;
  const double l2_rate = std::min(kL2BytesOfOne, kL2Bytes / active);
  const double steps = double(steps_of(layer));

  const bool in_turn = is_in_turn(s, tiles, clusters);

  Clocks c{};
  c.rounds = double(quotient_up(tiles, clusters));
  c.tensor = steps * values * step_of(layer.bytes) / (2 * dense_macs(layer));
  c.shared = steps * (1 + s.features / 64) * (n * kRowBytes) /
             kSharedBytes;  // x, read for 64 features twice, and written once
  c.l2 = steps * (n * kRowBytes / s.cluster + s.features * weight_bytes_of(layer.bytes)) / l2_rate;
  const double latency = steps * (layer.is_cold ? kHbmLatency : kL2Latency) / steps_ahead(s, in_turn);
  const double loop = std::max({c.tensor, c.shared, c.l2, latency});
  const double per_value = instructions(layer, in_turn || s.features == 256);
  const double special = values * specials(layer.activation) / kSpecial;
  const double written = 2 * values * (layer.has_residual ? 2 : 1) / l2_rate;
  c.issue = values * per_value / (kIssue * (s.features == 64 ? kIssueOfOne : kIssueOfTwo));
  c.hbm = hbm_clocks(layer, weight_bytes_of(layer.bytes) / step_of(layer.bytes) * double(layer.out_features) *
                                double(layer.in_features));
  double products;
  if (in_turn) {
    // What both warpgroups share adds up; else each takes its own time, and they take turns.
    const double alone =
        loop + std::max({values * per_value / (kIssue * kIssueOfOne), special, written}) + kEnds;
    const double staged = 4 * values * (layer.has_residual ? 2 : 1) / kSharedBytes;
    c.tile = std::max({c.tensor, c.shared + staged, c.l2 + written, latency, c.issue, special, alone / 2});
    products = (c.rounds - 1) * c.tile + alone;
  } else {
    c.tile = loop + std::max({c.issue, special, written}) + kEnds;
    products = c.rounds * c.tile;
  }
  c.total = kLaunch + std::max(products, c.hbm);
  return c;
}

// The fastest of those that `is_allowed`; the first of equals.
template <typename IsAllowed>
Schedule fastest(const Layer& layer, const Gpu& gpu, IsAllowed&& is_allowed) {
  Schedule best{};
  double fewest = 0;
  for (int tokens : {256, 128, 64}) {
    for (int cluster : {1, 2, 4}) {
      for (int features : {128, 64, 256}) {
        const Schedule s{tokens, cluster, features};
        if (!is_tile(s)) continue;
        if (cluster > 1 && layer.out_features <= std::int64_t(features) * (cluster / 2)) continue;
        if (!is_allowed(s)) continue;
        const double now = clocks(layer, s, gpu).total;
        if (fewest != 0 && now >= fewest) continue;
        best = s;
        fewest = now;
      }
    }
  }
  return best;
}

// --- cuBLASLt: the best of its tiles, its epilogue hidden behind its products; a split writes float32 sums
// and reads them again.

inline double elementwise_clocks(double bytes) {
  return kLaunch + bytes / (bytes > kL2Capacity ? kHbmBytes : kL2Bytes / 2);
}

inline double dense_clocks(const Layer& layer, const Gpu& gpu) {
  double best = 0;
  for (int tile = 0; tile < 16; ++tile) {  // 64, 128, 192 or 256 of both
    const int tile_features = 64 * (1 + tile / 4), tile_rows = 64 * (1 + tile % 4);
    if (tile_features * tile_rows > 256 * 128) continue;  // sums that registers hold
    for (int splits : {1, 2, 3, 4, 6, 8}) {
      if (splits > 1 && steps_of(layer) < 4 * splits) break;
      const double features = tile_features, n = tile_rows;
      const std::int64_t work_tiles =
          quotient_up(layer.out_features, tile_features) * quotient_up(layer.rows, tile_rows) * splits;
      const double active = double(std::min<std::int64_t>(work_tiles, gpu.multiprocessors));
      const double l2_rate = std::min(kL2BytesOfOne, kL2Bytes / active);
      const double steps = double(quotient_up(steps_of(layer), splits));
      const double tensor = steps * features * n * step_of(layer.bytes) / (dense_macs(layer) * kDenseRate);
      const double l2 = steps * (features / 2 + n) * kRowBytes / l2_rate;  // clusters of two share a side
      const double loops =
          double(quotient_up(work_tiles, gpu.multiprocessors)) * std::max(tensor, l2) + kEnds;
      const double weight = double(layer.bytes) * double(layer.out_features) * double(layer.in_features);
      const double sums = 8.0 * double(layer.rows) * double(layer.out_features) * splits;
      const double now =
          kLaunch + std::max(loops, hbm_clocks(layer, weight)) + (splits > 1 ? elementwise_clocks(sums) : 0);
      if (best == 0 || now < best) best = now;
    }
  }
  return best;
}

// The kernel that quantises x, which dense layers of 8-bit types need too: reads 16 bits, writes 8.
inline double quantize_clocks(const Layer& layer) {
  return elementwise_clocks(3 * double(layer.rows) * double(layer.in_features));
}

// A kernel of its own that reads the result and writes it again: GELU, or the sum with a residual.
inline double separate_clocks(const Layer& layer) {
  const double values = double(layer.rows) * double(layer.out_features);
  return elementwise_clocks(2 * values * (layer.has_residual ? 3 : 2));
}

}  // namespace madtp::cuda::model_sm90
