// SPDX-License-Identifier: Apache-2.0
// Rows and weights on their way to the quantised layers.

#include "tests/simt/quantized_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// What madtp/quantized.h says of row m, value by value.
void expect_row(const QuantizedCase& p, std::int64_t m) {
  float amax = 0;
  bool is_finite = true;
  const auto x = [&](std::int64_t c) { return p.x.get(m * (p.in_features + p.gap) + c); };
  for (std::int64_t c = 0; c < p.in_features; ++c) {
    is_finite &= std::isfinite(x(c));
    amax = std::max(amax, std::abs(x(c)));
  }
  const bool is_usable = is_finite && amax >= (p.type == QuantizedType::int8 ? 0x1p-119f : 0x1p-117f);
  const float got = p.x_scale[m];
  EXPECT(is_finite ? got == (is_usable ? amax / largest_of(p.type) : 0) : std::isnan(got));
  const float inverse = largest_of(p.type) / amax;
  for (std::int64_t c = 0; c < p.in_features; ++c) {
    const float scaled = is_usable ? x(c) * inverse : 0;
    const std::uint8_t expected =
        p.type == QuantizedType::int8 ? std::uint8_t(int(std::nearbyint(scaled))) : nearest_e4m3(scaled);
    EXPECT(p.rows[m * (p.in_features + 2 * p.gap) + c] == expected);
  }
}

}  // namespace

TEST(rows_are_rounded_as_on_a_cpu) {
  for (QuantizedType type : {QuantizedType::int8, QuantizedType::e4m3}) {
    for (DType dtype : kTypes) {
      for (std::int64_t in_features : {16, 48, 272, 528}) {
        QuantizedCase p(dtype, 11, 8, in_features, type, in_features == 48 ? 8 : 0);
        const auto fill = [&](std::int64_t row, float value) {
          for (std::int64_t c = 0; c < in_features; ++c) p.x.set(row * (in_features + p.gap) + c, value);
        };
        fill(1, 0);
        fill(2, -0.0f);
        p.x.set(3 * (in_features + p.gap) + in_features - 1, kNaN);
        p.x.set(4 * (in_features + p.gap) + 7, kInfinity);
        p.x.set(5 * (in_features + p.gap), -kInfinity);
        const float least = type == QuantizedType::int8 ? 0x1p-119f : 0x1p-117f;  // zero in float16
        fill(6, least);
        fill(7, least / 2);
        for (std::int64_t c = 0; c < in_features; ++c)  // every tie of int8, and of small e4m3
          p.x.set(8 * (in_features + p.gap) + c, c == 0 ? largest_of(type) : float(c % 250 - 125) / 2);
        for (std::int64_t c = 0; c < in_features; ++c)
          p.x.set(9 * (in_features + p.gap) + c, c == 0 ? largest_of(type) : float(c % 32) * 0x1p-10f);
        p.quantize();
        for (std::int64_t m = 0; m < p.tokens; ++m) expect_row(p, m);
      }
    }
  }
}

TEST(rows_past_num_rows_stay_as_they_are) {
  for (std::int32_t num_rows : {-3, 0, 1, 9, 20, 40}) {
    const QuantizedCase p(DType::bfloat16, 20, 8, 32);
    p.quantize(&num_rows);
    const std::int64_t real = std::min<std::int64_t>(std::max(num_rows, 0), p.tokens);
    for (std::int64_t m = 0; m < real; ++m) expect_row(p, m);
    for (std::int64_t i = real * 32; i < p.tokens * 32; ++i) EXPECT(p.rows[i] == 0xff);
  }
}

TEST(bad_rows_are_refused) {
  const QuantizedCase p(DType::bfloat16, 4, 8, 32);
  const auto refused = [&](auto change, Status expected = Status::invalid_argument) {
    QuantizedRows rows = p.quantized();
    std::int64_t tokens = 4, in_features = 32;
    change(rows, tokens, in_features);
    EXPECT(cuda::quantize_rows(DType::bfloat16, p.x.data(), 32, tokens, in_features, nullptr, rows,
                               nullptr) == expected);
  };
  refused([](QuantizedRows& r, auto&, auto&) { r.type = QuantizedType(2); });
  refused([](QuantizedRows& r, auto&, auto&) { r.values = nullptr; });
  refused([](QuantizedRows& r, auto&, auto&) { r.scale = nullptr; });
  refused([](QuantizedRows& r, auto&, auto&) { r.scale += 1; });
  refused([](QuantizedRows& r, auto&, auto&) { r.stride = 40; });
  refused([](QuantizedRows&, auto& tokens, auto&) { tokens = -1; });
  refused([](QuantizedRows&, auto&, auto& in_features) { in_features = 24; });
  refused([](QuantizedRows&, auto&, auto& in_features) { in_features = (1 << 16) + 16; });
  refused([](QuantizedRows&, auto& tokens, auto&) { tokens = 0; }, Status::ok);
  EXPECT(cuda::quantize_rows(DType(3), p.x.data(), 32, 4, 32, nullptr, p.quantized(), nullptr) ==
         Status::invalid_argument);
  for (std::uint8_t byte : p.rows.values()) EXPECT(byte == 0xff);
}

TEST(a_layout_is_what_its_description_says) {
  for (std::int64_t out_features : {8, 24, 64, 136})
    for (std::int64_t in_features : {16, 48, 128, 208}) {
      const QuantizedCase p(DType::bfloat16, 0, out_features, in_features);
      const std::int64_t slabs = (out_features + 63) / 64 * 4, blocks = (in_features + 127) / 128;
      const auto kept = [&](std::int64_t row, std::int64_t place) {
        return row < out_features && place < in_features / 2 ? p.values[row * in_features / 2 + place]
                                                             : std::uint8_t(0);
      };
      const auto nibble = [&](std::int64_t row, std::int64_t group) {
        if (row >= out_features || group >= in_features / 4) return 4;
        return p.indices[row * in_features / 8 + group / 2] >> (group % 2 * 4) & 15;
      };
      std::vector<std::uint8_t> expected;
      for (std::int64_t slab = 0; slab < slabs; ++slab) {
        for (std::int64_t block = 0; block < blocks; ++block) {
          for (int half = 0; half < 2; ++half)
            for (int lane = 0; lane < 32; ++lane)
              for (int word = 0; word < 4; ++word)
                for (int k = 0; k < 4; ++k)
                  expected.push_back(kept(slab * 16 + lane / 4 + word % 2 * 8,
                                          block * 64 + half * 32 + word / 2 * 16 + lane % 4 * 4 + k));
          for (int half = 0; half < 2; ++half)
            for (int lane = 0; lane < 32; ++lane)
              for (int byte = 0; byte < 4; ++byte) {
                const std::int64_t row = slab * 16 + lane / 4 + lane % 2 * 8;
                const std::int64_t group = block * 32 + half * 16 + lane % 4 / 2 * 8 + 2 * byte;
                expected.push_back(std::uint8_t(nibble(row, group) | nibble(row, group + 1) << 4));
              }
        }
      }
      EXPECT(p.layout.values() == expected);
    }
}

TEST(bad_weights_are_not_packed) {
  const QuantizedCase p(DType::bfloat16, 0, 16, 32);
  const Guarded<std::uint8_t> layout(std::int64_t(p.layout.size()));
  const auto refused = [&](auto change, Status expected = Status::invalid_argument) {
    QuantizedWeight weight = p.weight();
    change(weight);
    EXPECT(cuda::quantized_pack(weight, layout.data(), nullptr) == expected);
  };
  refused([](QuantizedWeight& w) { w.out_features = 12; });
  refused([](QuantizedWeight& w) { w.in_features = 24; });
  refused([](QuantizedWeight& w) { w.in_features = (1 << 16) + 16; });
  refused([](QuantizedWeight& w) { w.values = nullptr; });
  refused([](QuantizedWeight& w) { w.values += 8; });
  refused([](QuantizedWeight& w) { w.indices += 1; });
  refused([](QuantizedWeight& w) { w.indices = nullptr; }, Status::unsupported);  // dense
  EXPECT(cuda::quantized_pack(p.weight(), layout.data() + 8, nullptr) == Status::invalid_argument);
  for (std::uint8_t byte : layout.values()) EXPECT(byte == 0xff);
  EXPECT(cuda::quantized_layout_bytes(16, 32, nullptr) == Status::invalid_argument);
}
