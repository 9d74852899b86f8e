// SPDX-License-Identifier: Apache-2.0
#pragma once

// sparse24_linear and quantized_linear on sm_80 and newer: mma.sp, fed by cp.async.
//
// A block computes kFeatures x kTokens in steps of 64 input features, of 8-bit elements 128, a warp 64 x 64
// of it where the problem is large. Both operands go through a ring of stages in shared memory: x as rows of
// 128 bytes, swizzled for ldmatrix; the weight as it lies in its layout, whose fragments a lane reads with
// one 16-byte load. Fetching fragments straight into registers instead would save nothing that binds: a line
// that misses is written to the same memory at the same width, and read from there by the second warp, and a
// step ahead would cost 36 registers.
//
// What a step costs a multiprocessor, in clocks (F features by T tokens, w warps of a x b fragments), of
// 16-bit elements; one of 8-bit elements has twice the products at twice the rate, and 80 bytes of the weight
// in place of 72:
//   mma.sp          F T / 32            2048 multiply-adds a clock, of which half are skipped zeros
//   shared memory   8 w (a + b) + w a   fragments and metadata read, 128 bytes a clock
//                   + (72 F + 128 T) / 128         and what cp.async writes
//   L2              (72 F + 128 T) / 48 5120 bytes a clock shared by 108 (A100)
//
//   F x T      mma  shared    L2   bytes of a stage
//   256 x 128  1024   1072   725   34816 x 4   one block of 8 warps a multiprocessor
//   128 x 128   512    600   533   25600 x 3   two of 4
//   128 x  64   256    408   363   17408 x 4   two of 4
//    64 x  64   128    300   267   12800 x 4   three of 4
//    32 x  16    16     84    91    4352 x 8   four or more of 2
//
// So shared memory binds the large tiles, at 0.96 and 0.85 of the rate of mma.sp. What `clocks` makes of
// that, before anything was measured, is in docs/performance-notes.md ("sm_80: predictions").
//
// One image is a matter of too few blocks, on 108 multiprocessors, for too many steps. On an H100, should its
// mma.sp have the rate of an A100's, the ratios to dense wgmma are 1.1 to 3.5 and 1.0 to 1.2: the fall-back
// where no sm_90a code was built. HBM binds nothing from some hundred tokens on: output features come fastest
// in the order of blocks, so that a wave reads the whole weight, which stays in L2, and few tokens.
//
// Every sum runs over the input features in ascending order, whatever the tile: a row has the same bits
// whatever the other rows and the configuration are.

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/epilogue.cuh"
#include "cuda/sparse24/layout.cuh"
#include "cuda/sparse24/operand.cuh"

namespace madtp::cuda {
namespace {

constexpr int kChunk = 16;                                       // bytes that one copy takes
constexpr int kRowBytes = 128, kRowChunks = kRowBytes / kChunk;  // of x, in a stage
constexpr int kGroupTokens = 8;                                  // the columns of one mma

// The shape of a block: warps along output features and tokens, and fragments of each warp along both.
template <int kFeatureWarps_, int kTokenWarps, int kSlabs_, int kGroups_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kFeatureWarps = kFeatureWarps_, kSlabs = kSlabs_, kGroups = kGroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, as registers allow
  static constexpr int kWarps = kFeatureWarps * kTokenWarps, kThreads = kWarps * kWarp;
  static constexpr int kFeatures = kFeatureWarps * kSlabs * kSlabRows;
  static constexpr int kTokens = kTokenWarps * kGroups * kGroupTokens;

  template <int kBytes>  // of an element
  struct Stage {
    WeightBlock<kBytes> weight[kFeatures / kSlabRows];
    unsigned char x[kTokens * kRowBytes];
  };
  template <int kBytes>
  static constexpr int kSharedBytes = kStages * int(sizeof(Stage<kBytes>));

  // The epilogue takes the memory of the stages: panels of as many output features as a row writer has.
  static constexpr int kPanel = kFeatures < kTileFeatures ? kFeatures : kTileFeatures;
  static constexpr int kPanelFloats = kTokens * kStride<kPanel>;
  static_assert(kFeatures / kPanel * kPanelFloats * int(sizeof(float)) <= kSharedBytes<2>);
};

template <typename X, typename T>
struct Params {
  const X* x;  // (tokens, in_features)
  std::int64_t x_stride;
  const void* layout;
  int in_features, blocks, slabs, feature_tiles;  // blocks of a row of x in a stage
  Output<T> output;
};

// One thread of those that copy what a tile needs, in steps of a block of the weight.
template <typename Tile, typename X>
class Loader {
  using Layout = WeightLayout<sizeof(X)>;

 public:
  template <typename T>
  __device__ Loader(const Params<X, T>& p, int first_slab, int first_token, int valid_tokens)
      : weight_(reinterpret_cast<const uint4*>(Layout::slab(p.layout, p.blocks, first_slab))),
        in_features_left_(p.in_features - int(threadIdx.x) % kRowChunks * kChunkSize) {
    const int token = int(threadIdx.x) / kRowChunks, chunk = int(threadIdx.x) % kRowChunks;
    tokens_left_ = (valid_tokens - first_token - token + kTokenStep - 1) / kTokenStep;
    x_ = p.x + (first_token + token) * p.x_stride + chunk * kChunkSize;
    x_step_ = kTokenStep * p.x_stride;
    x_offset_ = std::uint32_t((token * kRowChunks + (chunk ^ (token % kGroupTokens))) * kChunk);
#pragma unroll
    for (int n = 0; n < kWeightCopies; ++n) {
      const int i = int(threadIdx.x) + n * kThreads;
      // Past the last slab, that slab is read again: its metadata is valid.
      const int slab = min(i / kBlockChunks, p.slabs - 1 - first_slab);
      weight_chunks_[n] = unsigned(slab) * unsigned(p.blocks) * kBlockChunks + unsigned(i % kBlockChunks);
    }
  }

  // Begins to copy the next input features into a stage. Zeros past the tokens and the input features, where
  // nothing is read.
  __device__ void load(const typename Tile::template Stage<sizeof(X)>& stage) {
    const std::uint32_t weight_to = ptx::shared_address(stage.weight) + threadIdx.x * kChunk;
#pragma unroll
    for (int n = 0; n < kWeightCopies; ++n)
      if (kWeightChunks % kThreads == 0 || int(threadIdx.x) + n * kThreads < kWeightChunks)
        ptx::cp_async_16(weight_to + std::uint32_t(n * kThreads * kChunk), weight_ + weight_chunks_[n]);
    weight_ += kBlockChunks;

    const std::uint32_t x_to = ptx::shared_address(stage.x) + x_offset_;
    const int copies = in_features_left_ > 0 ? tokens_left_ : 0;
    const X* from = x_;
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      ptx::cp_async_16(x_to + std::uint32_t(n * kTokenStep * kRowBytes), from, n < copies ? kChunk : 0);
      from += x_step_;
    }
    x_ += kBlockColumns<sizeof(X)>;
    in_features_left_ -= kBlockColumns<sizeof(X)>;
  }

 private:
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kBlockChunks = int(sizeof(typename Layout::Block)) / kChunk;
  static constexpr int kWeightChunks = Tile::kFeatures / kSlabRows * kBlockChunks;
  static constexpr int kWeightCopies = (kWeightChunks + kThreads - 1) / kThreads;
  static constexpr int kChunkSize = kChunk / int(sizeof(X));
  static constexpr int kTokenStep = kThreads / kRowChunks;  // tokens that are copied at once
  static constexpr int kCopies = Tile::kTokens / kTokenStep;
  static_assert(kTokenStep % kGroupTokens == 0 && Tile::kTokens % kTokenStep == 0);

  const uint4* weight_;
  const X* x_;
  std::int64_t x_step_;
  unsigned weight_chunks_[kWeightCopies];
  int tokens_left_, in_features_left_;  // that this thread has still to copy
  std::uint32_t x_offset_;
};

// Adds half kHalf of the input features of a stage to the sums of a warp. `metadata`: of the half before,
// which has that of both where one word does.
template <typename X, int kHalf, typename Tile>
__device__ void multiply(SumOf<X> (&sums)[Tile::kSlabs][Tile::kGroups][4],
                         const typename Tile::template Stage<sizeof(X)>& stage,
                         std::uint32_t (&metadata)[Tile::kSlabs], int warp_slab, int warp_token, int lane) {
  constexpr int kWords = WeightBlock<sizeof(X)>::kMetadata;
  if constexpr (kHalf < kWords) {
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s) metadata[s] = stage.weight[warp_slab + s].metadata[kHalf][lane];
  }
  std::uint32_t weight[Tile::kSlabs][4];
#pragma unroll
  for (int s = 0; s < Tile::kSlabs; ++s) {
    const uint4 words = stage.weight[warp_slab + s].values[kHalf][lane];
    weight[s][0] = words.x, weight[s][1] = words.y, weight[s][2] = words.z, weight[s][3] = words.w;
  }
  // Lane 8 m + r names row r of the m-th 8 input features.
  const int chunk = (kHalf * (kRowChunks / 2) + lane / 8) ^ (lane % 8);
  const std::uint32_t from =
      ptx::shared_address(stage.x) + std::uint32_t(((warp_token + lane % 8) * kRowChunks + chunk) * kChunk);
#pragma unroll
  for (int j = 0; j < Tile::kGroups; ++j) {
    std::uint32_t x[4];
    ptx::ldmatrix_x4(x, from + std::uint32_t(j * kGroupTokens * kRowBytes));
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
      if constexpr (sizeof(X) == 1) {
        ptx::mma_sp_m16n8k64(sums[s][j], weight[s], x, metadata[s]);
      } else {
        ptx::mma_sp_m16n8k32<X, kHalf>(sums[s][j], weight[s], x, metadata[s]);
      }
  }
}

template <typename Tile, typename X, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    sparse24_linear_sm80_kernel(const __grid_constant__ Params<X, T> p) {
  using Stage = typename Tile::template Stage<sizeof(X)>;
  using Writer = RowWriter<T, kIsQuantized<X>, Tile::kPanel>;
  constexpr int kStages = Tile::kStages, kPanels = Tile::kFeatures / Tile::kPanel;
  MADTP_DYNAMIC_SHARED(shared);
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int warp_slab = warp % Tile::kFeatureWarps * Tile::kSlabs;
  const int warp_token = warp / Tile::kFeatureWarps * Tile::kGroups * kGroupTokens;
  const int first_feature = int(blockIdx.x % unsigned(p.feature_tiles)) * Tile::kFeatures;
  const int first_token = int(blockIdx.x / unsigned(p.feature_tiles)) * Tile::kTokens;

  const int valid_tokens = p.output.valid_tokens();
  if (first_token >= valid_tokens) {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel)
      Writer(p.output, first_feature + panel * Tile::kPanel, thread)
          .template clear<Tile::kThreads>(first_token, Tile::kTokens);
    return;
  }

  Loader<Tile, X> loader(p, first_feature / kSlabRows, first_token, valid_tokens);
  const auto load = [&](int block, int stage) {
    if (block < p.blocks) loader.load(stages[stage]);
    ptx::cp_async_commit_group();  // an empty one too, so that they can be counted
  };
#pragma unroll
  for (int block = 0; block < kStages - 1; ++block) load(block, block);

  SumOf<X> sums[Tile::kSlabs][Tile::kGroups][4] = {};
  int now = 0, free = kStages - 1;  // numbers of stages
#pragma unroll 1
  for (int block = 0; block < p.blocks; ++block) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the stage is there for all, and the one before it was read by all
    load(block + kStages - 1, free);
    const Stage& stage = stages[now];
    free = now;
    now = now + 1 == kStages ? 0 : now + 1;
    std::uint32_t metadata[Tile::kSlabs];
    multiply<X, 0, Tile>(sums, stage, metadata, warp_slab, warp_token, lane);
    multiply<X, 1, Tile>(sums, stage, metadata, warp_slab, warp_token, lane);
  }

  ptx::cp_async_wait_group<0>();
  __syncthreads();
  float* const staged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int s = 0; s < Tile::kSlabs; ++s) {
    constexpr int kPanelSlabs = Tile::kPanel / kSlabRows;
    const int slab = warp_slab + s;
#pragma unroll
    for (int j = 0; j < Tile::kGroups; ++j)
      stage<Tile::kPanel>(staged + slab / kPanelSlabs * Tile::kPanelFloats, slab % kPanelSlabs,
                          warp_token / kGroupTokens + j, sums[s][j], lane);
  }
  __syncthreads();
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel)
    Writer(p.output, first_feature + panel * Tile::kPanel, thread)
        .template write<Tile::kThreads>(staged + panel * Tile::kPanelFloats, first_token, Tile::kTokens,
                                        valid_tokens);
}

// body(Tile{}) for every tile there is, largest first.
template <typename Body>
void for_each_tile(Body&& body) {
  body(Tile<4, 2, 4, 8, 4, 1>{});
  body(Tile<2, 2, 4, 8, 3, 2>{});
  body(Tile<2, 2, 4, 4, 4, 2>{});
  body(Tile<2, 2, 2, 4, 4, 3>{});
  body(Tile<2, 1, 1, 2, 8, 8>{});
}

// The kernels of a family of types.
template <typename Types>
class LinearSm80 {
 public:
  static void configs(const LinearCall& call, const Device& device, const UseConfig& use) {
    for_each_of_types([&](auto tile) {
      if (can_run(tile, call, device)) use(config_of(tile));
    });
  }

  static Sparse24Config default_config(const LinearCall& call, const Device& device) {
    Sparse24Config best{};
    double fewest = 0;
    for_each_of_types([&](auto tile) {
      using Tile = decltype(tile);
      if (!can_run(tile, call, device)) return;
      const double now = clocks<Tile>(call, device);
      if (best.tile_tokens != 0 && now >= fewest) return;
      best = config_of(tile);
      fewest = now;
    });
    return best;
  }

  static Status run(const LinearCall& call, void* out, std::int64_t out_stride, const Sparse24Config& config,
                    const Device&, void* stream) {
    Status status = Status::invalid_argument;
    for_each_of_types([&](auto tile) {
      using Tile = decltype(tile);
      if (config.tile_out_features != Tile::kFeatures || config.tile_tokens != Tile::kTokens) return;
      Types::with(call.dtype, [&](auto x, auto element) {
        status = run_tile<Tile, decltype(x), decltype(element)>(call, out, out_stride, stream);
      });
    });
    return status;
  }

 private:
  static constexpr int kBytes = Types::kBytes;

  template <typename Body>
  static void for_each_of_types(Body&& body) {
    for_each_tile([&](auto tile) {
      if constexpr (Types::template kHasTile<decltype(tile)>) body(tile);
    });
  }

  template <typename Tile>
  static Sparse24Config config_of(Tile) {
    return {80, Tile::kTokens, Tile::kFeatures};
  }

  template <typename Tile>
  static std::int64_t tiles_of(const LinearCall& call) {
    return quotient_up(call.tokens, Tile::kTokens) * quotient_up(call.out_features, Tile::kFeatures);
  }

  // Whether the device has the instruction and the shared memory, and a grid so many blocks.
  template <typename Tile>
  static bool can_run(Tile, const LinearCall& call, const Device& device) {
    return Types::runs_on(device) && Tile::template kSharedBytes<kBytes> <= device.block_shared_bytes &&
           is_count(tiles_of<Tile>(call));
  }

  // Clocks of a launch by the model above. A step cannot be shorter than the latency of a copy divided by the
  // stages under way, whatever else the multiprocessor has to do; each block begins and ends with some more.
  template <typename Tile>
  static double clocks(const LinearCall& call, const Device& device) {
    constexpr int kLatency = 800, kEnds = 2500;
    constexpr int kFragments = Tile::kWarps * (8 * (Tile::kSlabs + Tile::kGroups) + Tile::kSlabs);
    constexpr int kSharedBytes = Tile::template kSharedBytes<kBytes>;
    constexpr double kStageBytes = sizeof(typename Tile::template Stage<kBytes>);
    constexpr double kStep =
        std::max({Tile::kFeatures * Tile::kTokens / 32.0, kFragments + kStageBytes / 128, kStageBytes / 48});
    const std::int64_t each = quotient_up(tiles_of<Tile>(call), device.multiprocessors);
    const int resident = std::min(Tile::kBlocks, device.shared_bytes / kSharedBytes);
    const double rounds = double(quotient_up(each, std::max(resident, 1)));
    const double steps = double(quotient_up(call.in_features, kBlockColumns<kBytes>));
    return std::max(double(each) * steps * kStep, rounds * steps * kLatency / (Tile::kStages - 1)) +
           rounds * kEnds;
  }

  template <typename Tile, typename X, typename T>
  static Status run_tile(const LinearCall& a, void* out, std::int64_t out_stride, void* stream) {
    const WeightLayout<kBytes> layout(a.out_features, a.in_features);
    const std::int64_t feature_tiles = quotient_up(a.out_features, Tile::kFeatures);
    const Params<X, T> params{
        static_cast<const X*>(a.x), a.x_stride,        a.layout,           int(a.in_features),
        int(layout.blocks),         int(layout.slabs), int(feature_tiles), output_of<T>(a, out, out_stride)};
    const LaunchShape shape{tiles_of<Tile>(a), Tile::kThreads, Tile::template kSharedBytes<kBytes>};
    return launch(sparse24_linear_sm80_kernel<Tile, X, T>, shape, stream, params);
  }
};

template <typename Types>
constexpr LinearArchitecture kArchitectureSm80{80, LinearSm80<Types>::configs,
                                               LinearSm80<Types>::default_config, LinearSm80<Types>::run};

}  // namespace
}  // namespace madtp::cuda
