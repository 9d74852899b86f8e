// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows in floating point -> int8 with a scale each, as madtp/quantized.h says.

#include <cstdint>

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

// x (columns,) -> to (columns rounded up to `padded`, with zeros); returns the scale.
template <typename T>
float quantize_row(const T* x, std::int64_t columns, std::int64_t padded, std::int8_t* to) {
  typedef std::int8_t ByteVec __attribute__((vector_size(kWidth)));
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
      const ByteVec bytes = __builtin_convertvector(integers, ByteVec);
      __builtin_memcpy(to + i, &bytes, sizeof bytes);  // `to` is padded, and lanes without a column are zero
    });
    done = (columns + kWidth - 1) / kWidth * kWidth;
  }
  __builtin_memset(to + done, 0, std::size_t(padded - done));
  return scale;
}

}  // namespace madtp::cpu::MADTP_ISA
