// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a kernel has without including anything: where it is, the barrier, votes and shuffles of whole warps,
// and the functions of the CUDA math library that ours use.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "simt/machine.h"

#define threadIdx (madtp::simt::self().index)
#define blockIdx (madtp::simt::block().index)

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

namespace madtp::simt {

// The barrier of the block, whose threads may give each other a value.
template <typename Operation>
int all_threads(const char* name, int value, Operation&& operation) {
  const unsigned threads = unsigned(block().threads.size());
  Meeting& barrier = block().barrier;
  meet(barrier, threads, unsigned(barrier.arrived.size()), name, &value, [&](const std::vector<void*>& all) {
    const auto of = [&](unsigned i) -> int& { return *static_cast<int*>(all[i]); };
    int result = of(0);
    for (unsigned i = 1; i < threads; ++i) result = operation(result, of(i));
    for (unsigned i = 0; i < threads; ++i) of(i) = result;
  });
  return value;
}

template <typename T>
struct Shuffled {
  T in, out;
  int by;
};

// source(lane, by) is the lane to read from; out of the warp, a lane keeps its own.
template <typename T, typename Source>
T shuffle(const char* name, unsigned mask, T value, int by, Source&& source) {
  if (mask != 0xffffffffu) fail("%s: lanes %08x; only whole warps are modelled", name, mask);
  Shuffled<T> mine{value, value, by};
  with_warp(name, mine, [&](auto&& of) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int from = source(lane, of(unsigned(lane)).by);
      if (from >= 0 && from < kWarpSize) of(unsigned(lane)).out = of(unsigned(from)).in;
    }
  });
  return mine.out;
}

}  // namespace madtp::simt

inline void __syncthreads(madtp::simt::Site site = madtp::simt::Site::here()) {
  madtp::simt::aligned(site);
  madtp::simt::all_threads("__syncthreads", 0, [](int a, int) { return a; });
}
inline int __syncthreads_or(int value, madtp::simt::Site site = madtp::simt::Site::here()) {
  madtp::simt::aligned(site);
  return madtp::simt::all_threads("__syncthreads_or", value != 0, [](int a, int b) { return a | b; });
}
inline int __syncthreads_and(int value, madtp::simt::Site site = madtp::simt::Site::here()) {
  madtp::simt::aligned(site);
  return madtp::simt::all_threads("__syncthreads_and", value != 0, [](int a, int b) { return a & b; });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  madtp::simt::shuffle("__syncwarp", mask, 0, 0, [](int lane, int) { return lane; });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return madtp::simt::shuffle("__shfl_sync", mask, value, from, [](int, int by) { return by & 31; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return madtp::simt::shuffle("__shfl_up_sync", mask, value, int(distance),
                              [](int lane, int by) { return lane - by; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return madtp::simt::shuffle("__shfl_down_sync", mask, value, int(distance),
                              [](int lane, int by) { return lane + by; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return madtp::simt::shuffle("__shfl_xor_sync", mask, value, with,
                              [](int lane, int by) { return lane ^ by; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = unsigned(predicate != 0);
  if (mask != 0xffffffffu)
    madtp::simt::fail("__ballot_sync: lanes %08x; only whole warps are modelled", mask);
  madtp::simt::with_warp("__ballot_sync", votes, [](auto&& of) {
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) all |= of(lane) << lane;
    for (unsigned lane = 0; lane < 32; ++lane) of(lane) = all;
  });
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  if (mask != 0xffffffffu)
    madtp::simt::fail("__reduce_add_sync: lanes %08x; only whole warps are modelled", mask);
  madtp::simt::with_warp("__reduce_add_sync", value, [](auto&& of) {
    unsigned sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) sum += of(lane);
    for (unsigned lane = 0; lane < 32; ++lane) of(lane) = sum;
  });
  return value;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return int(__reduce_add_sync(mask, unsigned(value)));
}

// For what a block hands to another, which is not modelled: clusters run one after another.
[[noreturn]] inline void __threadfence() {
  madtp::simt::fail("__threadfence: blocks run one after another, and may hand nothing to each other");
}
template <typename T, typename... Values>
T atomicAdd(T*, Values...) {
  madtp::simt::fail("atomicAdd: blocks run one after another, and may hand nothing to each other");
}
template <typename T, typename... Values>
T atomicExch(T*, Values...) {
  madtp::simt::fail("atomicExch: blocks run one after another, and may hand nothing to each other");
}
template <typename T, typename... Values>
T atomicCAS(T*, Values...) {
  madtp::simt::fail("atomicCAS: blocks run one after another, and may hand nothing to each other");
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // by itself: never part of a multiply-add
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline float normcdff(float x) { return float(0.5 * std::erfc(-double(x) * M_SQRT1_2)); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
