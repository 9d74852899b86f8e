// SPDX-License-Identifier: Apache-2.0
#pragma once

// The instructions of every device that C++ has no name for, each under its PTX name; those that came later
// are in ptx_sm<N>.cuh. There is no inline PTX but in these files; under MADTP_SIMT the same functions come
// from the files of the same names in simt, which give them a meaning on the CPU.
//
// Shared addresses are the 32-bit ones of `shared_address`.

#ifdef MADTP_SIMT
#include "simt/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Names the dynamic shared memory of a kernel, which starts on a 1024-byte boundary.
#define MADTP_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace madtp::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// --- copies of 16 bytes

// Bytes from `bytes` (0 to 16) on are zeros, and are not read.
__device__ __forceinline__ void cp_async_16(std::uint32_t to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- fragments of mma

// Four 8x8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d (16, 8) += a (16, 32, 2:4) b (32, 8). Of the four lanes of a row, those numbered 2 kSelector and
// 2 kSelector + 1 give the metadata of the first and the last 16 columns.
template <typename T, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4], std::uint32_t metadata) {
#define MADTP_MMA_SP(type)                                                                                \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                 "r"(metadata), "n"(kSelector))
  if constexpr (std::is_same_v<T, __half>) {
    MADTP_MMA_SP("f16");
  } else {
    MADTP_MMA_SP("bf16");
  }
#undef MADTP_MMA_SP
}

// The same of 8-bit elements, d (16, 8) += a (16, 64, 2:4) b (64, 8): int8 where sums are int32, and e4m3, on
// sm_89 and newer, where they are float32. Lane 4 g + t gives the metadata of row g + 8 (t % 2), columns
// 32 (t / 2) on.
__device__ __forceinline__ void mma_sp_m16n8k64(std::int32_t (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4], std::uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata));
}
__device__ __forceinline__ void mma_sp_m16n8k64(float (&d)[4], const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[4], std::uint32_t metadata) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata));
#else
  __trap();  // no kernel with it is launched there
#endif
}

// --- approximate functions: error below 2^-22 relative, results that are subnormal are zero

__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a + b, in the branch that it stands in: the compiler would rather add in every branch and choose.
__device__ __forceinline__ float add_here(float a, float b) {
  float sum;
  asm volatile("add.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
// The nearest float32, likewise.
__device__ __forceinline__ float to_float_here(std::int32_t a) {
  float x;
  asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(x) : "r"(a));
  return x;
}
__device__ __forceinline__ float to_float_here(float a) {
  float x;
  asm volatile("mov.f32 %0, %1;" : "=f"(x) : "f"(a));
  return x;
}

}  // namespace madtp::cuda::ptx

#endif
