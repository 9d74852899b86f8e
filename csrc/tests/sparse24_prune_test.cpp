// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "madtp/sparse24.h"
#include "tests/test.h"

using namespace madtp;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Numbers with many ties, zeros of both signs among them; rows are 3 elements further apart than they are
// long, and NaN stands between them.
struct PruneCase {
  std::int64_t out_features, in_features, stride;
  std::vector<float> weight, score;
  bool scored = false;

  PruneCase(std::int64_t n, std::int64_t c) : out_features(n), in_features(c), stride(c + 3) {
    std::mt19937 generator(7);
    for (std::vector<float>* matrix : {&weight, &score}) {
      matrix->resize(std::size_t(n * stride), kNaN);
      for (std::int64_t i = 0; i < n * c; ++i) {
        const float magnitude = float(generator() % 4) / 2;
        (*matrix)[std::size_t(i / c * stride + i % c)] = generator() % 2 == 0 ? magnitude : -magnitude;
      }
    }
  }

  Sparse24Dense dense() const {
    return {DType::float32, weight.data(), stride,     scored ? score.data() : nullptr,
            stride,         out_features,  in_features};
  }
};

struct Pruned {
  std::vector<float> values;
  std::vector<std::uint8_t> indices;

  bool operator==(const Pruned& other) const {
    return indices == other.indices &&
           std::memcmp(values.data(), other.values.data(), values.size() * sizeof(float)) == 0;
  }
};

Pruned run(const PruneCase& p, int threads) {
  Pruned result{std::vector<float>(std::size_t(p.out_features * p.in_features / 2), kNaN),
                std::vector<std::uint8_t>(std::size_t(p.out_features * p.in_features / 8), 0xff)};
  EXPECT(cpu::sparse24_prune(p.dense(), result.values.data(), result.indices.data(), threads) == Status::ok);
  return result;
}

// The columns of the two largest, ascending; of equal ones the lower.
std::vector<int> two_largest(const float* key) {
  std::vector<int> order{0, 1, 2, 3};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key[a] > key[b]; });
  order.resize(2);
  std::sort(order.begin(), order.end());
  return order;
}

Pruned expected(const PruneCase& p) {
  Pruned result;
  for (std::int64_t row = 0; row < p.out_features; ++row) {
    for (std::int64_t c = 0; c < p.in_features; c += 4) {
      const float* const weight = &p.weight[std::size_t(row * p.stride + c)];
      float group[4] = {}, magnitude[4];
      if (p.scored)
        for (int i : two_largest(&p.score[std::size_t(row * p.stride + c)])) group[i] = weight[i];
      else
        std::copy(weight, weight + 4, group);
      for (int i = 0; i < 4; ++i) magnitude[i] = std::abs(group[i]);
      const std::vector<int> kept = two_largest(magnitude);
      for (int i : kept) result.values.push_back(group[i] + 0.0f);
      const unsigned nibble = unsigned(kept[0] | kept[1] << 2);
      if (c % 8 == 0)
        result.indices.push_back(std::uint8_t(nibble));
      else
        result.indices.back() = std::uint8_t(result.indices.back() | nibble << 4);
    }
  }
  return result;
}

}  // namespace

TEST(the_two_largest_of_every_group_are_kept) {
  for (std::int64_t in_features : {16, 32, 48, 64, 80, 208, 272}) {
    PruneCase p(16, in_features);
    for (bool scored : {false, true}) {
      p.scored = scored;
      for (int threads : {1, 3}) EXPECT(run(p, threads) == expected(p));
    }
  }
  EXPECT(run(PruneCase(0, 16), 1).values.empty());
  EXPECT(run(PruneCase(8, 0), 2).values.empty());
}

TEST(bfloat16_keeps_its_bits) {
  std::vector<std::uint16_t> weight(8 * 16);
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = std::uint16_t(0x3f80 + i);  // ascending
  weight[0] = 0xff80;                                                                     // -infinity
  std::vector<std::uint16_t> values(8 * 8);
  std::vector<std::uint8_t> indices(8 * 2);
  const Sparse24Dense dense{DType::bfloat16, weight.data(), 16, nullptr, 0, 8, 16};
  EXPECT(cpu::sparse24_prune(dense, values.data(), indices.data(), 1) == Status::ok);
  EXPECT(values[0] == 0xff80 && values[1] == weight[3] && values[2] == weight[6] && values[3] == weight[7]);
  EXPECT(indices[0] == (12 | 14 << 4) && indices[1] == (14 | 14 << 4));
}

TEST(a_nan_anywhere_is_refused) {
  for (std::int64_t in_features : {16, 80}) {
    for (std::int64_t column = 0; column < in_features; ++column) {
      for (int threads : {1, 2}) {
        PruneCase p(8, in_features);
        p.scored = column % 2 == 0;
        (p.scored && column % 4 == 0 ? p.score : p.weight)[std::size_t(5 * p.stride + column)] = -kNaN;
        std::vector<float> values(std::size_t(8 * in_features / 2));
        std::vector<std::uint8_t> indices(std::size_t(in_features) / 8 * 8);
        EXPECT(cpu::sparse24_prune(p.dense(), values.data(), indices.data(), threads) ==
               Status::invalid_argument);
      }
    }
  }
}

TEST(bad_dense_weights_are_refused) {
  const PruneCase p(16, 32);
  std::vector<float> values(16 * 16, 5);
  std::vector<std::uint8_t> indices(16 * 4, 9);
  const auto refused = [&](auto change, int threads = 1) {
    Sparse24Dense dense = p.dense();
    change(dense);
    EXPECT(cpu::sparse24_prune(dense, values.data(), indices.data(), threads) == Status::invalid_argument);
  };
  refused([](Sparse24Dense& a) { a.in_features = 24; });
  refused([](Sparse24Dense& a) { a.out_features = 12; });
  refused([](Sparse24Dense& a) { a.out_features = -8; });
  refused([](Sparse24Dense& a) { a.weight = nullptr; });
  refused([](Sparse24Dense& a) { a.dtype = DType(3); });
  refused([](Sparse24Dense&) {}, 0);
  EXPECT(cpu::sparse24_prune(p.dense(), nullptr, indices.data(), 1) == Status::invalid_argument);
  EXPECT(cpu::sparse24_prune(p.dense(), values.data(), nullptr, 1) == Status::invalid_argument);
  EXPECT((values == std::vector<float>(16 * 16, 5)) && (indices == std::vector<std::uint8_t>(16 * 4, 9)));
}
