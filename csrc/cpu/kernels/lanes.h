// SPDX-License-Identifier: Apache-2.0
#pragma once

// Two vectors seen as one row of 2 kWidth lanes: its even and its odd lanes, and their way back.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/kernels/vec.h"

namespace madtp::cpu::MADTP_ISA {
namespace detail {

// Lane l is lane from(l) of a and b, one after the other.
template <typename From, std::size_t... Lane>
inline Vec shuffle(Vec a, Vec b, From from, std::index_sequence<Lane...>) {
#if defined(__GNUC__) && !defined(__clang__)
  constexpr IntVec lanes{std::int32_t(from(int(Lane)))...};
  return __builtin_shuffle(a, b, lanes);
#else
  return __builtin_shufflevector(a, b, from(int(Lane))...);
#endif
}

template <typename From>
inline Vec shuffle(Vec a, Vec b, From from) {
  return shuffle(a, b, from, std::make_index_sequence<kWidth>{});
}

}  // namespace detail

inline Vec even_lanes(Vec a, Vec b) {
  return detail::shuffle(a, b, [](int lane) { return 2 * lane; });
}

inline Vec odd_lanes(Vec a, Vec b) {
  return detail::shuffle(a, b, [](int lane) { return 2 * lane + 1; });
}

// The first half of the row whose even lanes are `even` and whose odd lanes are `odd`.
inline Vec first_half(Vec even, Vec odd) {
  return detail::shuffle(even, odd, [](int lane) { return lane % 2 * kWidth + lane / 2; });
}

inline Vec second_half(Vec even, Vec odd) {
  return detail::shuffle(even, odd, [](int lane) { return lane % 2 * kWidth + kWidth / 2 + lane / 2; });
}

}  // namespace madtp::cpu::MADTP_ISA
