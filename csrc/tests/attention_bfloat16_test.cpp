// SPDX-License-Identifier: Apache-2.0
// Attention of bfloat16, which some CPUs multiply in pairs: along head_dim, and of two keys that follow one
// another, the last one with nothing where their number is odd.

#include <cstdint>
#include <cstring>

#include "tests/attention_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr std::uint16_t kNaNBits = 0x7fff;

std::uint16_t round_to_bits(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (std::isnan(x)) return kNaNBits;
  return std::uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

float widen(std::uint16_t bits) {
  const std::uint32_t word = std::uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

using Bits = std::vector<std::uint16_t>;

Bits rounded(const std::vector<float>& values) {
  Bits bits(values.size());
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = round_to_bits(values[i]);
  return bits;
}

std::vector<float> widened(const Bits& bits) {
  std::vector<float> values(bits.size());
  for (std::size_t i = 0; i < bits.size(); ++i) values[i] = widen(bits[i]);
  return values;
}

// Rounds the inputs of a problem, which keeps the values that are left.
struct Rounded {
  Bits q, k, v;
  explicit Rounded(Problem& p) : q(rounded(p.q)), k(rounded(p.k)), v(rounded(p.v)) {
    p.q = widened(q), p.k = widened(k), p.v = widened(v);
  }
  AttentionInputs inputs(const Problem& p) const {
    AttentionInputs a = p.inputs();
    a.dtype = DType::bfloat16;
    a.q = q.data(), a.k = k.data(), a.v = v.data();
    return a;
  }
};

struct Results {
  Bits out;
  std::vector<float> lse, summary_attention, received_attention;
  bool operator==(const Results& other) const {
    return out == other.out && lse == other.lse && summary_attention == other.summary_attention &&
           received_attention == other.received_attention;
  }
};

// All results of self-attention.
Results run(const AttentionInputs& a, int threads) {
  Results r{Bits(a.tokens_q * a.heads * a.head_dim, kNaNBits), std::vector<float>(a.tokens_q * a.heads, kNaN),
            std::vector<float>(a.tokens_q, kNaN), std::vector<float>(a.tokens_q, kNaN)};
  EXPECT(attend(a, r.out.data(), r.lse.data(), r.summary_attention.data(), r.received_attention.data(),
                threads) == Status::ok);
  return r;
}

float largest(const std::vector<float>& values) {
  float result = 0;
  for (float value : values) result = std::max(result, std::abs(value));
  return result;
}

// Twice the error of results that are float32 until they are rounded, and a rounding of the largest: that of
// the probabilities.
void expect_within_rounding(const Bits& got, const std::vector<float>& wanted) {
  float error = 0;
  const std::vector<float> best = widened(rounded(wanted));
  for (std::size_t i = 0; i < wanted.size(); ++i) error = std::max(error, std::abs(best[i] - wanted[i]));
  expect_equal(widened(got), wanted, 2 * error + largest(wanted) / 256);
}

}  // namespace

TEST(bfloat16_with_statistics) {
  for (std::int64_t dim : {8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 248}) {
    for (bool causal : {false, true}) {
      const std::vector<std::int32_t> lengths{1, 0, 33, 2, 3, 130, 64, 0, 17, 47};
      Problem p(lengths, lengths, 3, dim, causal);
      const Rounded x(p);
      const Outputs wanted = expected(p, true);
      const Results one = run(x.inputs(p), 1);
      expect_within_rounding(one.out, wanted.out);
      expect_equal(one.lse, wanted.lse, 2e-5);
      expect_equal(one.summary_attention, wanted.summary_attention, largest(wanted.summary_attention) / 1024);
      expect_equal(one.received_attention, wanted.received_attention, 1e-4);
      for (int threads : {2, 40}) EXPECT(run(x.inputs(p), threads) == one);
      Bits plain(p.q.size(), kNaNBits);
      EXPECT(attend(x.inputs(p), plain.data(), nullptr, nullptr, nullptr, 2) == Status::ok);
      EXPECT(plain == one.out);
    }
  }
}

TEST(bfloat16_cross_attention) {
  for (std::int64_t dim : {16, 64, 112}) {
    Problem p({5, 1, 0, 20, 2}, {77, 3, 4, 131, 1}, 2, dim, false);
    const Rounded x(p);
    Bits out(p.q.size(), kNaNBits);
    EXPECT(attend(x.inputs(p), out.data(), nullptr, nullptr, nullptr, 2) == Status::ok);
    expect_within_rounding(out, expected(p, false).out);
  }
}

TEST(bfloat16_under_masks_and_biases) {
  with_options([](auto change) {
    Problem p({150, 0, 3, 64, 121}, {150, 0, 3, 64, 121}, 4, 24, false, 2);
    change(p);
    const Rounded x(p);
    const Outputs wanted = expected(p, true);
    const Results one = run(x.inputs(p), 1);
    expect_within_rounding(one.out, wanted.out);
    expect_equal(one.lse, wanted.lse, 2e-5);
    expect_equal(one.received_attention, wanted.received_attention, 1e-4);
    EXPECT(run(x.inputs(p), 40) == one);
  });
}

TEST(bfloat16_rows_may_be_an_odd_number_of_elements_apart) {
  Problem p({19, 8}, {19, 8}, 2, 48, true);
  const Rounded x(p);
  const std::int64_t row = p.heads * p.dim, wide = row + 3;
  const auto spaced = [&](const Bits& from) {
    Bits to(from.size() / row * wide, kNaNBits);
    for (std::size_t r = 0; r < from.size() / row; ++r)
      std::copy_n(from.begin() + r * row, row, to.begin() + r * wide);
    return to;
  };
  const Bits q = spaced(x.q), k = spaced(x.k), v = spaced(x.v);
  AttentionInputs apart = x.inputs(p);
  apart.q = q.data(), apart.k = k.data(), apart.v = v.data();
  apart.q_strides[0] = apart.k_strides[0] = apart.v_strides[0] = wide;
  EXPECT(run(apart, 1) == run(x.inputs(p), 1));
}

// They lie in both halves of a pair, and in the last one that has no other.
TEST(equal_tokens_of_bfloat16_have_equal_results) {
  for (const std::int32_t length : {12, 17, 18, 33, 34, 65, 82, 197, 577}) {
    Problem p({length}, {length}, 3, 32, false);
    p.summary_index = {0};
    const std::int64_t row = p.heads * p.dim;
    const std::int64_t twins[] = {1, 4, 9, length - 3, length - 2, length - 1};
    for (std::vector<float>* x : {&p.q, &p.k, &p.v})
      for (const std::int64_t twin : twins) std::copy_n(x->begin() + 5 * row, row, x->begin() + twin * row);
    const Rounded x(p);
    const Results got = run(x.inputs(p), 1);
    for (const std::int64_t twin : twins) {
      EXPECT(got.received_attention[twin] == got.received_attention[5]);
      EXPECT(got.summary_attention[twin] == got.summary_attention[5]);
      EXPECT(std::equal(&got.out[5 * row], &got.out[5 * row] + row, &got.out[twin * row]));
    }
  }
}

TEST(nan_of_bfloat16_stays_in_its_sequence) {
  Problem p({33, 20, 35}, {33, 20, 35}, 2, 32, false);
  for (float& value : p.q) value *= 3000;
  Rounded x(p);
  const std::size_t row = 64, begin = 33 * row, end = 53 * row;
  const Results clean = run(x.inputs(p), 1);
  for (float value : widened(clean.out)) EXPECT(std::isfinite(value));
  for (Bits* broken : {&x.q, &x.k, &x.v}) {
    for (const std::uint16_t bad : {kNaNBits, std::uint16_t(0x7f80), std::uint16_t(0xff80)}) {
      const std::uint16_t before = (*broken)[begin];  // beside the last key before it, which has no other
      (*broken)[begin] = bad;
      const Results got = run(x.inputs(p), 1);
      bool spoilt = false;
      for (std::size_t i = begin; i < end; ++i) spoilt = spoilt || !std::isfinite(widen(got.out[i]));
      EXPECT(spoilt || broken == &x.k);  // a key at minus infinity counts for nothing
      for (std::size_t i = 0; i < got.out.size(); ++i)
        EXPECT((i >= begin && i < end) || got.out[i] == clean.out[i]);
      for (std::size_t i = 0; i < 88; ++i)
        EXPECT((i >= 33 && i < 53) || (got.received_attention[i] == clean.received_attention[i] &&
                                       got.summary_attention[i] == clean.summary_attention[i]));
      (*broken)[begin] = before;
    }
  }
}

TEST(threads_do_not_change_where_nan_of_bfloat16_goes) {
  Problem p({101}, {101}, 2, 16, true);
  Rounded x(p);
  for (std::size_t row = 0; row < 101; ++row) {
    const std::uint16_t before = x.v[row * 32];
    x.v[row * 32] = kNaNBits;
    Bits one(p.q.size()), many(p.q.size());
    EXPECT(attend(x.inputs(p), one.data(), nullptr, nullptr, nullptr, 1) == Status::ok);
    EXPECT(attend(x.inputs(p), many.data(), nullptr, nullptr, nullptr, 40) == Status::ok);
    EXPECT(one == many);
    x.v[row * 32] = before;
  }
}

TEST(scales_and_sizes_of_bfloat16) {
  Problem p({21}, {21}, 2, 32, false);
  Rounded x(p);
  const Results plain = run(x.inputs(p), 1);
  AttentionInputs turned = x.inputs(p);
  Bits negative = x.q;
  for (std::uint16_t& bits : negative) bits ^= 0x8000;
  turned.q = negative.data();
  turned.softmax_scale = -turned.softmax_scale;
  EXPECT(run(turned, 1) == plain);

  for (std::uint16_t& bits : x.v) bits &= 0x807f;  // subnormal, which may count as zero
  for (const float value : widened(run(x.inputs(p), 1).out)) EXPECT_NEAR(value, 0, 1.2e-38);
}

// The backward recomputes the probabilities in float32 from what the forward left.
TEST(gradients_of_bfloat16_are_those_of_float32) {
  for (bool causal : {false, true}) {
    Problem p({3, 0, 37, 1}, {3, 0, 37, 1}, 2, 48, causal);
    const Rounded x(p);
    std::vector<float> upstream(p.q.size()), rows(p.cu_q.back());
    for (std::size_t i = 0; i < upstream.size(); ++i) upstream[i] = widen(round_to_bits(std::sin(float(i))));
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = std::cos(float(i));

    Outputs wide(p);
    EXPECT(attend(p.inputs(), wide.out.data(), wide.lse.data(), wide.summary_attention.data(),
                  wide.received_attention.data(), 1) == Status::ok);
    std::vector<float> wanted[3] = {p.q, p.k, p.v};
    EXPECT(differentiate(p.inputs(),
                         {wide.out.data(), wide.lse.data(), upstream.data(), rows.data(), rows.data(),
                          wanted[0].data(), wanted[1].data(), wanted[2].data()},
                         1) == Status::ok);

    const Results forward = run(x.inputs(p), 1);
    const Bits narrow = rounded(upstream);
    Bits got[3] = {Bits(p.q.size(), kNaNBits), Bits(p.q.size(), kNaNBits), Bits(p.q.size(), kNaNBits)};
    EXPECT(differentiate(x.inputs(p),
                         {forward.out.data(), forward.lse.data(), narrow.data(), rows.data(), rows.data(),
                          got[0].data(), got[1].data(), got[2].data()},
                         1) == Status::ok);
    for (int i = 0; i < 3; ++i) expect_within_rounding(got[i], wanted[i]);
  }
}
