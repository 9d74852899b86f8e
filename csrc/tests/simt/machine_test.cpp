// SPDX-License-Identifier: Apache-2.0
// The simulated machine itself: bugs planted in small kernels, each of which it must report.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/dtype.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::cuda;
using namespace madtp::test;

namespace {

using BF16 = __nv_bfloat16;

// What a launch reports; empty where it is content.
template <typename... Parameters, typename... Arguments>
std::string report(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments... arguments) {
  try {
    EXPECT(launch(kernel, shape, nullptr, arguments...) == Status::ok);
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

bool says(const std::string& message, const char* part) {
  if (message.find(part) != std::string::npos) return true;
  std::printf("reported: '%s'\n", message.c_str());
  return false;
}

// Boxes of `rows` x 64 of a matrix of as many, which is one.
ptx::TensorMap box_map(int rows) {
  static const Guarded<std::uint16_t> x(64 * 64);
  ptx::TensorMap map;
  EXPECT(encode_matrix(&map, x.data(), DType::bfloat16, rows, 64, 64, rows) == Status::ok);
  return map;
}

void reads_in_flight(const float* from, float* out) {
  MADTP_DYNAMIC_SHARED(shared);
  ptx::cp_async_16(ptx::shared_address(shared) + threadIdx.x * 16, from + threadIdx.x * 4);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();  // one too many
  out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x * 4];
  ptx::cp_async_wait_group<0>();
}

void needs_barrier(float* out, bool has_it) {
  MADTP_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1;
  if (has_it) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 32];
}

void copies_bytes(std::uint32_t offset, const float* from, int bytes) {
  MADTP_DYNAMIC_SHARED(shared);
  ptx::cp_async_16(ptx::shared_address(shared) + offset, from, bytes);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
}

void leaves_copy(const float* from) {
  MADTP_DYNAMIC_SHARED(shared);
  ptx::cp_async_16(ptx::shared_address(shared), from);
}

void diverges() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffff, 1);
  }
}
void returns_early() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
void shuffles_half() { __shfl_xor_sync(0xffff, 1, 1); }

void arrives_too_often(bool is_initialised) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t barrier = ptx::shared_address(shared);
  if (is_initialised) ptx::mbarrier_init(barrier, 1);
  ptx::mbarrier_arrive_expect_tx(barrier, 16);
  ptx::mbarrier_arrive(barrier);
}

void expects_wrong_bytes(const ptx::TensorMap map, int bytes) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + 1024;
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(barrier, bytes);
  ptx::tma_load_2d(base, &map, 0, 0, barrier);
  while (!ptx::mbarrier_try_wait(barrier, 0)) {
  }
}

void bad_metadata(std::uint32_t metadata) {
  float d[4] = {};
  const std::uint32_t words[4] = {};
  ptx::mma_sp_m16n8k32<BF16, 0>(d, words, words, metadata);
}

// Of 8-bit elements: int8 sums in int32, e4m3 in float32.
template <typename Sum>
void bad_metadata_of_bytes(std::uint32_t metadata) {
  Sum d[4] = {};
  const std::uint32_t words[4] = {};
  ptx::mma_sp_m16n8k64(d, words, words, threadIdx.x == 7 ? metadata : 0x44444444);  // of row 9, columns 32 on
}

// --- where lanes meet

enum class Collective { barrier, ldmatrix, stmatrix, mma, cluster, shuffle };

void meets_in_two_places(Collective what) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared);
  std::uint32_t r[4] = {};
  float d[4] = {};
  const bool is_even = threadIdx.x % 2 == 0;
  switch (what) {
    case Collective::barrier:
      if (is_even)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Collective::ldmatrix:
      if (is_even)
        ptx::ldmatrix_x4(r, base);
      else
        ptx::ldmatrix_x4(r, base);
      break;
    case Collective::stmatrix:
      if (is_even)
        ptx::stmatrix_x4_trans(base, r);
      else
        ptx::stmatrix_x4_trans(base, r);
      break;
    case Collective::mma:
      if (is_even)
        ptx::mma_sp_m16n8k32<BF16, 0>(d, r, r, 0x44444444);
      else
        ptx::mma_sp_m16n8k32<BF16, 0>(d, r, r, 0x44444444);
      break;
    case Collective::cluster:
      if (is_even)
        ptx::cluster_sync();
      else
        ptx::cluster_sync();
      break;
    case Collective::shuffle:
      if (is_even)
        __shfl_xor_sync(0xffffffff, 1, 1);
      else
        __shfl_xor_sync(0xffffffff, 1, 1);
      break;
  }
}

void warps_meet_in_two_places() {
  if (threadIdx.x < 32)
    ptx::cluster_sync();
  else
    ptx::cluster_sync();
}

void warpgroup_meets_in_two_places(int what) {
  const bool is_first = threadIdx.x < 64;
  switch (what) {
    case 0:
      if (is_first)
        ptx::wgmma_fence();
      else
        ptx::wgmma_fence();
      break;
    case 1:
      if (is_first)
        ptx::wgmma_commit_group();
      else
        ptx::wgmma_commit_group();
      break;
    case 2:
      if (is_first)
        ptx::wgmma_wait_group<0>();
      else
        ptx::wgmma_wait_group<0>();
      break;
    case 3: {
      float d[32] = {};
      const std::uint32_t a[4] = {};
      if (is_first)
        ptx::wgmma_sp_m64k32<BF16, 64, 0>(d, a, 0, 0, false);
      else
        ptx::wgmma_sp_m64k32<BF16, 64, 0>(d, a, 0, 0, false);
      break;
    }
    default:
      if (is_first)
        ptx::setmaxnreg_dec<24>();
      else
        ptx::setmaxnreg_dec<24>();
  }
}

// --- what copies and wgmma see of shared memory

enum class Store { none, unfenced, fenced, in_flight };

// Thread 0 copies a box to where others have stored.
void stores_where_it_copies(Store store, const ptx::TensorMap map) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + 1024;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  if (store == Store::unfenced || store == Store::fenced) shared[threadIdx.x] = 1;
  if (store == Store::fenced) ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
    ptx::tma_load_2d(base, &map, 0, 0, barrier);
    if (store == Store::in_flight) shared[1023] = 1;
  }
  ptx::mbarrier_wait(barrier, 0);
}

enum class Reuse { none, too_early, unawaited, twice };

// A product of what a copy brings; then the copy again, for nobody.
void multiplies_a_copy(Reuse bug, const ptx::TensorMap map) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + 64 * 128;
  const auto copy = [&] {
    if (threadIdx.x != 0) return;
    ptx::mbarrier_arrive_expect_tx(barrier, 64 * 128);
    ptx::tma_load_2d(base, &map, 0, 0, barrier);
  };
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  copy();
  if (bug == Reuse::twice && threadIdx.x == 0) ptx::tma_load_2d(base, &map, 0, 0, barrier);
  if (bug != Reuse::unawaited) ptx::mbarrier_wait(barrier, 0);
  std::uint32_t a[4] = {};
  float d[32] = {};
  ptx::wgmma_fence();
  ptx::wgmma_sp_m64k32<BF16, 64, 0>(d, a, ptx::wgmma_descriptor(base), 0x44444444, false);
  ptx::wgmma_commit_group();
  if (bug != Reuse::too_early) ptx::wgmma_wait_group<0>();
  __syncthreads();
  copy();
  ptx::wgmma_wait_group<0>();
  ptx::mbarrier_wait(barrier, 1);
}

// --- barriers

enum class Init { fenced, fenced_for_copies, unfenced, twice, written_over, unawaited };

void initialises(Init bug, const ptx::TensorMap map) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + 1024;
  ptx::mbarrier_init(barrier, 1);
  if (bug == Init::twice) ptx::mbarrier_init(barrier, 1);
  if (bug == Init::written_over) std::memset(shared + 1024, 0, 4);
  if (bug == Init::fenced || bug == Init::unawaited) ptx::fence_mbarrier_init();
  if (bug == Init::fenced_for_copies) ptx::fence_proxy_async();
  ptx::mbarrier_arrive_expect_tx(barrier, 1024);
  ptx::tma_load_2d(base, &map, 0, 0, barrier);
  if (bug != Init::unawaited) ptx::mbarrier_wait(barrier, 0);
}

enum class Hello { synchronised, unfenced, leaves };

// Block 1 of a pair arrives at the barrier of block 0, which then arrives at that of block 1.
void says_hello(Hello bug) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t barrier = ptx::shared_address(shared);
  const int rank = ptx::cluster_rank();
  ptx::mbarrier_init(barrier, 1);
  if (bug != Hello::unfenced) ptx::cluster_sync();
  if (rank == 1) ptx::mbarrier_arrive_cluster(barrier, 0);
  if (rank == 1 && bug == Hello::leaves) return;
  ptx::mbarrier_wait(barrier, 0);
  if (rank == 0) ptx::mbarrier_arrive_cluster(barrier, 1);
  ptx::cluster_sync();
}

// Block 1 of a pair says that it goes, and block 0 copies into both.
void copies_to_who_left(const ptx::TensorMap map) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), full = base + 1024, left = full + 8;
  ptx::mbarrier_init(full, 1);
  ptx::mbarrier_init(left, 1);
  ptx::fence_mbarrier_init();
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) {
    ptx::mbarrier_arrive_cluster(left, 0);
    return;
  }
  ptx::mbarrier_wait(left, 0);
  ptx::mbarrier_arrive_expect_tx(full, 1024);
  ptx::tma_load_2d_multicast(base, &map, 0, 0, full, 3);
  ptx::mbarrier_wait(full, 0);
}

void counts(int arrivals, int bytes, int times) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t barrier = ptx::shared_address(shared);
  ptx::mbarrier_init(barrier, arrivals);
  for (int i = 0; i < times; ++i) ptx::mbarrier_arrive_expect_tx(barrier, bytes);
}

enum class Phases { seen, unseen, outrun };

// Thread 0 completes the phases of a barrier, which thread 32 waits for; they agree by another barrier.
void completes_phases(Phases bug) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t barrier = ptx::shared_address(shared), back = barrier + 8;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init(back, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (bug == Phases::outrun) ptx::mbarrier_wait(back, 0);  // thread 32 waits by now, or soon
    for (int phase = 0; phase < 4; ++phase) {
      ptx::mbarrier_arrive(barrier);
      if (bug == Phases::seen) ptx::mbarrier_wait(back, phase % 2);
      if (bug == Phases::outrun)
        ptx::mbarrier_wait(barrier, phase % 2);  // its own waits say nothing of others
    }
  } else if (threadIdx.x == 32) {
    if (bug == Phases::outrun) ptx::mbarrier_arrive(back);
    for (int phase = 0; phase < 4; ++phase) {
      ptx::mbarrier_wait(barrier, phase % 2);
      if (bug == Phases::seen) ptx::mbarrier_arrive(back);
    }
  }
}

// --- registers

enum class Registers { moved, too_many, wrong_way_up, wrong_way_down, half };

void moves_registers(Registers bug) {
  if (threadIdx.x >= 256) {  // 168 at the launch
    if (bug == Registers::wrong_way_down)
      ptx::setmaxnreg_dec<232>();
    else if (bug == Registers::half && threadIdx.x % 128 < 64)
      return;
    else
      ptx::setmaxnreg_dec<24>();
  } else if (bug == Registers::too_many) {
    ptx::setmaxnreg_inc<248>();
  } else if (bug == Registers::wrong_way_up) {
    ptx::setmaxnreg_inc<160>();
  } else {
    ptx::setmaxnreg_inc<240>();
  }
}

// --- from block to block

enum class HandOver { atomic, fence, spin };

void hands_over(HandOver how, int* flag) {
  if (how == HandOver::atomic) atomicAdd(flag, 1);
  if (how == HandOver::fence) __threadfence();
  volatile int* const seen = flag;
  if (blockIdx.x == 1) *seen = 1;
  if (blockIdx.x == 0)
    while (*seen == 0) {
    }
}

void reads_of_the_block_before(int* values) { values[blockIdx.x + 1] = values[blockIdx.x] + 1; }

enum class Bug {
  none,
  no_fence,
  touches_sums,
  writes_a,
  no_proxy_fence,
  plain_store,
  no_wait,
  wrong_swizzle,
  apart,
  metadata
};

template <typename X, typename Sum>
void misuses_wgmma(Bug bug, const float* from) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared);
  for (int i = int(threadIdx.x); i < 64 * 8; i += 128) ptx::cp_async_16(base + unsigned(i) * 16, from, 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  if (bug != Bug::no_proxy_fence) ptx::fence_proxy_async();
  __syncthreads();
  if (bug == Bug::plain_store) {
    shared[threadIdx.x * 16] = 1;
    __syncthreads();
  }
  std::uint64_t b = ptx::wgmma_descriptor(base);
  if (bug == Bug::wrong_swizzle) b &= ~(std::uint64_t(3) << 62);
  if (bug == Bug::apart) b += threadIdx.x / 64;
  std::uint32_t a[4] = {};
  Sum d[32] = {};
  const std::uint32_t metadata = bug == Bug::metadata && threadIdx.x == 99 ? 0x44444445 : 0x44444444;
  if (bug != Bug::no_fence) ptx::wgmma_fence();
  if constexpr (sizeof(X) == 1) {
    ptx::wgmma_sp_m64k64<64>(d, a, b, metadata, false);
  } else {
    ptx::wgmma_sp_m64k32<X, 64, 0>(d, a, b, metadata, false);
  }
  ptx::wgmma_commit_group();
  if (bug == Bug::touches_sums) d[5] = 1;
  if (bug == Bug::writes_a) a[2] = 1;
  if (bug != Bug::no_wait) ptx::wgmma_wait_group<0>();
}

}  // namespace

TEST(data_that_is_not_there_yet_is_no_number) {
  const Guarded<float> from(128);
  for (std::size_t i = 0; i < 128; ++i) from[std::int64_t(i)] = 1;
  float out[32];
  EXPECT(report(reads_in_flight, {1, 32, 512}, from.data(), out).empty());
  for (float x : out) EXPECT(x != x);
}

TEST(a_missing_barrier_shows) {
  float out[64];
  EXPECT(report(needs_barrier, {1, 64, 256}, out, false).empty());
  bool shows = false;
  for (float x : out) shows |= x != x;
  EXPECT(shows);
  EXPECT(report(needs_barrier, {1, 64, 256}, out, true).empty());
  for (float x : out) EXPECT(x == 1);
}

TEST(matrices_that_tma_cannot_copy_have_no_map) {
  const Guarded<std::uint16_t> x(5 * 80);
  ptx::TensorMap map;
  EXPECT(encode_matrix(&map, x.data(), DType::float16, 5, 72, 80, 8) == Status::ok);
  EXPECT(encode_matrix(&map, x.data() + 1, DType::float16, 5, 72, 80, 8) == Status::invalid_argument);
  EXPECT(encode_matrix(&map, x.data(), DType::float16, 5, 72, 76, 8) == Status::invalid_argument);
}

TEST(bad_copies_are_reported) {
  const Guarded<float> from(8);
  const LaunchShape one{1, 1, 64};
  EXPECT(report(copies_bytes, one, 48u, from.data(), 16).empty());
  EXPECT(says(report(copies_bytes, one, 64u, from.data(), 16), "are not in the 64 of shared memory"));
  EXPECT(says(report(copies_bytes, one, 8u, from.data(), 16), "is no multiple of 16"));
  EXPECT(says(report(copies_bytes, one, 0u, from.data() + 1, 16), "the global address is no multiple of 16"));
  EXPECT(says(report(copies_bytes, one, 0u, from.data(), 17), "17 of 16 bytes"));
  EXPECT(says(report(leaves_copy, one, from.data()), "returned with cp.async under way"));
}

TEST(threads_that_do_not_meet_are_reported) {
  EXPECT(says(report(diverges, {1, 32}), "diverged"));
  EXPECT(says(report(returns_early, {1, 64}), "deadlock"));
  EXPECT(says(report(returns_early, {1, 64}), "has returned"));
  EXPECT(says(report(shuffles_half, {1, 32}), "only whole warps are modelled"));
}

TEST(lanes_that_meet_from_different_places_are_reported) {
  for (Collective what : {Collective::barrier, Collective::ldmatrix, Collective::stmatrix, Collective::mma})
    EXPECT(says(report(meets_in_two_places, {1, 32, 64}, what), "machine_test.cpp"));
  EXPECT(says(report(meets_in_two_places, {2, 32, 64, 2}, Collective::cluster), "barrier.cluster at"));
  EXPECT(report(meets_in_two_places, {1, 32, 64}, Collective::shuffle).empty());  // needs no alignment
  EXPECT(report(warps_meet_in_two_places, {2, 64, 0, 2}).empty());                // nor do warps
  for (int what : {0, 1, 2, 3, 4})
    EXPECT(says(report(warpgroup_meets_in_two_places, {1, 128}, what), "diverged: comes to"));
}

TEST(stores_that_the_async_proxy_does_not_see_are_reported) {
  const ptx::TensorMap map = box_map(8);
  const auto run = [&](Store store) { return report(stores_where_it_copies, {1, 32, 1032}, store, map); };
  EXPECT(run(Store::none).empty());
  EXPECT(run(Store::fenced).empty());
  EXPECT(says(run(Store::unfenced), "TMA: of bytes 0 to 1024 some were stored to"));
  EXPECT(says(run(Store::in_flight), "TMA: of bytes 0 to 1024 some were stored to"));
}

TEST(products_of_copies_under_way_are_reported) {
  const ptx::TensorMap map = box_map(64);
  const auto run = [&](Reuse bug) { return report(multiplies_a_copy, {1, 128, 64 * 128 + 8}, bug, map); };
  EXPECT(run(Reuse::none).empty());
  EXPECT(says(run(Reuse::unawaited), "wgmma: reads what no wait has seen a copy bring"));
  EXPECT(says(run(Reuse::too_early), "wgmma: reads what no wait has seen a copy bring"));
  EXPECT(says(run(Reuse::twice), "TMA: writes where another copy does that no wait has seen land"));
}

TEST(barriers_that_nobody_was_told_of_are_reported) {
  const ptx::TensorMap map = box_map(8);
  const auto run = [&](Init bug) { return report(initialises, {1, 1, 1032}, bug, map); };
  EXPECT(run(Init::fenced).empty());
  EXPECT(run(Init::fenced_for_copies).empty());
  EXPECT(says(run(Init::unfenced), "its barrier was initialised without a fence for copies"));
  EXPECT(says(run(Init::twice), "there is a barrier already"));
  EXPECT(says(run(Init::written_over), "the barrier was written over"));
  EXPECT(says(run(Init::unawaited), "returned with bulk copies under way"));
  const LaunchShape pair{2, 1, 8, 2};
  EXPECT(report(says_hello, pair, Hello::synchronised).empty());
  EXPECT(says(report(says_hello, pair, Hello::unfenced), "initialised"));  // without a fence, or not yet
}

TEST(blocks_that_leave_their_cluster_are_reported) {
  EXPECT(says(report(says_hello, {2, 1, 8, 2}, Hello::leaves), "mapa: block 1 of the cluster has returned"));
  EXPECT(says(report(copies_to_who_left, {2, 1, 1040, 2}, box_map(8)),
              "TMA: block 1 of the cluster has returned"));
}

TEST(counts_beyond_a_barrier_are_reported) {
  constexpr int kMost = (1 << 20) - 1;
  const LaunchShape one{1, 1, 8};
  EXPECT(report(counts, one, kMost, 16, 3).empty());
  EXPECT(says(report(counts, one, kMost + 1, 16, 1), "mbarrier.init: 1048576 arrivals"));
  EXPECT(says(report(counts, one, 0, 16, 1), "mbarrier.init: 0 arrivals"));
  EXPECT(report(counts, one, 2, kMost, 1).empty());
  EXPECT(says(report(counts, one, 3, kMost, 2), "2097150 bytes to come are more than 2^20 - 1"));
}

TEST(phases_that_a_parity_cannot_tell_apart_are_reported) {
  const auto run = [&](Phases bug) { return report(completes_phases, {1, 64, 16}, bug); };
  EXPECT(run(Phases::seen).empty());
  EXPECT(says(run(Phases::unseen), "no wait has seen the one before it complete"));
  EXPECT(says(run(Phases::outrun), "while it waited for a phase the next one came to its end too"));
}

TEST(misused_registers_are_reported) {
  const auto run = [&](Registers bug) { return report(moves_registers, {1, 384}, bug); };
  EXPECT(run(Registers::moved).empty());
  EXPECT(says(run(Registers::too_many), "setmaxnreg.inc"));
  EXPECT(says(run(Registers::too_many), "deadlock"));
  EXPECT(says(run(Registers::wrong_way_up), "setmaxnreg.inc: from 168 registers to 160"));
  EXPECT(says(run(Registers::wrong_way_down), "setmaxnreg.dec: from 168 registers to 232"));
  EXPECT(says(run(Registers::half), "deadlock"));
}

TEST(what_blocks_hand_to_each_other_is_reported) {
  int flag = 0;
  EXPECT(
      says(report(hands_over, {2, 1}, HandOver::atomic, &flag), "atomicAdd: blocks run one after another"));
  EXPECT(says(report(hands_over, {2, 1}, HandOver::fence, &flag), "__threadfence: blocks run one after"));
  const simt::Options before = simt::options;
  simt::options.seed = 0;  // block 0 first
  simt::options.patience = 0.05;
  EXPECT(says(report(hands_over, {2, 1}, HandOver::spin, &flag), "has run for long and never waited"));
  simt::options = before;
}

TEST(blocks_that_need_an_order_show) {
  const simt::Options before = simt::options;
  bool shows = false;
  for (unsigned seed : {1, 2}) {
    simt::options.seed = seed;
    std::vector<int> values(33);
    EXPECT(report(reads_of_the_block_before, {32, 1}, values.data()).empty());
    for (int i = 0; i <= 32; ++i) shows |= values[std::size_t(i)] != i;
  }
  EXPECT(shows);
  simt::options = before;
}

TEST(misused_barriers_are_reported) {
  EXPECT(says(report(arrives_too_often, {1, 1, 8}, true), "more arrivals than the 1 expected"));
  EXPECT(says(report(arrives_too_often, {1, 1, 8}, false), "was not initialised"));
  const ptx::TensorMap map = box_map(8);
  EXPECT(report(expects_wrong_bytes, {1, 1, 1032}, map, 1024).empty());
  EXPECT(says(report(expects_wrong_bytes, {1, 1, 1032}, map, 1032), "deadlock"));
}

TEST(bad_metadata_is_reported) {
  EXPECT(report(bad_metadata, {1, 32}, 0x44444444u).empty());
  EXPECT(says(report(bad_metadata, {1, 32}, 0x44444440u), "the columns 0, 0 do not ascend"));
}

TEST(bad_metadata_of_8_bit_elements_is_reported) {
  const Capability hopper(90);
  EXPECT(report(bad_metadata_of_bytes<std::int32_t>, {1, 32}, 0x9de84444u).empty());
  EXPECT(report(bad_metadata_of_bytes<float>, {1, 32}, 0x9de84444u).empty());
  for (std::uint32_t metadata : {0x04444444u, 0x44444441u})  // every lane has some, up to its last nibble
    for (const auto kernel : {bad_metadata_of_bytes<std::int32_t>, bad_metadata_of_bytes<float>})
      EXPECT(says(report(kernel, {1, 32}, metadata), "do not ascend"));
}

TEST(a_device_before_8_9_has_no_e4m3) {
  const Capability ampere(80);
  EXPECT(report(bad_metadata_of_bytes<std::int32_t>, {1, 32}, 0x44444444u).empty());
  EXPECT(says(report(bad_metadata_of_bytes<float>, {1, 32}, 0x44444444u), "a device of 80 has no e4m3"));
}

template <typename X, typename Sum>
void expect_misuse_reported() {
  const Guarded<float> from(4);
  const auto run = [&](Bug bug) {
    return report(misuses_wgmma<X, Sum>, {1, 128, 64 * 128}, bug, from.data());
  };
  EXPECT(run(Bug::none).empty());
  EXPECT(says(run(Bug::no_fence), "has not begun with wgmma.fence"));
  EXPECT(says(run(Bug::touches_sums), "sums were touched while it was under way"));
  EXPECT(says(run(Bug::writes_a), "registers of its A operand were written"));
  EXPECT(says(run(Bug::no_proxy_fence), "wrote with cp.async and never fenced"));
  EXPECT(says(run(Bug::plain_store), "were stored to without a fence.proxy.async since"));
  EXPECT(says(run(Bug::no_wait), "returned with wgmma under way"));
  EXPECT(says(run(Bug::wrong_swizzle), "the swizzle of a descriptor must be that of 128 bytes"));
  EXPECT(says(run(Bug::apart), "the descriptors of a warpgroup differ"));
}

TEST(misused_wgmma_is_reported) {
  expect_misuse_reported<BF16, float>();
  expect_misuse_reported<std::int8_t, std::int32_t>();
  expect_misuse_reported<E4M3, float>();
}

TEST(bad_metadata_of_wgmma_is_reported) {
  const Guarded<float> from(4);
  for (const auto kernel : {misuses_wgmma<std::int8_t, std::int32_t>, misuses_wgmma<E4M3, float>})
    EXPECT(says(report(kernel, {1, 128, 64 * 128}, Bug::metadata, from.data()), "do not ascend"));
}

TEST(launches_beyond_the_machine_are_reported) {
  EXPECT(says(report(diverges, {1, 2048}), "cannot launch"));
  EXPECT(says(report(diverges, {1, 0}), "cannot launch"));
  EXPECT(says(report(diverges, {1, 32, 1 << 20}), "cannot launch"));
  EXPECT(says(report(diverges, {3, 32, 0, 2}), "cannot launch"));
}
