// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows in floating point -> int8 with a scale each, as madtp/quantized.h says.

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels/activation.h"
#include "cpu/kernels/vec.h"

namespace madtp::cpu::MADTP_ISA {

constexpr float kMinAmax = 1.504632769052528e-36f;  // 2^-119

// v, which a compiler then cannot make a part of an FMA: the next operation has the product as it was
// rounded.
inline Vec rounded(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

typedef std::int8_t Int8Vec __attribute__((vector_size(kWidth)));

// The lanes, which are int8 numbers already. From __builtin_convertvector g++ moves them one by one, but for
// AVX-512.
inline Int8Vec to_int8(IntVec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i wide = bit_cast<__m256i>(v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return bit_cast<Int8Vec>(_mm_cvtsi128_si64(_mm_packs_epi16(shorts, shorts)));
#elif defined(__SSE2__) && !defined(__AVX512F__)
  const __m128i shorts = _mm_packs_epi32(bit_cast<__m128i>(v), bit_cast<__m128i>(v));
  return bit_cast<Int8Vec>(_mm_cvtsi128_si32(_mm_packs_epi16(shorts, shorts)));
#elif defined(__aarch64__)
  const int16x4_t shorts = vmovn_s32(bit_cast<int32x4_t>(v));
  const int8x8_t twice = vmovn_s16(vcombine_s16(shorts, shorts));
  return bit_cast<Int8Vec>(vget_lane_s32(vreinterpret_s32_s8(twice), 0));
#else
  return __builtin_convertvector(v, Int8Vec);
#endif
}

// x (columns,) -> to (columns rounded up to `padded`, with zeros); returns the scale.
template <typename T>
float quantize_row(const T* x, std::int64_t columns, std::int64_t padded, std::int8_t* to) {
  Vec most{};
  for_each_vector(
      columns, [&](std::int64_t i, auto load, auto) { most = max_nonnegative(most, absolute(load(x + i))); });
  const float amax = reduce(most, max_nonnegative);
  std::int64_t done = 0;
  float scale = 0;
  if (!(amax <= 3.402823466e38f)) {
    scale = bit_cast<float>(0x7fc00000u);  // NaN
  } else if (amax >= kMinAmax) {
    scale = amax / 127.0f;
    const Vec inverse = broadcast(127.0f / amax);
    const Vec magic =
        broadcast(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer, half to even
    for_each_vector(columns, [&](std::int64_t i, auto load, auto) {
      const Vec shifted = rounded(load(x + i) * inverse) + magic;
      const IntVec integers = bit_cast<IntVec>(shifted) - bit_cast<IntVec>(magic);
      const Int8Vec bytes = to_int8(integers);
      __builtin_memcpy(to + i, &bytes, sizeof bytes);  // `to` is padded, and lanes without a column are zero
    });
    done = (columns + kWidth - 1) / kWidth * kWidth;
  }
  __builtin_memset(to + done, 0, std::size_t(padded - done));
  return scale;
}

}  // namespace madtp::cpu::MADTP_ISA
