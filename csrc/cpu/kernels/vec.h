// SPDX-License-Identifier: Apache-2.0
#pragma once

// A vector of floats as wide as the instruction set this file is compiled for, and the three element types
// loaded into it and stored from it. Compiler vector extensions, so that one source serves SSE2, AVX2,
// AVX-512 and other machines; operators work element by element and a * b + c becomes one FMA where there is
// one.

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(MADTP_ISA)
#error "files in cpu/kernels are compiled once per instruction set: see cmake/Isa.cmake"
#endif

namespace madtp::cpu::MADTP_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t BitVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));

// The element types. bfloat16 and float16 are only ever converted, never computed with.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec broadcast(float value) { return value - Vec{}; }  // x - 0 is x, and free; 0 + x is not

// Lane by lane: mask is all ones or all zeros per lane, as comparisons give it.
inline Vec select(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }

// Lane by lane the larger of the two; b where either is NaN.
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

// The larger of two that have no sign bit; NaN where either is NaN, as its bits are above all others.
inline Vec max_nonnegative(Vec a, Vec b) {
  const BitVec x = bit_cast<BitVec>(a), y = bit_cast<BitVec>(b);
  return bit_cast<Vec>(x > y ? x : y);
}

// Lane by lane the larger of the two; NaN where either is NaN.
inline Vec max_or_nan(Vec a, Vec b) { return select((b > a) | (b != b), b, a); }

#if defined(__GNUC__) && !defined(__clang__)
namespace detail {
// v, its lanes moved by Step.
template <int Step, std::size_t... Lane>
inline Vec rotate(Vec v, std::index_sequence<Lane...>) {
  constexpr IntVec from{std::int32_t((Lane + Step) % kWidth)...};
  return __builtin_shuffle(v, from);
}
}  // namespace detail

// All lanes combined in a tree.
template <typename Combine>
inline float reduce(Vec v, Combine combine) {
  constexpr std::make_index_sequence<kWidth> lanes;
  if constexpr (kWidth > 8) v = combine(v, detail::rotate<8>(v, lanes));
  if constexpr (kWidth > 4) v = combine(v, detail::rotate<4>(v, lanes));
  v = combine(v, detail::rotate<2>(v, lanes));
  return combine(v, detail::rotate<1>(v, lanes))[0];
}
#else
template <typename Combine>
inline float reduce(Vec v, Combine combine) {
  for (int step = kWidth / 2; step > 0; step /= 2) {
    Vec moved;
    for (int i = 0; i < kWidth; ++i) moved[i] = v[(i + step) % kWidth];
    v = combine(v, moved);
  }
  return v[0];
}
#endif

inline Vec add(Vec a, Vec b) { return a + b; }

inline float sum(Vec v) { return reduce(v, add); }

// The largest lane, NaN if one is.
inline float highest_or_nan(Vec v) { return reduce(v, max_or_nan); }

#if defined(__GNUC__) && !defined(__clang__)
namespace detail {
// Swaps the off-diagonal Step x Step squares of every 2 Step x 2 Step square of the tile.
template <int Step, std::size_t Rows, std::size_t... Lane>
inline void transpose_step(Vec (&tile)[Rows], std::index_sequence<Lane...>) {
  constexpr IntVec upper{std::int32_t(Lane & Step ? kWidth + Lane - Step : Lane)...};
  constexpr IntVec lower{std::int32_t(Lane & Step ? kWidth + Lane : Lane + Step)...};
#pragma GCC unroll 16
  for (int i = 0; i < int(Rows); ++i) {
    if (i & Step) continue;
    const Vec a = tile[i], b = tile[i + Step];
    tile[i] = __builtin_shuffle(a, b, upper);
    tile[i + Step] = __builtin_shuffle(a, b, lower);
  }
}
}  // namespace detail

namespace detail {
// Rows i and i + Step become one: lanes without the bit Step hold row i, lanes with it row i + Step.
template <int Step, typename Combine>
inline void fold(Vec (&tile)[kWidth], Combine combine) {
  transpose_step<Step>(tile, std::make_index_sequence<kWidth>{});
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i += 2 * Step) tile[i] = combine(tile[i], tile[i + Step]);
}
}  // namespace detail

// tile[i][j] <-> tile[j][i] in every square of Rows lanes, side by side
template <std::size_t Rows>
inline void transpose(Vec (&tile)[Rows]) {
  constexpr std::make_index_sequence<kWidth> lanes;
  if constexpr (Rows > 1) detail::transpose_step<1>(tile, lanes);
  if constexpr (Rows > 2) detail::transpose_step<2>(tile, lanes);
  if constexpr (Rows > 4) detail::transpose_step<4>(tile, lanes);
  if constexpr (Rows > 8) detail::transpose_step<8>(tile, lanes);
}
#else
namespace detail {
template <int Step, typename Combine>
inline void fold(Vec (&tile)[kWidth], Combine combine) {
  for (int i = 0; i < kWidth; i += 2 * Step) {
    const Vec a = tile[i], b = tile[i + Step];
    Vec upper, lower;
    for (int lane = 0; lane < kWidth; ++lane) {
      upper[lane] = lane & Step ? b[lane - Step] : a[lane];
      lower[lane] = lane & Step ? b[lane] : a[lane + Step];
    }
    tile[i] = combine(upper, lower);
  }
}
}  // namespace detail

template <std::size_t Rows>
inline void transpose(Vec (&tile)[Rows]) {
  for (int square = 0; square < kWidth; square += int(Rows)) {
    for (int i = 0; i < int(Rows); ++i) {
      for (int j = 0; j < i; ++j) {
        const float below = tile[i][square + j];
        tile[i][square + j] = tile[j][square + i];
        tile[j][square + i] = below;
      }
    }
  }
}
#endif

// --- load and store, converting to and from float

namespace detail {

inline HalfVec load_half(const void* from) {
  HalfVec bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return bits;
}

inline void store_half(void* to, HalfVec bits) { __builtin_memcpy(to, &bits, sizeof bits); }

#if !defined(__F16C__)
inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float magnitude = float(mantissa) * (1.0f / 16777216.0f);
    return bit_cast<float>(bit_cast<std::uint32_t>(magnitude) | sign);
  }
  const std::uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return bit_cast<float>(sign | (biased << 23) | (mantissa << 13));
}

inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value), sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return std::uint16_t(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the mantissa, rounded, in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return std::uint16_t(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);  // to nearest, ties to even
  return std::uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}
#endif

}  // namespace detail

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline IntVec load_ints(const std::int32_t* from) {
  IntVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const BFloat16* from) {
  return bit_cast<Vec>(__builtin_convertvector(detail::load_half(from), BitVec) << 16);
}

inline Vec load(const Float16* from) {
  const HalfVec bits = detail::load_half(from);
#if defined(__AVX512F__)
  // maskz with a full mask is the plain instruction, and does not trip g++ 12's -Wmaybe-uninitialized.
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = detail::half_to_float(bits[i]);
  return v;
#endif
}

inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(std::int32_t* to, IntVec v) { __builtin_memcpy(to, &v, sizeof v); }

inline void store(BFloat16* to, Vec v) {
  const BitVec bits = bit_cast<BitVec>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // ties to even
  const BitVec is_nan = bit_cast<BitVec>(v != v);
  const BitVec high = (is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & (rounded >> 16));
  detail::store_half(to, __builtin_convertvector(high, HalfVec));
}

inline void store(Float16* to, Vec v) {
#if defined(__AVX512F__)
  detail::store_half(
      to, bit_cast<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__F16C__)
  detail::store_half(to, bit_cast<HalfVec>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT)));
#else
  HalfVec bits;
  for (int i = 0; i < kWidth; ++i) bits[i] = detail::float_to_half(v[i]);
  detail::store_half(to, bits);
#endif
}

// The first `count` < kWidth elements; the other lanes are zero.
template <typename T>
inline Vec load_part(const T* from, std::int64_t count) {
  T block[kWidth] = {};
  __builtin_memcpy(block, from, std::size_t(count) * sizeof(T));
  return load(block);
}

template <typename T>
inline void store_part(T* to, Vec v, std::int64_t count) {
  T block[kWidth];
  store(block, v);
  __builtin_memcpy(to, block, std::size_t(count) * sizeof(T));
}

// Calls body(offset, load, store) for every kWidth of `count` elements, the last one with partial access:
// load(pointer) and store(pointer, v) take pointers at the offset.
template <typename Body>
inline void for_each_vector(std::int64_t count, Body&& body) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    body(i, [](auto* from) { return load(from); }, [](auto* to, Vec v) { store(to, v); });
  if (const std::int64_t rest = count - i; rest > 0)
    body(
        i, [rest](auto* from) { return load_part(from, rest); },
        [rest](auto* to, Vec v) { store_part(to, v, rest); });
}

// to[r] = all lanes of rows[r] combined, for many rows at once: far fewer shuffles than row by row. Pairs of
// rows fold into one vector until lane r holds row r; the order is that of a tree, the same for every row. to
// has room for R rounded up to kWidth.
template <int R, typename Combine>
inline void reduce_rows(const Vec (&rows)[R], Combine combine, float* to) {
  for (int first = 0; first < R; first += kWidth) {
    Vec tile[kWidth];
    for (int i = 0; i < kWidth; ++i) tile[i] = first + i < R ? rows[first + i] : Vec{};
    detail::fold<1>(tile, combine);
    detail::fold<2>(tile, combine);
    if constexpr (kWidth > 4) detail::fold<4>(tile, combine);
    if constexpr (kWidth > 8) detail::fold<8>(tile, combine);
    store(to + first, tile[0]);
  }
}

// log2(x) to about 1 ulp for finite x > 0 that are not subnormal.
inline Vec log2_positive(Vec x) {
  // x = 2^e m with m in [1/sqrt(2), sqrt(2)), and log(m) = 2 atanh((m - 1) / (m + 1)).
  const BitVec shifted = bit_cast<BitVec>(x) - 0x3f3504f3u;
  const IntVec exponent = bit_cast<IntVec>(shifted) >> 23;
  const Vec m = bit_cast<Vec>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const Vec s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Vec p = broadcast(2.885390082f / 9);
  p = p * square + 2.885390082f / 7;
  p = p * square + 2.885390082f / 5;
  p = p * square + 2.885390082f / 3;
  p = p * square + 2.885390082f;
  return p * s + __builtin_convertvector(exponent, Vec);
}

// How far a result is from the exact one: about 1 ulp, or little enough to vanish where it is rounded to 16
// bits.
enum class Accuracy { full, half };

// 2^(x + kScale) for x <= 0 where that is a normal number; the relative error of `half` is 3e-6. Below, where
// x + kScale is under -126, it falls to 0, which it is exactly from -127 on. NaN is NaN.
template <int kScale = 0, Accuracy kAccuracy = Accuracy::full>
inline Vec exp2_nonpositive(Vec x) {
  constexpr float kOne = float(1 << kScale);
  const Vec lowest = broadcast(-127.0f - kScale);  // its p is kOne, and all bits of that are taken off
  const Vec magic = broadcast(12582912.0f);        // 1.5 * 2^23: rounds to an integer
  x = max(lowest, x);                              // in this order NaN stays
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p;
  if constexpr (kAccuracy == Accuracy::full) {
    p = broadcast(kOne * 1.534581180e-4f);
    p = p * f + kOne * 1.339993122e-3f;
    p = p * f + kOne * 9.618488958e-3f;
    p = p * f + kOne * 5.550328777e-2f;
    p = p * f + kOne * 2.402264689e-1f;
    p = p * f + kOne * 6.931472057e-1f;
  } else {
    p = broadcast(kOne * 9.582863189e-3f);
    p = p * f + kOne * 5.590645224e-2f;
    p = p * f + kOne * 2.402409911e-1f;
    p = p * f + kOne * 6.931241751e-1f;
  }
  p = p * f + kOne;
  return bit_cast<Vec>(bit_cast<BitVec>(p) + (bit_cast<BitVec>(shifted) << 23));
}

}  // namespace madtp::cpu::MADTP_ISA
