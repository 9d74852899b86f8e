// SPDX-License-Identifier: Apache-2.0
#pragma once

// The instructions that came with sm_90, as ptx.cuh has those of every device.
//
// Accumulators are passed as references, since wgmma writes them long after it was issued: do not touch them,
// nor the registers of its A operand, before the wait that covers it.

#include "cuda/ptx.cuh"

#ifdef MADTP_SIMT
#include "simt/ptx_sm90.h"
#else

#include <cuda.h>

namespace madtp::cuda::ptx {

using TensorMap = CUtensorMap;

// --- barriers in shared memory, clusters

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to copies and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// At the barrier of block `rank` of the cluster that has the same address there. Orders nothing but what this
// block did to its own shared memory: a release at the scope of the cluster would be a barrier to all memory
// of the GPU.
__device__ __forceinline__ void mbarrier_arrive_cluster(std::uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity is complete; may wait a while for it. What copies wrote into this block is
// visible then: their bytes are what completes the phase. An acquire at the scope of the cluster would also
// throw away the L1 cache.
__device__ __forceinline__ bool mbarrier_try_wait(std::uint32_t barrier, int parity) {
  std::uint32_t complete;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}
// Until that phase is complete. With MADTP_BOUNDED_WAIT, which tests are compiled with, one that does not
// come in two seconds ends the kernel with an error instead of never.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, int parity) {
#ifdef MADTP_BOUNDED_WAIT
  constexpr std::uint64_t kNanoseconds = 2'000'000'000;
  const auto now = [] {
    std::uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
  };
  const std::uint64_t begin = now();
  while (!mbarrier_try_wait(barrier, parity))
    if (now() - begin > kNanoseconds) __trap();
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- bulk copies

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of `map` at (column, row); its bytes complete at `barrier`. Zeros outside of the tensor.
__device__ __forceinline__ void tma_load_2d(std::uint32_t to, const TensorMap* map, int column, int row,
                                            std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same into every block of the cluster whose bit is in `blocks`, at the same addresses.
__device__ __forceinline__ void tma_load_2d_multicast(std::uint32_t to, const TensorMap* map, int column,
                                                      int row, std::uint32_t barrier, std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// --- fragments

// Writes what ldmatrix_x4_trans reads, to the addresses that it reads from.
__device__ __forceinline__ void stmatrix_x4_trans(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// --- registers of a warpgroup, sm_90a

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- sparse wgmma, sm_90a

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The instructions as macros, of n = 64, 128 and 256. `instruction` is what follows
// that in their name, c how the compiler binds a sum ("+f", "+r"), `signs` what follows the predicate.
#define MADTP_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define MADTP_D16(c, i) MADTP_D4(c, i), MADTP_D4(c, i + 4), MADTP_D4(c, i + 8), MADTP_D4(c, i + 12)
#define MADTP_D32(c, i) MADTP_D16(c, i), MADTP_D16(c, i + 16)
#define MADTP_WGMMA_SP_64(instruction, c, selector, signs)                                    \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %39, 0;\n"                                              \
      "wgmma.mma_async.sp.sync.aligned.m64n64" instruction                                    \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                       \
      "}, {%32, %33, %34, %35}, %36, %37, %38, p" signs "; }"                                 \
      : MADTP_D32(c, 0)                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(selector),     \
        "r"(int(accumulate)))
#define MADTP_WGMMA_SP_128(instruction, c, selector, signs)                                   \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %71, 0;\n"                                              \
      "wgmma.mma_async.sp.sync.aligned.m64n128" instruction                                   \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                 \
      "}, {%64, %65, %66, %67}, %68, %69, %70, p" signs "; }"                                 \
      : MADTP_D32(c, 0), MADTP_D32(c, 32)                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(selector),     \
        "r"(int(accumulate)))
#define MADTP_WGMMA_SP_256(instruction, c, selector, signs)                                   \
  asm volatile(                                                                               \
      "{ .reg .pred p; setp.ne.b32 p, %135, 0;\n"                                             \
      "wgmma.mma_async.sp.sync.aligned.m64n256" instruction                                   \
      " {"                                                                                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "   \
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "  \
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                      \
      "}, {%128, %129, %130, %131}, %132, %133, %134, p" signs "; }"                          \
      : MADTP_D32(c, 0), MADTP_D32(c, 32), MADTP_D32(c, 64), MADTP_D32(c, 96)                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(selector),     \
        "r"(int(accumulate)))
#define MADTP_WGMMA_SP(...)                                     \
  if constexpr (kN == 64) {                                     \
    MADTP_WGMMA_SP_64(__VA_ARGS__);                             \
  } else if constexpr (kN == 128) {                             \
    MADTP_WGMMA_SP_128(__VA_ARGS__);                            \
  } else {                                                      \
    static_assert(kN == 256, "the sizes that are spelled out"); \
    MADTP_WGMMA_SP_256(__VA_ARGS__);                            \
  }

// d (64, kN) = a (64, 32, 2:4) b (32, kN), + d if `accumulate`. a is in registers, warp w of the warpgroup
// holding rows 16 w to 16 w + 15 as in mma_sp_m16n8k32, and its metadata likewise; `b` describes (kN, 32) in
// shared memory, rows of k.
template <typename T, int kN, int kSelector>
__device__ __forceinline__ void wgmma_sp_m64k32(float (&d)[kN / 2], const std::uint32_t (&a)[4],
                                                std::uint64_t b, std::uint32_t metadata, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MADTP_WGMMA_SP("k32.f32.f16.f16", "+f", kSelector, ", 1, 1, 0");
  } else {
    MADTP_WGMMA_SP("k32.f32.bf16.bf16", "+f", kSelector, ", 1, 1, 0");
  }
}

// The same of 8-bit elements, a (64, 64, 2:4) b (64, kN): int8 where sums are int32, e4m3 where they are
// float32. a and its metadata lie as in mma_sp_m16n8k64; `b` describes (kN, 64).
template <int kN>
__device__ __forceinline__ void wgmma_sp_m64k64(std::int32_t (&d)[kN / 2], const std::uint32_t (&a)[4],
                                                std::uint64_t b, std::uint32_t metadata, bool accumulate) {
  MADTP_WGMMA_SP("k64.s32.s8.s8", "+r", 0, "");
}
template <int kN>
__device__ __forceinline__ void wgmma_sp_m64k64(float (&d)[kN / 2], const std::uint32_t (&a)[4],
                                                std::uint64_t b, std::uint32_t metadata, bool accumulate) {
  MADTP_WGMMA_SP("k64.f32.e4m3.e4m3", "+f", 0, ", 1, 1");
}

#undef MADTP_WGMMA_SP
#undef MADTP_WGMMA_SP_64
#undef MADTP_WGMMA_SP_128
#undef MADTP_WGMMA_SP_256
#undef MADTP_D4
#undef MADTP_D16
#undef MADTP_D32

// The matrix descriptor of the B operand: rows of 128 bytes, 64 elements of 16 bits or 128 of 8, swizzled as
// TMA does, from a 1024-byte boundary on. Each half of the row adds 64 bytes, 4 in the descriptor.
__device__ __forceinline__ std::uint64_t wgmma_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
  return std::uint64_t((address & 0x3ffff) >> 4) | std::uint64_t(1) << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

}  // namespace madtp::cuda::ptx

#endif
