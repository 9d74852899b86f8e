// SPDX-License-Identifier: Apache-2.0
#pragma once

// sparse24_linear and quantized_linear on sm_90a: wgmma.sp with the weight in registers and x, through TMA,
// in shared memory. Elements have 16 bits, or 8: then a step has twice the input features, and the same
// clocks.
//
// A block computes tiles of 128 output features x kTokens with two consumer warpgroups, and a producer warp
// that copies x for them. Either each warpgroup has 64 output features of every tile; or, where there are
// more tiles of 128 tokens than run at once, they take turns: each has all of every other tile, and one
// multiplies while the other writes. There are tiles of 256 output features, which read x less often, and for
// few tokens of 64, for one warpgroup.
//
// Blocks stay for as many tiles as there are, and 2 or 4 of a cluster share the tokens of a tile: each copies
// its part of x into all of them. A lane reads its fragments of the weight from L2, in the order in which
// they lie, some steps of 64 input features ahead: shared memory has no room for them, since reading x alone
// takes it as long as the product takes the tensor cores. What a step costs a multiprocessor of an H100, in
// clocks:
//
//   wgmma.sp        2 N                     64 x N x 32 in N / 2, of 128 output features, twice
//   shared memory   3 N                     x read for either half, and written once, 128 bytes a clock
//   L2              (128 N / c + 9216) / 32 x shared by a cluster of c, and the weight; 32 bytes a clock
//
// A weight in shared memory would add 72 clocks of reads and as many of writes. model_sm90.h counts this and
// the rest, and chooses.
//
// A sum runs over the input features in ascending order, whatever the tile and the cluster: a row has the
// same bits whatever the other rows and the configuration are. No block shares the input features of a tile,
// since their sums would then follow the number of rows (docs/gpu-model.md says what that costs).

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/epilogue_sm90.cuh"
#include "cuda/sparse24/layout.cuh"
#include "cuda/sparse24/model_sm90.h"
#include "cuda/sparse24/operand.cuh"
#include "cuda/tensor_map.h"

namespace madtp::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kRowBytes = 128;  // of x, in a stage
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;

// kInTurn: each warpgroup has tiles of its own; else each has a part of the output features of every tile.
template <int kTokens_, int kStages_, int kAhead_, bool kInTurn_, int kConsumers_, int kHalves_>
struct Tile {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups that multiply; one more has the producer
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kHalves = kHalves_;  // of 64 output features, that a warpgroup computes
  static constexpr int kFeatures = (kInTurn_ ? 1 : kConsumers) * kHalves * kTileFeatures;
  static constexpr int kAhead = kAhead_;  // steps whose weight is in registers
  static constexpr bool kInTurn = kInTurn_;
  static constexpr int kSums = kTokens / 2;  // of a half, that a thread holds
  static constexpr int kStageBytes = kTokens * kRowBytes;
  static_assert(kHalves * kSums <= 128 && kAhead >= 2, "what registers hold, and what hides a load");

  struct Shared {
    alignas(1024) unsigned char x[kStages][kStageBytes];
    alignas(16) unsigned char staged[kConsumers * kWarpgroupWarps][SlabWriter<Float16, false>::kStagedBytes];
    std::uint64_t full[kStages], empty[kStages], turn[kConsumers];
    int valid_tokens;
  };
};

template <typename T>
struct Params {
  const void* layout;
  int blocks, slabs;  // of a row of x in a stage; of 16 output features
  int feature_groups, token_tiles;
  Output<T> output;

  // Of what a cluster computes at a time.
  __device__ int first_token(int tile, int tokens) const { return tile / feature_groups * tokens; }
  __device__ int feature_group(int tile) const { return tile % feature_groups; }
};

// Where a producer or a consumer is in the ring of stages, and the parity of its turn there.
template <int kStages>
struct PipelineState {
  int stage = 0, parity = 0;
  __device__ void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  // Past `steps` that are another's.
  __device__ void skip(int steps) {
    stage += steps;
    parity ^= stage / kStages % 2;
    stage %= kStages;
  }
};

// Other targets have none of this.
#if defined(MADTP_SIMT) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MADTP_SM90 1
#endif
#ifdef MADTP_SM90

__device__ inline void wait_for(std::uint32_t barrier, int parity) { ptx::mbarrier_wait(barrier, parity); }

// The fragments of a lane for a block of the weight, of elements of X.
template <typename X>
struct Fragments {
  using Block = WeightBlock<sizeof(X)>;
  std::uint32_t values[2][4];
  std::uint32_t metadata[Block::kMetadata];

  __device__ void load(const Block& block, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = __ldg(&block.values[half][lane]);
      values[half][0] = words.x, values[half][1] = words.y, values[half][2] = words.z,
      values[half][3] = words.w;
    }
#pragma unroll
    for (int i = 0; i < Block::kMetadata; ++i) metadata[i] = __ldg(&block.metadata[i][lane]);
  }

  // Adds the products of one half with kTokens tokens, which `x` describes.
  template <int kTokens, int kHalf>
  __device__ void multiply(SumOf<X> (&sums)[kTokens / 2], std::uint64_t x) const {
    if constexpr (sizeof(X) == 1) {
      ptx::wgmma_sp_m64k64<kTokens>(sums, values[kHalf], x, metadata[kHalf], true);
    } else {
      ptx::wgmma_sp_m64k32<X, kTokens, kHalf>(sums, values[kHalf], x, metadata[0], true);
    }
  }
};

// The producer: one thread, which copies x for the whole block.
template <typename Tile, int kCluster, typename T>
__device__ void produce(const Params<T>& p, const ptx::TensorMap& x, typename Tile::Shared& shared,
                        int first_tile, int tiles, int step, int valid_tokens) {
  constexpr int kBlockTokens = Tile::kTokens / kCluster;  // that this block copies, for all of the cluster
  const int rank = kCluster == 1 ? 0 : ptx::cluster_rank();
  PipelineState<Tile::kStages> state;
  for (int tile = first_tile; tile < tiles; tile += step) {
    const int first_token = p.first_token(tile, Tile::kTokens);
    if (first_token >= valid_tokens) continue;
    for (int block = 0; block < p.blocks; ++block) {
      const std::uint32_t full = ptx::shared_address(&shared.full[state.stage]);
      wait_for(ptx::shared_address(&shared.empty[state.stage]), state.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Tile::kStageBytes);
      const std::uint32_t to = ptx::shared_address(shared.x[state.stage]) + rank * kBlockTokens * kRowBytes;
      const int column = block * (kRowBytes / 2), token = first_token + rank * kBlockTokens;
      if constexpr (kCluster == 1) {
        ptx::tma_load_2d(to, &x, column, token, full);
      } else {
        ptx::tma_load_2d_multicast(to, &x, column, token, full, (1u << kCluster) - 1);
      }
      state.advance();
    }
  }
}

// A consumer: a warpgroup that multiplies and writes.
template <typename Tile, int kCluster, typename X, typename T>
class Consumer {
  using Layout = WeightLayout<sizeof(X)>;
  using Sum = SumOf<X>;
  // Beside the sums of two halves there are no registers for the scales of x of so many tokens.
  static constexpr int kTokensAtOnce = kIsQuantized<X> && Tile::kHalves == 2 ? 16 : 32;
  using Writer = SlabWriter<T, kIsQuantized<X>, kTokensAtOnce>;

 public:
  __device__ Consumer(const Params<T>& p, typename Tile::Shared& shared, int warpgroup)
      : p_(p),
        shared_(shared),
        warpgroup_(warpgroup),
        thread_(int(threadIdx.x) % kWarpgroup),
        valid_tokens_(shared.valid_tokens),
        turn_parity_(warpgroup == 0 ? -1 : 0) {}

  __device__ void run(int first_tile, int tiles, int step) {
    constexpr int kTurns = Tile::kInTurn ? Tile::kConsumers : 1;
    if (Tile::kInTurn && warpgroup_ > 0) state_.skip(p_.blocks);
    for (int tile = first_tile + (Tile::kInTurn ? warpgroup_ * step : 0); tile < tiles;
         tile += kTurns * step) {
      const int first_token = p_.first_token(tile, Tile::kTokens);
      first_feature_ = (p_.feature_group(tile) * kCluster + rank()) * Tile::kFeatures;
      if constexpr (!Tile::kInTurn) first_feature_ += warpgroup_ * Tile::kHalves * kTileFeatures;
      if (first_token >= valid_tokens_) {
        clear(first_token);
        continue;
      }
      const int next = tile + step;
      const bool is_last = next >= tiles || p_.first_token(next, Tile::kTokens) >= valid_tokens_;
      Sum sums[Tile::kHalves][Tile::kSums];
      // Here, since the last products read them until the wait.
      Fragments<X> fragments[Tile::kAhead][Tile::kHalves];
      const int last_stage = multiply(sums, fragments, is_last);
      Writer first = writer(first_token, 0);
      first.load(first_token, valid_tokens_);
      ptx::wgmma_wait_group<0>();
      release(last_stage);
      with_activation(p_.output.activation, [&](auto activation) {  // one branch here, not one for each value
        this->template write<decltype(activation)::value>(sums, first, first_token);
      });
      // No stage is used where no token is valid, but then none is used any more.
      if (Tile::kInTurn) state_.skip(p_.blocks);
    }
  }

 private:
  static constexpr int kParts = Tile::kTokens / Writer::kTokens;  // of a half, that are written at a time

  // Issues the products of a tile, of which the last are not waited for, and returns their stage.
  __device__ int multiply(Sum (&sums)[Tile::kHalves][Tile::kSums],
                          Fragments<X> (&fragments)[Tile::kAhead][Tile::kHalves], bool is_last) {
    const int lane = thread_ % kWarp;
    const typename Layout::Block* weight[Tile::kHalves];
    const auto load = [&](int i, int block) {
#pragma unroll
      for (int half = 0; half < Tile::kHalves; ++half) fragments[i][half].load(weight[half][block], lane);
    };
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      // Past the last slab, that slab is read again: what comes of it is not written.
      const int slab =
          min((first_feature_ + half * kTileFeatures) / kSlabRows + thread_ / kWarp, p_.slabs - 1);
      weight[half] = Layout::slab(p_.layout, p_.blocks, slab);
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) sums[half][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i)
      if (i < p_.blocks) load(i, i);
    if (Tile::kInTurn) {
      // A barrier tells phases apart by their parity alone, so the one before must have been seen complete.
      if (turn_parity_ >= 0) wait_for(ptx::shared_address(&shared_.turn[warpgroup_]), turn_parity_);
      turn_parity_ = (turn_parity_ + 1) & 1;
    }

    int before = 0;  // the stage of the step before
#pragma unroll 1
    for (int block = 0; block < p_.blocks; block += Tile::kAhead) {
#pragma unroll
      for (int i = 0; i < Tile::kAhead; ++i) {
        if (block + i >= p_.blocks) break;
        wait_for(ptx::shared_address(&shared_.full[state_.stage]), state_.parity);
        const std::uint64_t x = ptx::wgmma_descriptor(ptx::shared_address(shared_.x[state_.stage]));
        ptx::wgmma_fence();
#pragma unroll
        for (int half = 0; half < Tile::kHalves; ++half) {
          const Fragments<X>& now = fragments[i][half];
          now.template multiply<Tile::kTokens, 0>(sums[half], x);
          now.template multiply<Tile::kTokens, 1>(sums[half], x + 4);
        }
        ptx::wgmma_commit_group();
        // The step before is over: its stage and its registers are free.
        ptx::wgmma_wait_group<1>();
        if (block + i > 0) {
          release(before);
          const int next = block + i - 1 + Tile::kAhead;
          if (next < p_.blocks) load((i + Tile::kAhead - 1) % Tile::kAhead, next);
        }
        before = state_.stage;
        state_.advance();
      }
    }
    if (Tile::kInTurn && !is_last && thread_ == 0)
      ptx::mbarrier_arrive(ptx::shared_address(&shared_.turn[1 - warpgroup_]));
    return before;
  }

  // Tells every block that copies into this stage that it may.
  __device__ void release(int stage) {
    const std::uint32_t empty = ptx::shared_address(&shared_.empty[stage]);
    if constexpr (kCluster == 1) {
      if (thread_ == 0) ptx::mbarrier_arrive(empty);
    } else {
      if (thread_ < kCluster) ptx::mbarrier_arrive_cluster(empty, thread_);
    }
  }

  __device__ Writer writer(int first_token, int half) const {
    const int warp = thread_ / kWarp;
    return {p_.output, first_token, first_feature_ + half * kTileFeatures + warp * kSlabRows,
            shared_.staged[warpgroup_ * kWarpgroupWarps + warp], thread_ % kWarp};
  }

  // `writer`: of the first half, which has asked for what it needs.
  template <Activation kActivation>
  __device__ void write(const Sum (&sums)[Tile::kHalves][Tile::kSums], Writer writer, int first_token) const {
#pragma unroll 1
    for (int half = 0; half < Tile::kHalves; ++half) {
      if (half > 0) {
        writer = this->writer(first_token, half);
        writer.load(first_token, valid_tokens_);
      }
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        float taken[Writer::kSums];
        take<0>(sums, writer, half * kParts + part, taken);
        writer.template write<kActivation>(taken, first_token + part * Writer::kTokens, valid_tokens_,
                                           part + 1 < kParts);
      }
    }
  }

  // Of part `part`. Sums are in registers, which have no index: kPart is a constant of its own, since of a
  // loop the compiler would put `part` in its place.
  template <int kPart>
  __device__ static void take(const Sum (&sums)[Tile::kHalves][Tile::kSums], const Writer& writer, int part,
                              float (&taken)[Writer::kSums]) {
    if (part == kPart) writer.take(&sums[kPart / kParts][kPart % kParts * Writer::kSums], taken);
    if constexpr (kPart + 1 < Tile::kHalves * kParts) take<kPart + 1>(sums, writer, part, taken);
  }

  __device__ void clear(int first_token) const {
#pragma unroll 1
    for (int half = 0; half < Tile::kHalves; ++half) {
      Writer writer = this->writer(first_token, half);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) writer.clear();
    }
  }

  __device__ static int rank() { return kCluster == 1 ? 0 : ptx::cluster_rank(); }

  const Params<T>& p_;
  typename Tile::Shared& shared_;
  int warpgroup_, thread_, valid_tokens_, first_feature_ = 0;
  PipelineState<Tile::kStages> state_;
  int turn_parity_;  // -1 before the first tile of all, which waits for nobody
};

#endif  // MADTP_SM90

template <typename Tile, int kCluster, typename X, typename T>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    sparse24_linear_sm90_kernel(const __grid_constant__ Params<T> p,
                                const __grid_constant__ ptx::TensorMap x) {
#ifdef MADTP_SM90
  MADTP_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&x);
    const int readers = Tile::kInTurn ? 1 : Tile::kConsumers;  // warpgroups that read a stage
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[stage]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[stage]), kCluster * readers);
    }
    for (std::uint64_t& turn : shared.turn) ptx::mbarrier_init(ptx::shared_address(&turn), 1);
    ptx::fence_mbarrier_init();
    shared.valid_tokens = p.output.valid_tokens();
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }

  const int tiles = p.token_tiles * p.feature_groups;
  const int first = int(blockIdx.x) / kCluster, step = int(gridDim.x) / kCluster;
  constexpr bool kMoves = Tile::kConsumers > 1;  // registers; threads of two warpgroups have enough
  if (warpgroup == Tile::kConsumers) {
    if constexpr (kMoves) ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == Tile::kConsumers * kWarpgroup)
      produce<Tile, kCluster>(p, x, shared, first, tiles, step, shared.valid_tokens);
    __syncwarp();
  } else {
    if constexpr (kMoves) ptx::setmaxnreg_inc<240>();
    Consumer<Tile, kCluster, X, T>(p, shared, warpgroup).run(first, tiles, step);
  }
  if constexpr (kCluster > 1) ptx::cluster_sync();  // others may still copy into this block, and tell it so
#endif
}

using AnyTile = Tile<64, 8, 4, false, 2, 1>;

// body(Tile{}) for every tile there is.
template <typename Body>
void for_each_tile(Body&& body) {
  body(Tile<256, 6, 2, false, 2, 1>{});
  body(Tile<128, 12, 2, false, 2, 2>{});
  body(Tile<128, 12, 2, true, 2, 2>{});
  body(Tile<128, 8, 3, false, 2, 1>{});
  body(AnyTile{});
  body(Tile<64, 12, 8, false, 1, 1>{});
}

template <typename Tile, int kCluster>
LaunchShape launch_shape(std::int64_t clusters) {
  return {clusters * kCluster, Tile::kThreads, int(sizeof(typename Tile::Shared)), kCluster};
}

// The kernels of a family of types.
template <typename Types>
class LinearSm90 {
 public:
  static void configs(const LinearCall& call, const Device& device, const UseConfig& use) {
    if (!is_runnable(call, device)) return;
    for (int tokens : {256, 128, 64}) {
      for (int cluster : {1, 2, 4}) {
        for (int features : {256, 128, 64}) {
          const Sparse24Config config{90, tokens, features, cluster};
          if (model_sm90::is_tile({tokens, cluster, features}) && is_count(Counts(call, config).tiles))
            use(config);
        }
      }
    }
  }

  static Sparse24Config default_config(const LinearCall& call, const Device& device) {
    if (!is_runnable(call, device)) return {};
    // The weight is cold: the other layers of a model have taken its place in L2.
    const model_sm90::Layer layer{call.tokens,     call.out_features,        call.in_features,
                                  call.activation, call.residual != nullptr, true,
                                  Types::kBytes};
    const auto config_of = [](const model_sm90::Schedule& s) {
      return Sparse24Config{90, s.tokens, s.features, s.cluster};
    };
    const model_sm90::Schedule best = model_sm90::fastest(
        layer, gpu_of(device),
        [&](const model_sm90::Schedule& s) { return is_count(Counts(call, config_of(s)).tiles); });
    return best.tokens == 0 ? Sparse24Config{} : config_of(best);
  }

  static Status run(const LinearCall& call, void* out, std::int64_t out_stride, const Sparse24Config& config,
                    const Device& device, void* stream) {
    const bool in_turn =
        model_sm90::is_in_turn({config.tile_tokens, config.cluster, config.tile_out_features},
                               Counts(call, config).tiles, gpu_of(device).clusters(config.cluster));
    Status status = Status::invalid_argument;
    with_kernel(config, in_turn, call.dtype, [&](auto tile, auto cluster, auto x, auto element) {
      status = run_tile<decltype(tile), cluster, decltype(x), decltype(element)>(call, out, out_stride,
                                                                                 config, device, stream);
    });
    return status;
  }

 private:
  struct Counts {
    std::int64_t token_tiles, feature_groups, tiles;
    Counts(const LinearCall& a, const Sparse24Config& config)
        : token_tiles(quotient_up(a.tokens, config.tile_tokens)),
          feature_groups(
              quotient_up(a.out_features, std::int64_t(config.tile_out_features) * config.cluster)),
          tiles(token_tiles * feature_groups) {}
  };

  // use(x, element) with the types of a dtype, of which float32 has no epilogue here.
  template <typename Use>
  static void with_types(DType dtype, Use&& use) {
    Types::with(dtype, [&](auto x, auto element) {
      if constexpr (sizeof element == 2) use(x, element);
    });
  }

  // use(tile, cluster, x, element) with the types of a configuration and a dtype.
  template <typename Use>
  static void with_kernel(const Sparse24Config& config, bool in_turn, DType dtype, Use&& use) {
    for_each_tile([&](auto tile) {
      using Tile = decltype(tile);
      if (config.tile_tokens != Tile::kTokens || config.tile_out_features != Tile::kFeatures ||
          in_turn != Tile::kInTurn)
        return;
      with_types(dtype, [&](auto x, auto element) {
        if (config.cluster == 1) use(tile, std::integral_constant<int, 1>{}, x, element);
        if (config.cluster == 2) use(tile, std::integral_constant<int, 2>{}, x, element);
        if (config.cluster == 4) use(tile, std::integral_constant<int, 4>{}, x, element);
      });
    });
  }

  // How many clusters run at once; asked once of a device.
  template <typename Tile, int kCluster, typename X, typename T>
  static int clusters_at_once(const Device& device) {
    if constexpr (kCluster == 1) return device.multiprocessors;
    static std::array<std::atomic<int>, 64> known{};  // by device; of those with higher numbers none
    const std::size_t id = std::size_t(device.id);
    int clusters = id < known.size() ? known[id].load(std::memory_order_relaxed) : 0;
    if (clusters == 0) {
      clusters = resident_clusters(sparse24_linear_sm90_kernel<Tile, kCluster, X, T>,
                                   launch_shape<Tile, kCluster>(1));
      if (clusters == 0) clusters = std::max(device.multiprocessors / kCluster, 1);
      if (id < known.size()) known[id].store(clusters, std::memory_order_relaxed);
    }
    return clusters;
  }

  // What the model wants to know. A multiprocessor has room for one block of any tile.
  static model_sm90::Gpu gpu_of(const Device& device) {
    model_sm90::Gpu gpu{device.multiprocessors};
    with_types(DType::bfloat16, [&](auto x, auto element) {
      gpu.clusters2 = clusters_at_once<AnyTile, 2, decltype(x), decltype(element)>(device);
      gpu.clusters4 = clusters_at_once<AnyTile, 4, decltype(x), decltype(element)>(device);
    });
    return gpu;
  }

  template <typename Tile, int kCluster, typename X, typename T>
  static Status run_tile(const LinearCall& a, void* out, std::int64_t out_stride,
                         const Sparse24Config& config, const Device& device, void* stream) {
    const WeightLayout<Types::kBytes> layout(a.out_features, a.in_features);
    const Counts counts(a, config);
    ptx::TensorMap x;
    const std::int64_t x_stride = a.tokens > 1 ? a.x_stride : a.in_features;  // one row may have any
    constexpr int kElements = 2 / Types::kBytes;  // of what TMA moves: 16 bits, of whatever type
    const Status encoded = encode_matrix(&x, a.x, a.dtype, a.tokens, a.in_features / kElements,
                                         x_stride / kElements, Tile::kTokens / kCluster);
    if (encoded != Status::ok) return encoded;
    const Params<T> params{a.layout,
                           int(layout.blocks),
                           int(layout.slabs),
                           int(counts.feature_groups),
                           int(counts.token_tiles),
                           output_of<T>(a, out, out_stride)};
    const std::int64_t clusters =
        std::min<std::int64_t>(counts.tiles, clusters_at_once<Tile, kCluster, X, T>(device));
    return launch(sparse24_linear_sm90_kernel<Tile, kCluster, X, T>, launch_shape<Tile, kCluster>(clusters),
                  stream, params, x);
  }

  // TMA knows no matrix without columns, and none whose rows overlap.
  static bool is_runnable(const LinearCall& call, const Device& device) {
    return device.specific_code == 90 && call.dtype != DType::float32 && call.in_features > 0 &&
           (call.tokens <= 1 || call.x_stride >= call.in_features);
  }
};

template <typename Types>
constexpr LinearArchitecture kArchitectureSm90{90, LinearSm90<Types>::configs,
                                               LinearSm90<Types>::default_config, LinearSm90<Types>::run};

}  // namespace
}  // namespace madtp::cuda
