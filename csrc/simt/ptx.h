// SPDX-License-Identifier: Apache-2.0
#pragma once

// The functions of cuda/ptx.cuh, by the PTX manual, on the simulated machine. Those that the manual calls
// `.aligned` say where they were called.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "simt/copies.h"
#include "simt/matrix.h"

// Dynamic shared memory ends where nothing may be touched.
#define MADTP_DYNAMIC_SHARED(name) unsigned char* const name = madtp::simt::block().shared

namespace madtp::cuda::ptx {

using simt::Site;

inline std::uint32_t shared_address(const void* pointer) {
  simt::Block& b = simt::block();
  return std::uint32_t(static_cast<const unsigned char*>(pointer) - b.shared) + simt::kSharedBase;
}

// --- copies of 16 bytes

inline void cp_async_16(std::uint32_t to, const void* from, int bytes = 16) {
  simt::cp_async(to, from, bytes);
}
inline void cp_async_commit_group() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait_group() {
  simt::wait_for_copies(kPending);
}

// --- fragments

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address, Site site = Site::here()) {
  simt::aligned(site);
  simt::ldmatrix_x4(r, address);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address, Site site = Site::here()) {
  simt::aligned(site);
  simt::ldmatrix_x4_trans(r, address);
}

template <typename T, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                     std::uint32_t metadata, Site site = Site::here()) {
  static_assert(kSelector == 0 || kSelector == 1, "of four lanes, the first or the last two");
  simt::aligned(site);
  const bool is_float16 = std::is_same_v<T, __half>;
  simt::mma_sp(d, a, b, metadata, kSelector, is_float16 ? simt::Element::float16 : simt::Element::bfloat16);
}
inline void mma_sp_m16n8k64(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                            std::uint32_t metadata, Site site = Site::here()) {
  simt::aligned(site);
  simt::mma_sp(d, a, b, metadata, 0, simt::Element::int8);
}
inline void mma_sp_m16n8k64(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                            std::uint32_t metadata, Site site = Site::here()) {
  simt::aligned(site);
  if (simt::options.capability < 89)
    simt::fail("mma.sp: a device of %d has no e4m3", simt::options.capability);
  simt::mma_sp(d, a, b, metadata, 0, simt::Element::e4m3);
}

// --- approximate functions: exact here

inline float ex2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1 / x; }

inline float add_here(float a, float b) { return a + b; }
inline float to_float_here(std::int32_t a) { return float(a); }
inline float to_float_here(float a) { return a; }

}  // namespace madtp::cuda::ptx
