// SPDX-License-Identifier: Apache-2.0
#include <random>
#include <vector>

#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// Numbers with many ties, zeros of both signs, infinities and subnormal numbers among them, as bytes of a
// dtype; rows of weight and score are `gap` elements further apart than they are long.
struct PruneCase {
  DType dtype;
  std::int64_t out_features, in_features, gap;
  Guarded<std::uint8_t> weight;
  Guarded<float> score;

  PruneCase(DType dtype, std::int64_t out_features, std::int64_t in_features, std::int64_t gap)
      : dtype(dtype),
        out_features(out_features),
        in_features(in_features),
        gap(gap),
        weight(out_features * (in_features + gap) * std::int64_t(size_of(dtype))),
        score(out_features * (in_features + gap)) {
    std::mt19937 generator(unsigned(out_features + in_features));
    const auto draw = [&] {
      constexpr float magnitudes[] = {0, 0, 0.5f, 1, 1, 2, 1e-40f, std::numeric_limits<float>::infinity()};
      const float magnitude = magnitudes[generator() % 8];
      return generator() % 2 == 0 ? magnitude : -magnitude;
    };
    for (std::int64_t row = 0; row < out_features; ++row) {
      for (std::int64_t c = 0; c < in_features; ++c) {
        put(row, c, draw());
        score[row * (in_features + gap) + c] = draw();
      }
    }
  }

  void put(std::int64_t row, std::int64_t column, float x) const {
    const std::int64_t at = row * (in_features + gap) + column;
    if (dtype == DType::float32)
      reinterpret_cast<float*>(weight.data())[at] = x;
    else
      reinterpret_cast<std::uint16_t*>(weight.data())[at] = encode(x, dtype);
  }

  Sparse24Dense dense(bool scored) const {
    return {
        dtype,        weight.data(), in_features + gap, scored ? score.data() : nullptr, in_features + gap,
        out_features, in_features};
  }
};

// (columns, rows), rows 8 further apart than they are long.
template <typename T>
Guarded<T> turned(const T* from, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  Guarded<T> to(columns * (rows + 8));
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) to[c * (rows + 8) + r] = from[r * stride + c];
  return to;
}

struct Pruned {
  Guarded<std::uint8_t> values, indices;
  Guarded<std::int32_t> has_nan{1};

  explicit Pruned(const PruneCase& p)
      : values(p.out_features * p.in_features / 2 * std::int64_t(size_of(p.dtype))),
        indices(p.out_features * p.in_features / 8) {}

  void run(const Sparse24Dense& dense) const {
    EXPECT(cuda::sparse24_prune(dense, values.data(), indices.data(), has_nan.data(), nullptr) == Status::ok);
  }
};

// What runs the weight as it lies, and then turned over.
template <typename Check>
void both_ways(const PruneCase& p, bool scored, Check&& check) {
  Sparse24Dense dense = p.dense(scored);
  check(dense);
  const auto turn = [&](auto zero) {
    using T = decltype(zero);
    const Guarded<T> weight = turned(reinterpret_cast<const T*>(p.weight.data()), p.out_features,
                                     p.in_features, p.in_features + p.gap);
    const Guarded<float> score = turned(p.score.data(), p.out_features, p.in_features, p.in_features + p.gap);
    dense.weight = weight.data();
    dense.score = scored ? score.data() : nullptr;
    dense.weight_stride = dense.score_stride = p.out_features + 8;
    dense.transposed = true;
    check(dense);
  };
  if (p.dtype == DType::float32)
    turn(float{});
  else
    turn(std::uint16_t{});
}

}  // namespace

TEST(pruning_gives_the_bits_of_the_cpu) {
  for (DType dtype : kTypes) {
    for (std::int64_t out_features : {8, 72}) {
      for (std::int64_t in_features : {16, 48, 80, 528}) {
        const PruneCase p(dtype, out_features, in_features, 8);
        for (bool scored : {false, true}) {
          const Pruned expected(p);
          EXPECT(cpu::sparse24_prune(p.dense(scored), expected.values.data(), expected.indices.data(), 1) ==
                 Status::ok);
          both_ways(p, scored, [&](const Sparse24Dense& dense) {
            const Pruned got(p);
            got.run(dense);
            EXPECT(got.has_nan[0] == 0);
            EXPECT(got.values.values() == expected.values.values());
            EXPECT(got.indices.values() == expected.indices.values());
          });
        }
      }
    }
  }
  for (const auto& empty : {PruneCase(DType::float32, 0, 16, 0), PruneCase(DType::float32, 8, 0, 0)}) {
    const Pruned got(empty);
    got.run(empty.dense(false));
    EXPECT(got.has_nan[0] == 0);
  }
}

TEST(a_nan_anywhere_is_reported) {
  for (DType dtype : kTypes) {
    for (std::int64_t column : {0, 21, 47}) {
      const PruneCase p(dtype, 72, 48, 0), q(dtype, 72, 48, 0);
      p.put(67, column, kNaN);
      q.score[67 * 48 + column] = -kNaN;
      for (bool scored : {false, true}) {
        both_ways(p, scored, [&](const Sparse24Dense& dense) {
          const Pruned got(p);
          got.run(dense);
          EXPECT(got.has_nan[0] == 1);
        });
        both_ways(q, scored, [&](const Sparse24Dense& dense) {
          const Pruned got(q);
          got.run(dense);
          EXPECT(got.has_nan[0] == int(scored));
        });
      }
    }
  }
}

TEST(bad_dense_weights_are_not_pruned) {
  const PruneCase p(DType::bfloat16, 16, 32, 0);
  const Pruned out(p);
  const auto refused = [&](auto change) {
    Sparse24Dense dense = p.dense(true);
    change(dense);
    EXPECT(cuda::sparse24_prune(dense, out.values.data(), out.indices.data(), out.has_nan.data(), nullptr) ==
           Status::invalid_argument);
  };
  refused([](Sparse24Dense& a) { a.in_features = 24; });
  refused([](Sparse24Dense& a) { a.out_features = 12; });
  refused([](Sparse24Dense& a) { a.out_features = -8; });
  refused([](Sparse24Dense& a) { a.weight = nullptr; });
  refused([](Sparse24Dense& a) { a.weight = static_cast<const char*>(a.weight) + 2; });
  refused([](Sparse24Dense& a) { a.weight_stride = 36; });
  refused([](Sparse24Dense& a) { a.score = a.score + 1; });
  refused([](Sparse24Dense& a) { a.score_stride = 33; });
  refused([](Sparse24Dense& a) { a.dtype = DType(3); });
  const Sparse24Dense good = p.dense(false);
  std::uint8_t* const values = out.values.data();
  std::int32_t* const has_nan = out.has_nan.data();
  EXPECT(cuda::sparse24_prune(good, values, out.indices.data(),
                              reinterpret_cast<std::int32_t*>(reinterpret_cast<char*>(has_nan) + 2),
                              nullptr) == Status::invalid_argument);
  EXPECT(cuda::sparse24_prune(good, nullptr, out.indices.data(), has_nan, nullptr) ==
         Status::invalid_argument);
  EXPECT(cuda::sparse24_prune(good, values, nullptr, has_nan, nullptr) == Status::invalid_argument);
  EXPECT(cuda::sparse24_prune(good, values, out.indices.data(), nullptr, nullptr) ==
         Status::invalid_argument);
  for (std::uint8_t byte : out.values.values()) EXPECT(byte == 0xff);
  EXPECT(out.has_nan[0] == -1);
}
