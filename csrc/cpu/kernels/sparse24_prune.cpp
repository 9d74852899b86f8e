// SPDX-License-Identifier: Apache-2.0
// From a dense weight to 2:4 in one read: a lane holds a group of 4 columns, so that ranks are comparisons of
// vectors. Rows are independent; what is written depends on the row alone.

#include "cpu/kernels/dtype.h"
#include "cpu/kernels/lanes.h"
#include "cpu/kernels/sparse24.h"

namespace madtp::cpu::MADTP_ISA {
namespace {

constexpr int kStep = 4 * kWidth;  // columns at a time: a group per lane

typedef std::uint64_t PairVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint8_t ByteVec __attribute__((vector_size(kWidth / 2)));

// Lane g of vector i is entry i of group g.
struct Groups {
  Vec entry[4];
};

struct Kept {
  IntVec entry[4];  // all ones or all zeros
};

template <typename T>
Groups load_groups(const T* from) {
  const Vec a = load(from), b = load(from + kWidth), c = load(from + 2 * kWidth), d = load(from + 3 * kWidth);
  const Vec even_ab = even_lanes(a, b), odd_ab = odd_lanes(a, b);
  const Vec even_cd = even_lanes(c, d), odd_cd = odd_lanes(c, d);
  return {{even_lanes(even_ab, even_cd), even_lanes(odd_ab, odd_cd), odd_lanes(even_ab, even_cd),
           odd_lanes(odd_ab, odd_cd)}};
}

IntVec any_nan(const Groups& x) {
  IntVec nan{};
  for (const Vec& v : x.entry) nan |= v != v;
  return nan;
}

Groups magnitudes(const Groups& x) {
  Groups result;
  for (int i = 0; i < 4; ++i) result.entry[i] = bit_cast<Vec>(bit_cast<BitVec>(x.entry[i]) & 0x7fffffffu);
  return result;
}

// The two entries that fewer than two others beat, earlier ones by being equal. A comparison is -1 or 0.
Kept two_largest(const Groups& key) {
  const Vec &k0 = key.entry[0], &k1 = key.entry[1], &k2 = key.entry[2], &k3 = key.entry[3];
  const IntVec one0 = k1 > k0, two0 = k2 > k0, three0 = k3 > k0, two1 = k2 > k1, three1 = k3 > k1,
               three2 = k3 > k2;
  return {{one0 + two0 + three0 > -2, two1 + three1 - one0 > -1, three2 - two0 - two1 > 0,
           three0 + three1 + three2 < -1}};
}

// kStep columns. score may be null. Returns the lanes that met a NaN.
template <typename T>
IntVec prune_step(const T* weight, const float* score, T* values, std::uint8_t* indices) {
  Groups w = load_groups(weight);
  IntVec nan = any_nan(w);
  if (score != nullptr) {  // what it does not keep is zero; where the zeros stand is the magnitudes' choice
    const Groups scores = load_groups(score);
    nan |= any_nan(scores);
    const Kept chosen = two_largest(scores);
    for (int i = 0; i < 4; ++i) w.entry[i] = select(chosen.entry[i], w.entry[i], Vec{});
  }
  const Kept kept = two_largest(magnitudes(w));
  const IntVec is0 = kept.entry[0], is1 = kept.entry[1], is2 = kept.entry[2], is3 = kept.entry[3];
  // + 0 turns -0 into 0.
  const Vec first = select(is0, w.entry[0], select(is1, w.entry[1], w.entry[2])) + 0.0f;
  const Vec second = select(is3, w.entry[3], select(is2, w.entry[2], w.entry[1])) + 0.0f;
  store(values, first_half(first, second));
  store(values + kWidth, second_half(first, second));

  const IntVec column0 = ~is0 & (2 + is1), column1 = 1 - (is3 | is2) - is3;
  const PairVec pairs = bit_cast<PairVec>(column0 | column1 << 2);  // two nibbles each, 32 bits apart
  const ByteVec bytes = __builtin_convertvector(pairs | pairs >> 28, ByteVec);
  __builtin_memcpy(indices, &bytes, sizeof bytes);
  return nan;
}

// Returns whether the row is free of NaN.
template <typename T>
bool prune_row(const T* weight, const float* score, std::int64_t in_features, T* values,
               std::uint8_t* indices) {
  IntVec nan{};
  std::int64_t c = 0;
  for (; c + kStep <= in_features; c += kStep)
    nan |= prune_step(weight + c, score == nullptr ? nullptr : score + c, values + c / 2, indices + c / 8);
  if (const std::int64_t rest = in_features - c; rest > 0) {
    T part[kStep] = {}, part_values[kStep / 2];
    float part_score[kStep] = {};
    std::uint8_t part_indices[kStep / 8];
    __builtin_memcpy(part, weight + c, std::size_t(rest) * sizeof(T));
    if (score != nullptr) __builtin_memcpy(part_score, score + c, std::size_t(rest) * sizeof(float));
    nan |= prune_step(part, score == nullptr ? nullptr : part_score, part_values, part_indices);
    __builtin_memcpy(values + c / 2, part_values, std::size_t(rest) / 2 * sizeof(T));
    __builtin_memcpy(indices + c / 8, part_indices, std::size_t(rest) / 8);
  }
  std::int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= nan[i];
  return any == 0;
}

}  // namespace

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, int threads) {
  const std::int64_t in_features = dense.in_features;
  bool no_nan = true;
  with_type(dense.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(&& : no_nan)
    for (std::int64_t row = 0; row < dense.out_features; ++row) {
      const T* const weight = static_cast<const T*>(dense.weight) + row * dense.weight_stride;
      const float* const score = dense.score == nullptr ? nullptr : dense.score + row * dense.score_stride;
      const bool sound =
          prune_row(weight, score, in_features, static_cast<T*>(values) + row * (in_features / 2),
                    indices + row * (in_features / 8));
      no_nan = no_nan && sound;
    }
  });
  return no_nan ? Status::ok : Status::invalid_argument;
}

}  // namespace madtp::cpu::MADTP_ISA
