// The simulated machine itself: its instructions against the tables of the PTX manual, written out here
// again, and bugs planted in small kernels, each of which it must report.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"
#include "tests/simt/sparse24_problem.h"

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

// --- instructions

// A (rows, 32), 2:4, and B (32, columns), of small integers, so that every sum is exact.
struct SparseProduct {
  int rows, columns;
  std::vector<int> nibbles;  // (rows, 8)
  std::vector<float> kept;   // (rows, 16)
  std::vector<float> b;      // (32, columns)

  SparseProduct(int rows, int columns) : rows(rows), columns(columns) {
    constexpr int valid[] = {4, 8, 12, 9, 13, 14};
    std::mt19937 generator(unsigned(rows + columns));
    for (int i = 0; i < rows * 8; ++i) nibbles.push_back(valid[generator() % 6]);
    for (int i = 0; i < rows * 16; ++i) kept.push_back(float(generator() % 9) - 4);
    for (int i = 0; i < 32 * columns; ++i) b.push_back(float(generator() % 9) - 4);
  }
  float at(int row, int column) const {
    float sum = 0;
    for (int group = 0; group < 8; ++group)
      for (int i = 0; i < 2; ++i) {
        const int k = 4 * group + (nibbles[std::size_t(row * 8 + group)] >> (2 * i) & 3);
        sum += kept[std::size_t(row * 16 + 2 * group + i)] * b[std::size_t(k * columns + column)];
      }
    return sum;
  }
  std::uint32_t pair(int row, int column) const {  // kept values `column`, + 1
    const auto bits = [&](int c) {
      return std::uint32_t(encode(kept[std::size_t(row * 16 + c)], DType::bfloat16));
    };
    return bits(column) | bits(column + 1) << 16;
  }
};

struct Lanes {
  std::uint32_t a[128][4], b[32][4], metadata[128];
};

// The A fragments and the metadata of 16 rows a warp. Metadata that the selector does not name is of no
// matrix.
void fill(const SparseProduct& p, int selector, Lanes& lanes) {
  for (int thread = 0; thread < 2 * p.rows; ++thread) {
    const int lane = thread % 32, first = thread / 32 * 16, row = first + lane / 4, t = lane % 4;
    lanes.a[thread][0] = p.pair(row, 2 * t), lanes.a[thread][1] = p.pair(row + 8, 2 * t);
    lanes.a[thread][2] = p.pair(row, 2 * t + 8), lanes.a[thread][3] = p.pair(row + 8, 2 * t + 8);
    lanes.metadata[thread] = 0;
    if (t / 2 != selector) continue;
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high)
        lanes.metadata[thread] |= std::uint32_t(p.nibbles[std::size_t((row + 8 * high) * 8 + t % 2 * 4 + i)])
                                  << (16 * high + 4 * i);
  }
}

template <int kSelector>
void mma_kernel(const Lanes* lanes, float* out) {
  const unsigned lane = threadIdx.x;
  float d[4] = {1, 1, 1, 1};
  ptx::mma_sp_m16n8k32<BF16, kSelector>(d, lanes->a[lane], lanes->b[lane], lanes->metadata[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}

template <int kSelector>
void check_mma() {
  const SparseProduct p(16, 8);
  Lanes lanes{};
  fill(p, kSelector, lanes);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i)  // register i / 2 holds rows 8 (i / 2) + 2 t, + 1 of column g
      lanes.b[lane][i / 2] |=
          std::uint32_t(
              encode(p.b[std::size_t((i / 2 * 8 + lane % 4 * 2 + i % 2) * 8 + lane / 4)], DType::bfloat16))
          << (16 * (i % 2));
  float out[128];
  EXPECT(report(mma_kernel<kSelector>, {1, 32}, &lanes, out).empty());
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      EXPECT(out[lane * 4 + i] == 1 + p.at(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2));
}

template <int kN, int kSelector>
void wgmma_kernel(const Lanes* lanes, const ptx::TensorMap map, float* out) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + kN * 128;
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, kN * 128);
    ptx::tma_load_2d(base, &map, 0, 0, barrier);
  }
  __syncthreads();
  while (!ptx::mbarrier_try_wait(barrier, 0)) {
  }
  float d[kN / 2];
  for (float& x : d) x = 1;
  const std::uint64_t b = ptx::wgmma_descriptor(base);
  ptx::wgmma_fence();
  ptx::wgmma_sp_m64k32<BF16, kN, kSelector>(d, lanes->a[thread], b, lanes->metadata[thread], true);
  ptx::wgmma_sp_m64k32<BF16, kN, kSelector>(d, lanes->a[thread], b + 4, lanes->metadata[thread], true);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (int i = 0; i < kN / 2; ++i) out[thread * (kN / 2) + unsigned(i)] = d[i];
}

// Twice the product: columns 32 to 63 of x are those of 0 to 31 again.
template <int kN, int kSelector>
void check_wgmma() {
  const SparseProduct p(64, kN);
  Lanes lanes{};
  fill(p, kSelector, lanes);
  Guarded<std::uint16_t> x(kN * 64);  // (tokens, channels)
  for (int n = 0; n < kN; ++n)
    for (int k = 0; k < 64; ++k) x[n * 64 + k] = encode(p.b[std::size_t(k % 32 * kN + n)], DType::bfloat16);
  ptx::TensorMap map;
  EXPECT(encode_matrix(&map, x.data(), DType::bfloat16, kN, 64, 64, kN) == Status::ok);
  std::vector<float> out(128 * kN / 2);
  EXPECT(report(wgmma_kernel<kN, kSelector>, {1, 128, kN * 128 + 8}, &lanes, map, out.data()).empty());
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kN / 2; ++i) {
      const int lane = thread % 32, row = thread / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      EXPECT(out[std::size_t(thread * (kN / 2) + i)] == 1 + 2 * p.at(row, column));
    }
}

}  // namespace

TEST(mma_sp_follows_the_fragment_tables) {
  check_mma<0>();
  check_mma<1>();
}

TEST(wgmma_sp_follows_the_fragment_tables) {
  check_wgmma<64, 0>();
  check_wgmma<64, 1>();
  check_wgmma<128, 0>();
  check_wgmma<256, 1>();
}

namespace {

void box_kernel(const ptx::TensorMap map, int column, int row, std::uint16_t* out) {
  MADTP_DYNAMIC_SHARED(shared);
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + 8 * 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_arrive_expect_tx(barrier, 8 * 128);
    ptx::tma_load_2d_multicast(base, &map, column, row, barrier, 1);
    while (!ptx::mbarrier_try_wait(barrier, 0)) {
    }
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < 64; ++c)  // 16-byte chunk c / 8 lies where chunk c / 8 ^ r would
        out[r * 64 + c] = reinterpret_cast<const std::uint16_t*>(shared)[r * 64 + (c / 8 ^ r) * 8 + c % 8];
  }
}

}  // namespace

TEST(boxes_are_swizzled_and_zero_outside) {
  const std::int64_t rows = 5, columns = 72, stride = 80;
  Guarded<std::uint16_t> x(rows * stride);
  for (std::int64_t i = 0; i < rows * stride; ++i) x[i] = std::uint16_t(i + 1);
  ptx::TensorMap map;
  EXPECT(encode_matrix(&map, x.data(), DType::float16, rows, columns, stride, 8) == Status::ok);
  for (int column : {-64, -8, 0, 64, 128})
    for (int row : {-9, -3, 0, 4, 5}) {
      std::uint16_t out[8 * 64];
      EXPECT(report(box_kernel, {1, 32, 8 * 128 + 8}, map, column, row, out).empty());
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 64; ++c) {
          const std::int64_t y = row + r, at = column + c;
          const bool inside = y >= 0 && y < rows && at >= 0 && at < columns;
          EXPECT(out[r * 64 + c] == (inside ? x[y * stride + at] : 0));
        }
    }
  EXPECT(encode_matrix(&map, x.data() + 1, DType::float16, rows, columns, stride, 8) != Status::ok);
  EXPECT(encode_matrix(&map, x.data(), DType::float16, rows, columns, stride - 4, 8) != Status::ok);
}

// --- planted bugs

namespace {

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
void waits_for_warp(int threads) { ptx::barrier_sync(1, threads); }

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

enum class Bug { none, no_fence, touches_sums, writes_a, no_proxy_fence, no_wait, wrong_swizzle, apart };

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
  float d[32] = {};
  if (bug != Bug::no_fence) ptx::wgmma_fence();
  ptx::wgmma_sp_m64k32<BF16, 64, 0>(d, a, b, 0x44444444, false);
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
  EXPECT(says(report(waits_for_warp, {1, 32}, 40), "no multiple of 32"));
  EXPECT(says(report(waits_for_warp, {1, 32}, 64), "deadlock"));
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

TEST(misused_wgmma_is_reported) {
  const Guarded<float> from(4);
  const auto run = [&](Bug bug) { return report(misuses_wgmma, {1, 128, 64 * 128}, bug, from.data()); };
  EXPECT(run(Bug::none).empty());
  EXPECT(says(run(Bug::no_fence), "has not begun with wgmma.fence"));
  EXPECT(says(run(Bug::touches_sums), "sums were touched while it was under way"));
  EXPECT(says(run(Bug::writes_a), "registers of its A operand were written"));
  EXPECT(says(run(Bug::no_proxy_fence), "wrote with cp.async and never fenced"));
  EXPECT(says(run(Bug::no_wait), "returned with wgmma under way"));
  EXPECT(says(run(Bug::wrong_swizzle), "the swizzle of a descriptor must be that of 128 bytes"));
  EXPECT(says(run(Bug::apart), "the descriptors of a warpgroup differ"));
}

TEST(launches_beyond_the_machine_are_reported) {
  EXPECT(says(report(diverges, {1, 2048}), "cannot launch"));
  EXPECT(says(report(diverges, {1, 32, 1 << 20}), "cannot launch"));
  EXPECT(says(report(diverges, {3, 32, 0, 2}), "cannot launch"));
}
