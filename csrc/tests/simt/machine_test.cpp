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

enum class Bug {
  none,
  no_fence,
  touches_sums,
  writes_a,
  no_proxy_fence,
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

TEST(misused_barriers_are_reported) {
  EXPECT(says(report(arrives_too_often, {1, 1, 8}, true), "more arrivals than the 1 expected"));
  EXPECT(says(report(arrives_too_often, {1, 1, 8}, false), "was not initialised"));
  const Guarded<std::uint16_t> x(8 * 64);
  ptx::TensorMap map;
  EXPECT(encode_matrix(&map, x.data(), DType::bfloat16, 8, 64, 64, 8) == Status::ok);
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
  EXPECT(says(report(diverges, {1, 32, 1 << 20}), "cannot launch"));
  EXPECT(says(report(diverges, {3, 32, 0, 2}), "cannot launch"));
}
