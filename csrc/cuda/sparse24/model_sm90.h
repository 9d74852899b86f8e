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
inline double instructions(Activation activation, bool has_residual) {
  const double residual = has_residual ? 2.5 : 0;
  switch (activation) {
    case Activation::gelu:
      return 22 + residual;
    case Activation::gelu_tanh:
      return 15 + residual;
    case Activation::quick_gelu:
      return 13 + residual;
    case Activation::relu:
      return 10 + residual;
    default:
      return 8 + residual;
  }
}

inline double specials(Activation activation) {
  return activation == Activation::none || activation == Activation::relu ? 0 : 2;
}

constexpr int kStep = 64;               // input features
constexpr double kWeightBytes = 1.125;  // of a value of the dense weight, in 2:4 of a 16-bit type

inline std::int64_t steps_of(std::int64_t in_features) { return quotient_up(in_features, kStep); }

// Clocks for the bytes that pass through L2 of all of a layer, from HBM those that L2 did not keep.
inline double hbm_clocks(const Layer& layer, double weight_bytes) {
  const double x = 2.0 * double(layer.rows) * double(layer.in_features);
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
  const double steps = double(steps_of(layer.in_features));

  const bool in_turn = is_in_turn(s, tiles, clusters);

  Clocks c{};
  c.rounds = double(quotient_up(tiles, clusters));
  c.tensor = steps * values * kStep / (2 * kDenseMacs);
  c.shared = steps * (1 + s.features / 64) * (n * kStep * 2) /
             kSharedBytes;  // x, read for 64 features twice, and written once
  c.l2 = steps * (n * kStep * 2 / s.cluster + s.features * kStep * kWeightBytes) / l2_rate;
  const double latency = steps * (layer.is_cold ? kHbmLatency : kL2Latency) / steps_ahead(s, in_turn);
  const double loop = std::max({c.tensor, c.shared, c.l2, latency});
  const double per_value = instructions(layer.activation, layer.has_residual);
  const double special = values * specials(layer.activation) / kSpecial;
  const double written = 2 * values * (layer.has_residual ? 2 : 1) / l2_rate;
  c.issue = values * per_value / (kIssue * (s.features == 64 ? kIssueOfOne : kIssueOfTwo));
  c.hbm = hbm_clocks(layer, kWeightBytes * double(layer.out_features) * double(layer.in_features));
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
      if (splits > 1 && steps_of(layer.in_features) < 4 * splits) break;
      const double features = tile_features, n = tile_rows;
      const std::int64_t work_tiles =
          quotient_up(layer.out_features, tile_features) * quotient_up(layer.rows, tile_rows) * splits;
      const double active = double(std::min<std::int64_t>(work_tiles, gpu.multiprocessors));
      const double l2_rate = std::min(kL2BytesOfOne, kL2Bytes / active);
      const double steps = double(quotient_up(steps_of(layer.in_features), splits));
      const double tensor = steps * features * n * kStep / (kDenseMacs * kDenseRate);
      const double l2 = steps * (features / 2 + n) * kStep * 2 / l2_rate;  // clusters of two share a side
      const double loops =
          double(quotient_up(work_tiles, gpu.multiprocessors)) * std::max(tensor, l2) + kEnds;
      const double weight = 2.0 * double(layer.out_features) * double(layer.in_features);
      const double sums = 8.0 * double(layer.rows) * double(layer.out_features) * splits;
      const double now =
          kLaunch + std::max(loops, hbm_clocks(layer, weight)) + (splits > 1 ? elementwise_clocks(sums) : 0);
      if (best == 0 || now < best) best = now;
    }
  }
  return best;
}

// A kernel of its own that reads the result and writes it again: GELU, or the sum with a residual.
inline double separate_clocks(const Layer& layer) {
  const double values = double(layer.rows) * double(layer.out_features);
  return elementwise_clocks(2 * values * (layer.has_residual ? 3 : 2));
}

}  // namespace madtp::cuda::model_sm90
