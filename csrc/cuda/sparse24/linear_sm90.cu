// SPDX-License-Identifier: Apache-2.0
// sparse24_linear on sm_90a: wgmma.sp with the weight in registers and x, through TMA, in shared memory.
//
// A block computes 128 output features x kTokens: two consumer warpgroups of 64 output features, and a
// producer warp that copies x for them. Blocks stay for as many work tiles as there are, and 2 or 4 of a
// cluster share the tokens of a tile: each copies its part of x into all of them. A lane reads its fragments
// of the weight from L2, in the order in which they lie, some steps of 64 input features ahead: shared memory
// has no room for them, since reading x alone takes it as long as the product takes the tensor cores. What a
// step costs a multiprocessor of an H100, in clocks:
//
//   wgmma.sp        2 N                     64 x N x 32 in N / 2, of two warpgroups, twice
//   shared memory   3 N                     x read by both warpgroups, and written once, 128 bytes a clock
//   L2              (128 N / c + 9216) / 32 x shared by a cluster of c, and the weight; 32 bytes a clock
//
//   N     wgmma.sp  shared  L2, c = 1    2    4   as dense at 0.7 of its peak
//   256        512     768       1312  800  544   1463
//   128        256     384        800  544  416    731
//    64        128     192        544  416  352    366
//
// So L2 binds, and next to it shared memory; a weight in shared memory would add 72 clocks of reads and as
// many of writes. That, the epilogue, 1000 clocks for the other ends of a tile, and what the last wave leaves
// idle is what `clocks` counts. The epilogue is a matter of issue slots, 128 a clock for 128 N values, so N
// clocks for every instruction that a value takes, and nothing overlaps it. A dense kernel is taken for 4 N
// clocks of wgmma a step, 16384 bytes of weight and the same epilogue. What it expected before anything was
// measured is in docs/performance-notes.md ("sm_90a: predictions").
//
// A sum runs over the input features in ascending order. With split_k > 1 (few tokens) parts of it are added
// in ascending order too, by the block that comes last: a row has the same bits whatever the others hold, but
// they follow the configuration, which follows the number of tokens.

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/epilogue.cuh"
#include "cuda/sparse24/layout.cuh"
#include "cuda/tensor_map.h"

namespace madtp::cuda {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that multiply; one more has the producer
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kFeatures = kConsumers * kTileFeatures;
constexpr int kRowBytes = kBlockColumns * 2;
constexpr int kStagedTokens = 32;  // that the epilogue stages at a time

// The most tokens of a tile whose input features may be split: with more sums no registers are left to add
// parts up in.
constexpr int kSplitTokens = 128;

template <int kTokens_, int kStages_, int kAhead_>
struct Tile {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kAhead = kAhead_;     // steps whose weight is in registers
  static constexpr int kSums = kTokens / 2;  // that a thread holds
  static constexpr int kStageBytes = kTokens * kRowBytes;
  static_assert(kSums <= 128 && kAhead >= 2, "what registers hold, and what hides a load");

  struct Shared {
    alignas(1024) unsigned char x[kStages][kStageBytes];
    alignas(16) float staged[kConsumers][kStagedTokens * kStagedStride];
    std::uint64_t full[kStages], empty[kStages];
    int is_last[kConsumers];
    int valid_tokens;  // read once a tile: a register would be held through the product
  };
};

template <typename T>
struct Params {
  const void* layout;
  int blocks, slabs;  // of 64 input features; of 16 output features
  int feature_groups, token_tiles, splits;
  float* partial;      // (work tiles, kSums, kThreads of the warpgroups), where splits > 1
  unsigned* arrivals;  // (tiles, blocks of the cluster, kConsumers), zeros
  Output<T> output;
};

// What a cluster computes at a time: a tile, or a part of its input features.
struct WorkTile {
  int tile, first_token, feature_group, split, begin, end;  // steps of 64 input features
};

template <typename T>
__device__ WorkTile work_tile_at(const Params<T>& p, int index, int tokens) {
  const int tile = index / p.splits, split = index % p.splits;
  return {tile,
          tile / p.feature_groups * tokens,
          tile % p.feature_groups,
          split,
          int(std::int64_t(p.blocks) * split / p.splits),
          int(std::int64_t(p.blocks) * (split + 1) / p.splits)};
}

// Where a producer or a consumer is in the ring of stages, and the parity of its turn there.
template <int kStages>
struct PipelineState {
  int stage = 0, parity = 0;
  __device__ void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// Other targets have none of this.
#if defined(MADTP_SIMT) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MADTP_SM90 1
#endif
#ifdef MADTP_SM90

__device__ inline void wait_for(std::uint32_t barrier, int parity) { ptx::mbarrier_wait(barrier, parity); }

// The fragments of a lane for 64 input features.
struct Fragments {
  std::uint32_t values[2][4];
  std::uint32_t metadata;

  __device__ void load(const WeightBlock& block, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 words = __ldg(&block.values[half][lane]);
      values[half][0] = words.x, values[half][1] = words.y, values[half][2] = words.z,
      values[half][3] = words.w;
    }
    metadata = __ldg(&block.metadata[lane]);
  }
};

// The producer: one thread, which copies x for the whole block.
template <typename Tile, int kCluster, typename T>
__device__ void produce(const Params<T>& p, const ptx::TensorMap& x, typename Tile::Shared& shared,
                        int first_work_tile, int work_tiles, int step, int valid_tokens) {
  constexpr int kBlockTokens = Tile::kTokens / kCluster;  // that this block copies, for all of the cluster
  const int rank = kCluster == 1 ? 0 : ptx::cluster_rank();
  PipelineState<Tile::kStages> state;
  for (int index = first_work_tile; index < work_tiles; index += step) {
    const WorkTile work = work_tile_at(p, index, Tile::kTokens);
    if (work.first_token >= valid_tokens) continue;
    for (int block = work.begin; block < work.end; ++block) {
      const std::uint32_t full = ptx::shared_address(&shared.full[state.stage]);
      wait_for(ptx::shared_address(&shared.empty[state.stage]), state.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Tile::kStageBytes);
      const std::uint32_t to = ptx::shared_address(shared.x[state.stage]) + rank * kBlockTokens * kRowBytes;
      const int column = block * kBlockColumns, token = work.first_token + rank * kBlockTokens;
      if constexpr (kCluster == 1) {
        ptx::tma_load_2d(to, &x, column, token, full);
      } else {
        ptx::tma_load_2d_multicast(to, &x, column, token, full, (1u << kCluster) - 1);
      }
      state.advance();
    }
  }
}

// A consumer: a warpgroup that multiplies.
template <typename Tile, int kCluster, typename T>
class Consumer {
 public:
  __device__ Consumer(const Params<T>& p, typename Tile::Shared& shared, int warpgroup)
      : p_(p), shared_(shared), warpgroup_(warpgroup), thread_(int(threadIdx.x) % kWarpgroup) {}

  __device__ void run(int first_work_tile, int work_tiles, int step) {
    for (int index = first_work_tile; index < work_tiles; index += step) {
      const WorkTile work = work_tile_at(p_, index, Tile::kTokens);
      first_feature_ = (work.feature_group * kCluster + rank()) * kFeatures + warpgroup_ * kTileFeatures;
      if (work.first_token >= shared_.valid_tokens) {
        if (work.split == 0)
          RowWriter<T>(p_.output, first_feature_, thread_)
              .template clear<kWarpgroup>(work.first_token, Tile::kTokens);
        continue;
      }
      float sums[Tile::kSums];
      multiply(work, sums);
      if constexpr (Tile::kTokens <= kSplitTokens) {
        if (p_.splits > 1 && !reduce(work, sums)) continue;
      }
      write(work.first_token, shared_.valid_tokens, sums);
    }
  }

 private:
  __device__ void multiply(const WorkTile& work, float (&sums)[Tile::kSums]) {
    const int lane = thread_ % kWarp;
    // Past the last slab, that slab is read again: what comes of it is not written.
    const int slab = min(first_feature_ / kSlabRows + thread_ / kWarp, p_.slabs - 1);
    const WeightBlock* const weight = WeightLayout::slab(p_.layout, p_.blocks, slab);
    Fragments fragments[Tile::kAhead];
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i)
      if (work.begin + i < work.end) fragments[i].load(weight[work.begin + i], lane);
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0;

    int before = 0;  // the stage of the step before
#pragma unroll 1
    for (int block = work.begin; block < work.end; block += Tile::kAhead) {
#pragma unroll
      for (int i = 0; i < Tile::kAhead; ++i) {
        if (block + i >= work.end) break;
        wait_for(ptx::shared_address(&shared_.full[state_.stage]), state_.parity);
        const std::uint64_t x = ptx::wgmma_descriptor(ptx::shared_address(shared_.x[state_.stage]));
        const Fragments& now = fragments[i];
        ptx::wgmma_fence();
        ptx::wgmma_sp_m64k32<T, Tile::kTokens, 0>(sums, now.values[0], x, now.metadata, true);
        ptx::wgmma_sp_m64k32<T, Tile::kTokens, 1>(sums, now.values[1], x + 4, now.metadata, true);
        ptx::wgmma_commit_group();
        // The step before is over: its stage and its registers are free.
        ptx::wgmma_wait_group<1>();
        if (block + i > work.begin) {
          release(before);
          const int next = block + i - 1 + Tile::kAhead;
          if (next < work.end) fragments[(i + Tile::kAhead - 1) % Tile::kAhead].load(weight[next], lane);
        }
        before = state_.stage;
        state_.advance();
      }
    }
    ptx::wgmma_wait_group<0>();
    if (work.begin < work.end) release(before);
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

  // Leaves the sums of a part where the block that comes last adds all parts up, in order. Returns whether it
  // is this block, which then has the sums of the whole.
  __device__ bool reduce(const WorkTile& work, float (&sums)[Tile::kSums]) {
    const auto part_of = [&](int split) {
      const std::int64_t part = (std::int64_t(work.tile) * p_.splits + split) * kCluster + rank();
      return reinterpret_cast<float4*>(p_.partial) +
             (part * kConsumers + warpgroup_) * (Tile::kSums / 4) * kWarpgroup + thread_;
    };
    float4* const mine = part_of(work.split);
#pragma unroll
    for (int i = 0; i < Tile::kSums; i += 4)
      mine[i / 4 * kWarpgroup] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    __threadfence();
    sync();
    if (thread_ == 0) {
      unsigned* const arrivals =
          p_.arrivals + (std::int64_t(work.tile) * kCluster + rank()) * kConsumers + warpgroup_;
      const bool is_last = atomicAdd(arrivals, 1u) == unsigned(p_.splits) - 1;
      if (is_last) *arrivals = 0;
      __threadfence();
      shared_.is_last[warpgroup_] = is_last;
    }
    sync();
    if (shared_.is_last[warpgroup_] == 0) return false;
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0;
#pragma unroll 1
    for (int split = 0; split < p_.splits; ++split) {
      const float4* const from = part_of(split);
#pragma unroll
      for (int i = 0; i < Tile::kSums; i += 4) {
        const float4 four = __ldcg(from + i / 4 * kWarpgroup);
        sums[i] += four.x, sums[i + 1] += four.y, sums[i + 2] += four.z, sums[i + 3] += four.w;
      }
    }
    return true;
  }

  __device__ void write(int first_token, int valid_tokens, const float (&sums)[Tile::kSums]) {
    const RowWriter<T> writer(p_.output, first_feature_, thread_);
    float* const staged = shared_.staged[warpgroup_];
#pragma unroll 1
    for (int token = 0; token < Tile::kTokens && first_token + token < p_.output.tokens;
         token += kStagedTokens) {
      sync();  // the tokens staged before were read
#pragma unroll
      for (int first = 0; first < Tile::kTokens; first += kStagedTokens) {
        if (first != token) continue;  // sums are in registers, which have no index
#pragma unroll
        for (int group = 0; group < kStagedTokens / 8; ++group)
          stage(staged, thread_ / kWarp, group, &sums[(first / 8 + group) * 4], thread_ % kWarp);
      }
      sync();
      writer.template write<kWarpgroup>(staged, first_token + token, kStagedTokens, valid_tokens);
    }
  }

  __device__ void sync() const { ptx::barrier_sync(1 + warpgroup_, kWarpgroup); }
  __device__ static int rank() { return kCluster == 1 ? 0 : ptx::cluster_rank(); }

  const Params<T>& p_;
  typename Tile::Shared& shared_;
  int warpgroup_, thread_, first_feature_ = 0;
  PipelineState<Tile::kStages> state_;
};

#endif  // MADTP_SM90

template <typename Tile, int kCluster, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sparse24_linear_sm90_kernel(const __grid_constant__ Params<T> p,
                                const __grid_constant__ ptx::TensorMap x) {
#ifdef MADTP_SM90
  MADTP_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&x);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[stage]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[stage]), kCluster * kConsumers);
    }
    ptx::fence_mbarrier_init();
    shared.valid_tokens = p.output.valid_tokens();
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }

  const int work_tiles = p.token_tiles * p.feature_groups * p.splits;
  const int first = int(blockIdx.x) / kCluster, step = int(gridDim.x) / kCluster;
  if (warpgroup == kConsumers) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == kConsumers * kWarpgroup)
      produce<Tile, kCluster>(p, x, shared, first, work_tiles, step, shared.valid_tokens);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<232>();
    Consumer<Tile, kCluster, T>(p, shared, warpgroup).run(first, work_tiles, step);
  }
  if constexpr (kCluster > 1) ptx::cluster_sync();  // others may still copy into this block, and tell it so
#endif
}

// body(Tile{}) for every tile there is.
template <typename Body>
void for_each_tile(Body&& body) {
  body(Tile<256, 6, 2>{});
  body(Tile<128, 8, 3>{});
  body(Tile<64, 8, 4>{});
}

template <typename Tile, int kCluster>
LaunchShape launch_shape(std::int64_t clusters) {
  return {clusters * kCluster, kThreads, int(sizeof(typename Tile::Shared)), kCluster};
}

// How many clusters run at once; asked once of a device.
template <typename Tile, int kCluster, typename T>
int clusters_at_once(const Device& device) {
  if constexpr (kCluster == 1) return device.multiprocessors;
  static std::array<std::atomic<int>, 64> known{};  // by device; of those with higher numbers none
  const std::size_t id = std::size_t(device.id);
  int clusters = id < known.size() ? known[id].load(std::memory_order_relaxed) : 0;
  if (clusters == 0) {
    clusters =
        resident_clusters(sparse24_linear_sm90_kernel<Tile, kCluster, T>, launch_shape<Tile, kCluster>(1));
    if (clusters == 0) clusters = std::max(device.multiprocessors / kCluster, 1);
    if (id < known.size()) known[id].store(clusters, std::memory_order_relaxed);
  }
  return clusters;
}

// use(tile, cluster, element) with the types of a configuration and a dtype.
template <typename Use>
void with_kernel(const Sparse24Config& config, DType dtype, Use&& use) {
  for_each_tile([&](auto tile) {
    if (config.tile_tokens != decltype(tile)::kTokens) return;
    const auto with_element = [&](auto element) {
      if (config.cluster == 1) use(tile, std::integral_constant<int, 1>{}, element);
      if (config.cluster == 2) use(tile, std::integral_constant<int, 2>{}, element);
      if (config.cluster == 4) use(tile, std::integral_constant<int, 4>{}, element);
    };
    if (dtype == DType::bfloat16) {
      with_element(BFloat16{});
    } else {
      with_element(Float16{});
    }
  });
}

struct Counts {
  std::int64_t token_tiles, feature_groups, work_tiles;
  Counts(const Sparse24Linear& a, const Sparse24Config& config)
      : token_tiles(quotient_up(a.tokens, config.tile_tokens)),
        feature_groups(quotient_up(a.out_features, std::int64_t(kFeatures) * config.cluster)),
        work_tiles(token_tiles * feature_groups * config.split_k) {}
};

// Of one value from the accumulator to the output, residual, bias and scale included, as compiled for sm_90a.
double instructions(Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 29;
    case Activation::gelu_tanh:
      return 22;
    case Activation::quick_gelu:
      return 20;
    case Activation::relu:
      return 18;
    default:
      return 15;
  }
}

// Clocks of a launch by the model above. A part of the input features also writes its sums and reads them
// again.
double clocks(const Sparse24Linear& a, const Sparse24Config& config, const Device& device) {
  const double n = config.tile_tokens;
  const double step = std::max(3 * n, (128 * n / config.cluster + 9216) / 32);
  const double ends = 1000 + n * instructions(a.activation) + (config.split_k > 1 ? 1500 + 16 * n : 0);
  const std::int64_t steps = quotient_up(quotient_up(a.in_features, kBlockColumns), config.split_k);
  std::int64_t clusters = 1;
  with_kernel(config, a.dtype, [&](auto tile, auto cluster, auto element) {
    clusters = clusters_at_once<decltype(tile), cluster, decltype(element)>(device);
  });
  const std::int64_t rounds = quotient_up(Counts(a, config).work_tiles, clusters);
  return double(rounds) * (double(steps) * step + ends);
}

std::int64_t workspace_bytes(const Sparse24Linear& inputs, const Sparse24Config& config) {
  if (config.split_k == 1) return 0;
  const Counts counts(inputs, config);
  const std::int64_t sums = std::int64_t(config.tile_tokens) / 2 * kConsumers * kWarpgroup * sizeof(float);
  return counts.work_tiles * config.cluster * sums + counts.token_tiles * counts.feature_groups *
                                                         config.cluster * kConsumers *
                                                         std::int64_t(sizeof(unsigned));
}

template <typename Tile, int kCluster, typename T>
Status run(const Sparse24Linear& a, void* out, std::int64_t out_stride, const Sparse24Config& config,
           const Device& device, void* workspace, void* stream) {
  const WeightLayout layout(a.out_features, a.in_features);
  const Counts counts(a, config);
  const std::int64_t arrivals = counts.token_tiles * counts.feature_groups * kCluster * kConsumers;
  const std::int64_t partial = workspace_bytes(a, config) - arrivals * std::int64_t(sizeof(unsigned));
  auto* const counters = reinterpret_cast<unsigned*>(static_cast<char*>(workspace) + partial);
  if (config.split_k > 1) {
    const Status cleared = to_status(cudaMemsetAsync(counters, 0, std::size_t(arrivals) * sizeof(unsigned),
                                                     static_cast<cudaStream_t>(stream)));
    if (cleared != Status::ok) return cleared;
  }
  ptx::TensorMap x;
  const std::int64_t x_stride = a.tokens > 1 ? a.x_stride : a.in_features;  // one row may have any
  const Status encoded =
      encode_matrix(&x, a.x, a.dtype, a.tokens, a.in_features, x_stride, Tile::kTokens / kCluster);
  if (encoded != Status::ok) return encoded;
  const Params<T> params{a.layout,
                         int(layout.blocks),
                         int(layout.slabs),
                         int(counts.feature_groups),
                         int(counts.token_tiles),
                         config.split_k,
                         static_cast<float*>(workspace),
                         counters,
                         {static_cast<T*>(out), static_cast<const T*>(a.residual), a.bias, a.scale,
                          out_stride, a.residual_stride, a.num_rows, int(a.tokens), int(a.out_features),
                          a.activation, a.bias_dtype == DType::float32, a.scale_dtype == DType::float32}};
  const std::int64_t clusters =
      std::min<std::int64_t>(counts.work_tiles, clusters_at_once<Tile, kCluster, T>(device));
  return launch(sparse24_linear_sm90_kernel<Tile, kCluster, T>, launch_shape<Tile, kCluster>(clusters),
                stream, params, x);
}

// use(config) for every configuration that can run the inputs on the device.
template <typename Use>
void for_each_config(const Sparse24Linear& inputs, const Device& device, Use&& use) {
  // TMA knows no matrix without columns, and none whose rows overlap.
  const bool has_map =
      inputs.in_features > 0 && (inputs.tokens <= 1 || inputs.x_stride >= inputs.in_features);
  if (device.specific_code != 90 || !has_map) return;
  for (int tokens : {256, 128, 64}) {
    for (int cluster : {1, 2, 4}) {
      for (int splits : {1, 2, 3, 4, 6, 8}) {
        if (splits > 1 && tokens > kSplitTokens) break;
        const Sparse24Config config{90, tokens, kFeatures, splits, cluster};
        if (splits <= quotient_up(inputs.in_features, kBlockColumns) &&
            is_count(Counts(inputs, config).work_tiles))
          use(config);
      }
    }
  }
}

void configs(const Sparse24Linear& inputs, const Device& device, const UseConfig& use) {
  for_each_config(inputs, device, use);
}

Sparse24Config default_config(const Sparse24Linear& inputs, const Device& device) {
  Sparse24Config best{};
  double fewest = 0;
  for_each_config(inputs, device, [&](const Sparse24Config& config) {
    if (config.cluster > 1 && inputs.out_features <= std::int64_t(kFeatures) * (config.cluster / 2)) return;
    if (config.split_k > 1 && inputs.tokens > 2048) return;
    const double now = clocks(inputs, config, device);
    if (best.architecture != 0 && now >= fewest) return;
    best = config;
    fewest = now;
  });
  return best;
}

Status run_config(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                  const Sparse24Config& config, const Device& device, void* workspace, void* stream) {
  Status status = Status::invalid_argument;
  with_kernel(config, inputs.dtype, [&](auto tile, auto cluster, auto element) {
    status = run<decltype(tile), cluster, decltype(element)>(inputs, out, out_stride, config, device,
                                                             workspace, stream);
  });
  return status;
}

}  // namespace

const LinearArchitecture kLinearSm90{90, configs, default_config, workspace_bytes, run_config};

}  // namespace madtp::cuda
