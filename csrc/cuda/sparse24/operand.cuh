// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a linear layer multiplies: a family of types is that of one op, and has elements of one size.

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/dtype.cuh"

namespace madtp::cuda {

// What products of X are summed in.
template <typename X>
using SumOf = std::conditional_t<std::is_same_v<X, std::int8_t>, std::int32_t, float>;

// Whether x and the weight are quantised, with a scale for each row of both.
template <typename X>
constexpr bool kIsQuantized = sizeof(X) == 1;

// A family has kBytes of an element; with(dtype, use), which calls use(X{}, T{}) with the elements of x and
// of the output of a call of this dtype; runs_on(device), whether mma.sp of it runs there, and
// kHasTile<Tile>, whether in such tiles.
struct HalfTypes {
  static constexpr int kBytes = 2;
  template <typename Use>
  static void with(DType dtype, Use&& use) {
    if (dtype == DType::bfloat16) {
      use(BFloat16{}, BFloat16{});
    } else {
      use(Float16{}, Float16{});
    }
  }
  static bool runs_on(const Device&) { return true; }
  template <typename Tile>
  static constexpr bool kHasTile = true;
};

template <typename X>
struct ByteTypes {
  static constexpr int kBytes = 1;
  template <typename Use>
  static void with(DType dtype, Use&& use) {
    with_type(dtype, [&](auto element) { use(X{}, element); });
  }
  // e4m3 came with 8.9: it is in code for an architecture alone, all of which are newer.
  static bool runs_on(const Device& device) {
    return std::is_same_v<X, std::int8_t> || device.specific_code >= 89;
  }
  // Of e4m3 a compiler makes float16 first, on sm_90a, for which larger tiles have no registers.
  template <typename Tile>
  static constexpr bool kHasTile = std::is_same_v<X, std::int8_t> || Tile::kTokens == 16;
};

}  // namespace madtp::cuda
