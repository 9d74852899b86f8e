// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernels behind instructions.h, by the wrappers of ptx.cuh.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/sparse24/operand.cuh"
#include "cuda/tensor_map.h"
#include "tests/gpu/instructions.h"
#include "tests/gpu/on_device.cuh"

namespace madtp::test {
namespace {

namespace ptx = madtp::cuda::ptx;
using cuda::LaunchShape;

template <bool kIsTransposed>
__global__ void ldmatrix_kernel(const LdmatrixOperands* in, LdmatrixResult* out) {
  MADTP_DYNAMIC_SHARED(shared);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256 * 4; i += 32)
    reinterpret_cast<std::uint32_t*>(shared)[i] = in->shared[i / 4][i % 4];
  __syncthreads();
  std::uint32_t r[4];
  const std::uint32_t address = ptx::shared_address(shared) + in->rows[lane] * 16;
  if constexpr (kIsTransposed) {
    ptx::ldmatrix_x4_trans(r, address);
  } else {
    ptx::ldmatrix_x4(r, address);
  }
  for (int i = 0; i < 4; ++i) out->r[lane][i] = r[i];
}

__global__ void cp_async_kernel(const CopyOperands* in, CopyResult* out) {
  MADTP_DYNAMIC_SHARED(shared);
  const unsigned lane = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(shared) + in->to[lane] * 16, in->from[lane], in->bytes[lane]);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  for (unsigned i = 0; i < 16; ++i) out->shared[lane][i] = shared[lane * 16 + i];
}

template <typename X, int kSelector>
__global__ void mma_sp_kernel(const MmaOperands* in, MmaResult* out) {
  const unsigned lane = threadIdx.x;
  using Sum = cuda::SumOf<X>;
  Sum d[4];
  for (int i = 0; i < 4; ++i) d[i] = Sum(in->d[lane][i]);
  if constexpr (sizeof(X) == 1) {
    ptx::mma_sp_m16n8k64(d, in->a[lane], in->b[lane], in->metadata[lane]);
  } else {
    ptx::mma_sp_m16n8k32<X, kSelector>(d, in->a[lane], in->b[lane], in->metadata[lane]);
  }
  for (int i = 0; i < 4; ++i) out->d[lane][i] = float(d[i]);
}

// Other targets than sm_90a have none of what follows.
#if defined(MADTP_SIMT) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MADTP_SM90 1
#endif

__global__ void stmatrix_kernel(const StmatrixOperands* in, StmatrixResult* out) {
#ifdef MADTP_SM90
  MADTP_DYNAMIC_SHARED(shared);
  const unsigned lane = threadIdx.x;
  std::uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in->r[lane][i];
  ptx::stmatrix_x4_trans(ptx::shared_address(shared) + in->rows[lane] * 16, r);
  __syncthreads();
  for (unsigned i = 0; i < 8; ++i)
    out->shared[lane][i] = reinterpret_cast<const std::uint16_t*>(shared)[lane * 8 + i];
#endif
}

template <typename X, int kN>
__global__ void wgmma_sp_kernel(const __grid_constant__ ptx::TensorMap map, bool accumulate,
                                const WgmmaOperands* in, WgmmaResult* out) {
#ifdef MADTP_SM90
  MADTP_DYNAMIC_SHARED(shared);
  constexpr int kBytes = kN * 128;
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + kBytes;
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, kBytes);
    ptx::tma_load_2d(base, &map, 0, 0, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  using Sum = cuda::SumOf<X>;
  Sum d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = Sum(in->d[thread][i]);
  std::uint32_t a[2][4];
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = in->a[i / 4][thread][i % 4];
  const std::uint32_t metadata[2] = {in->metadata[0][thread], in->metadata[1][thread]};
  const std::uint64_t b = ptx::wgmma_descriptor(base);
  ptx::wgmma_fence();
  if constexpr (sizeof(X) == 1) {
    ptx::wgmma_sp_m64k64<kN>(d, a[0], b, metadata[0], accumulate);
    ptx::wgmma_sp_m64k64<kN>(d, a[1], b + 4, metadata[1], accumulate);
  } else {
    ptx::wgmma_sp_m64k32<X, kN, 0>(d, a[0], b, metadata[0], accumulate);
    ptx::wgmma_sp_m64k32<X, kN, 1>(d, a[1], b + 4, metadata[1], accumulate);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (int i = 0; i < kN / 2; ++i) out->d[thread][i] = float(d[i]);
#endif
}

template <int kBlocks>
__global__ void box_kernel(const __grid_constant__ ptx::TensorMap map, int column, int row, BoxResult* out) {
#ifdef MADTP_SM90
  MADTP_DYNAMIC_SHARED(shared);
  constexpr int kBytes = kBoxRows * kBoxColumns * 2;
  const std::uint32_t base = ptx::shared_address(shared), barrier = base + kBlocks * kBytes;
  const int rank = kBlocks == 1 ? 0 : ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, kBlocks * kBytes);
  }
  if constexpr (kBlocks > 1) ptx::cluster_sync();  // before another block copies into this one
  if (threadIdx.x == 0) {
    const std::uint32_t to = base + std::uint32_t(rank * kBytes);
    if constexpr (kBlocks == 1) {
      ptx::tma_load_2d(to, &map, column, row, barrier);
    } else {
      ptx::tma_load_2d_multicast(to, &map, column, row + rank * kBoxRows, barrier, (1u << kBlocks) - 1);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  const auto* const halves = reinterpret_cast<const std::uint16_t*>(shared);
  for (int i = int(threadIdx.x); i < kBlocks * kBytes / 2; i += 32)
    (&out->shared[rank][0][0][0])[i] = halves[i];
  if constexpr (kBlocks > 1) ptx::cluster_sync();  // a copy of this block may still go to another one
#endif
}

template <bool kIsTransposed>
Status run_ldmatrix(const LdmatrixOperands& operands, LdmatrixResult* result) {
  if (const Status status = needs(0); status != Status::ok) return status;
  return on_device(operands, result, [](const auto* in, auto* out) {
    return cuda::launch(ldmatrix_kernel<kIsTransposed>, LaunchShape{1, 32, 256 * 16}, nullptr, in, out);
  });
}

Status run_stmatrix(const StmatrixOperands& operands, StmatrixResult* result) {
  if (const Status status = needs(90); status != Status::ok) return status;
  return on_device(operands, result, [](const auto* in, auto* out) {
    return cuda::launch(stmatrix_kernel, LaunchShape{1, 32, 32 * 16}, nullptr, in, out);
  });
}

Status run_cp_async(const CopyOperands& operands, CopyResult* result) {
  if (const Status status = needs(0); status != Status::ok) return status;
  return on_device(operands, result, [](const auto* in, auto* out) {
    return cuda::launch(cp_async_kernel, LaunchShape{1, 32, 32 * 16}, nullptr, in, out);
  });
}

// use(X{}) with the elements of an operand.
template <typename Use>
Status with_operand(Operand operand, Use&& use) {
  switch (operand) {
    case Operand::bfloat16:
      return use(cuda::BFloat16{});
    case Operand::float16:
      return use(cuda::Float16{});
    case Operand::int8:
      return use(std::int8_t{});
    default:
      return use(cuda::E4M3{});
  }
}

Status run_mma_sp(Operand operand, int selector, const MmaOperands& operands, MmaResult* result) {
  // e4m3 came with 8.9: here it is in the code of sm_90a.
  if (const Status status = needs(operand == Operand::e4m3 ? 90 : 0); status != Status::ok) return status;
  return with_operand(operand, [&](auto x) {
    using X = decltype(x);
    return on_device(operands, result, [&](const auto* in, auto* out) {
      return cuda::launch(selector == 0 ? mma_sp_kernel<X, 0> : mma_sp_kernel<X, 1>, LaunchShape{1, 32},
                          nullptr, in, out);
    });
  });
}

Status run_wgmma_sp(Operand operand, int n, bool accumulate, const WgmmaOperands& operands,
                    WgmmaResult* result) {
  if (const Status status = needs(90); status != Status::ok) return status;
  return with_operand(operand, [&](auto x) {
    using X = decltype(x);
    return on_device(operands, result, [&](const auto* in, auto* out) {
      ptx::TensorMap map;  // of 16 bits, of whatever elements
      const Status status = cuda::encode_matrix(&map, in->x, DType::float16, 256, 64, 64, n);
      if (status != Status::ok) return status;
      const auto kernel = n == 64    ? wgmma_sp_kernel<X, 64>
                          : n == 128 ? wgmma_sp_kernel<X, 128>
                                     : wgmma_sp_kernel<X, 256>;
      return cuda::launch(kernel, LaunchShape{1, 128, n * 128 + 8}, nullptr, map, accumulate, in, out);
    });
  });
}

Status run_tma_load(int blocks, int column, int row, const BoxOperands& operands, BoxResult* result) {
  if (const Status status = needs(90); status != Status::ok) return status;
  return on_device(operands, result, [&](const auto* in, auto* out) {
    ptx::TensorMap map;
    const Status status = cuda::encode_matrix(&map, in->x, DType::float16, kMatrixRows, kMatrixColumns,
                                              kMatrixStride, kBoxRows);
    if (status != Status::ok) return status;
    const LaunchShape shape{blocks, 32, blocks * kBoxRows * kBoxColumns * 2 + 8, blocks};
    return cuda::launch(blocks == 1 ? box_kernel<1> : box_kernel<2>, shape, nullptr, map, column, row, out);
  });
}

constexpr Instructions kInstructions{run_ldmatrix<false>, run_ldmatrix<true>, run_stmatrix, run_cp_async,
                                     run_mma_sp,          run_wgmma_sp,       run_tma_load};

}  // namespace
}  // namespace madtp::test
