// SPDX-License-Identifier: Apache-2.0
#pragma once

// What changes scores between the product of queries and keys and the softmax: a soft cap bends them, ALiBi
// (Press et al., ICLR 2022, arXiv 2108.12409) tilts them.

#include "cpu/kernels/attention_panels.h"

namespace madtp::cpu::MADTP_ISA {

// tanh(x) to about 1 ulp; NaN is NaN.
inline Vec tanh(Vec x) {
  const BitVec sign = bit_cast<BitVec>(x) & 0x80000000u;
  const Vec size = bit_cast<Vec>(bit_cast<BitVec>(x) ^ sign), square = x * x;
  // Near 0 what the exponential gives would cancel. The polynomial is that of Cephes.
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = p * (square * x) + x;
  const Vec e = exp2_nonpositive(size * (-2 * kLog2E));
  const Vec far = bit_cast<Vec>(bit_cast<BitVec>((1.0f - e) / (1.0f + e)) | sign);
  return select(size < broadcast(0.625f), near, far);
}

// Of the scores of one head in one block, which are to base 2.
struct Bias {
  float softcap = 0;          // of scores to base e; 0: none
  float slope = 0;            // what is taken off a score for each key of distance
  std::int64_t position = 0;  // where row 0 stands among the keys of the block

  Bias() = default;
  Bias(const AttentionInputs& a, const Sequence& s, std::int64_t head, const Visible& visible)
      : softcap(a.softcap),
        slope(a.alibi_slopes == nullptr ? 0 : a.alibi_slopes[s.number * a.alibi_stride + head] * kLog2E),
        position(visible.position) {}

  explicit operator bool() const { return softcap > 0 || slope != 0; }

  // Scores of keys that are so far from the query; `derivative` is set to that of what becomes of them.
  Vec apply(Vec scores, Vec distance, Vec& derivative) const {
    if (softcap > 0) {
      const Vec bent = tanh(scores * (kLogE2 / softcap));
      scores = bent * softcap * kLog2E;
      derivative = 1.0f - bent * bent;
    }
    return scores - distance * slope;
  }
};

inline Vec lane_numbers() {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = float(i);
  return v;
}

// A panel of `rows` rows, of which `vectors` vectors count; derivatives are likewise, or null. Out of line,
// as it takes the registers of the products, and few ask for it.
__attribute__((noinline)) inline void apply_bias(const Bias& bias, std::int64_t panel, int rows, int vectors,
                                                 float* scores, float* derivatives) {
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* const at = scores + r * kPanel + v * kWidth;
      const std::int64_t ahead = bias.position + r - panel * kPanel - v * kWidth;
      const Vec distance = broadcast(float(ahead)) - lane_numbers();
      Vec derivative{};
      store(at, bias.apply(load(at), max(distance, -distance), derivative));
      if (derivatives != nullptr) store(derivatives + r * kPanel + v * kWidth, derivative);
    }
  }
}

}  // namespace madtp::cpu::MADTP_ISA
