// SPDX-License-Identifier: Apache-2.0
#pragma once

// The functions of cuda/ptx_sm90.cuh, by the PTX manual, on the simulated machine.

#include <cuda.h>

#include "simt/copies.h"
#include "simt/mbarrier.h"
#include "simt/wgmma.h"

namespace madtp::cuda::ptx {

using TensorMap = CUtensorMap;

// --- barriers in shared memory, clusters

inline void mbarrier_init(std::uint32_t barrier, int arrivals) { simt::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
inline void mbarrier_arrive_expect_tx(std::uint32_t barrier, int bytes) {
  simt::mbarrier_arrive(simt::block(), barrier, bytes);
}
inline void mbarrier_arrive_cluster(std::uint32_t barrier, int rank) {
  simt::mbarrier_arrive(simt::block_of_cluster(rank), barrier, 0);
}
inline void mbarrier_arrive(std::uint32_t barrier) { simt::mbarrier_arrive(simt::block(), barrier, 0); }
inline bool mbarrier_try_wait(std::uint32_t barrier, int parity) {
  return simt::mbarrier_try_wait(barrier, parity);
}
inline void mbarrier_wait(std::uint32_t barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) {  // the machine ends a wait that nothing can end
  }
}

inline int cluster_rank() { return simt::block().rank; }
inline void cluster_sync(Site site = Site::here()) { simt::cluster_sync(site); }

// --- bulk copies

inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load_2d(std::uint32_t to, const TensorMap* map, int column, int row, std::uint32_t barrier) {
  simt::tma_load(to, *map, column, row, barrier, 1u << simt::block().rank);
}
inline void tma_load_2d_multicast(std::uint32_t to, const TensorMap* map, int column, int row,
                                  std::uint32_t barrier, std::uint16_t blocks) {
  simt::tma_load(to, *map, column, row, barrier, blocks);
}
inline void fence_proxy_async() { simt::fence_proxy_async(); }

// --- fragments

inline void stmatrix_x4_trans(std::uint32_t address, const std::uint32_t (&r)[4], Site site = Site::here()) {
  simt::aligned(site);
  simt::stmatrix_x4_trans(address, r);
}

// --- registers of a warpgroup

template <int kRegisters>
void setmaxnreg_inc(Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  simt::aligned(site);
  simt::setmaxnreg_inc(kRegisters);
}
template <int kRegisters>
void setmaxnreg_dec(Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  simt::aligned(site);
  simt::setmaxnreg_dec(kRegisters);
}

// --- sparse wgmma

inline void wgmma_fence(Site site = Site::here()) {
  simt::aligned(site);
  simt::wgmma_fence();
}
inline void wgmma_commit_group(Site site = Site::here()) {
  simt::aligned(site);
  simt::wgmma_commit();
}
template <int kPending>
void wgmma_wait_group(Site site = Site::here()) {
  simt::aligned(site);
  simt::wgmma_wait(kPending);
}

template <typename T, int kN, int kSelector>
void wgmma_sp_m64k32(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, std::uint32_t metadata,
                     bool accumulate, Site site = Site::here()) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "the sizes that are spelled out");
  static_assert(kSelector == 0 || kSelector == 1, "of four lanes, the first or the last two");
  simt::aligned(site);
  const bool is_float16 = std::is_same_v<T, __half>;
  simt::wgmma_sp(d, a, b, metadata, kN, kSelector, accumulate,
                 is_float16 ? simt::Element::float16 : simt::Element::bfloat16);
}
template <int kN>
void wgmma_sp_m64k64(std::int32_t (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                     std::uint32_t metadata, bool accumulate, Site site = Site::here()) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "the sizes that are spelled out");
  simt::aligned(site);
  simt::wgmma_sp(d, a, b, metadata, kN, 0, accumulate, simt::Element::int8);
}
template <int kN>
void wgmma_sp_m64k64(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b, std::uint32_t metadata,
                     bool accumulate, Site site = Site::here()) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "the sizes that are spelled out");
  simt::aligned(site);
  simt::wgmma_sp(d, a, b, metadata, kN, 0, accumulate, simt::Element::e4m3);
}

inline std::uint64_t wgmma_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
  return std::uint64_t((address & 0x3ffff) >> 4) | std::uint64_t(1) << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

}  // namespace madtp::cuda::ptx
