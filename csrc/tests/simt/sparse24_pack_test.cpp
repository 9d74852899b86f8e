// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <vector>

#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

// The layout as sparse24/layout.cuh describes it, value by value.
std::vector<std::uint8_t> expected(const LinearCase& p) {
  const std::int64_t slabs = (p.out_features + 63) / 64 * 4, blocks = (p.in_features + 63) / 64;
  std::vector<std::uint8_t> bytes;
  const auto append = [&](auto value) {
    const auto* const from = reinterpret_cast<const std::uint8_t*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof value);
  };
  const auto kept = [&](std::int64_t row, std::int64_t place) {
    return row < p.out_features && place < p.in_features / 2 ? p.values[row * p.in_features / 2 + place]
                                                             : std::uint16_t(0);
  };
  const auto nibble = [&](std::int64_t row, std::int64_t group) {
    if (row >= p.out_features || group >= p.in_features / 4) return 4;
    return p.indices[row * p.in_features / 8 + group / 2] >> (group % 2 * 4) & 15;
  };
  for (std::int64_t slab = 0; slab < slabs; ++slab) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < 32; ++lane)
          for (int word = 0; word < 4; ++word)
            for (int k = 0; k < 2; ++k)
              append(kept(slab * 16 + lane / 4 + word % 2 * 8,
                          block * 32 + half * 16 + word / 2 * 8 + lane % 4 * 2 + k));
      for (int lane = 0; lane < 32; ++lane)
        for (int high = 0; high < 2; ++high) {
          unsigned bits = 0;
          for (int group = 0; group < 4; ++group)
            bits |= unsigned(nibble(slab * 16 + lane / 4 + 8 * high, block * 16 + lane % 4 * 4 + group))
                    << 4 * group;
          append(std::uint16_t(bits));
        }
    }
  }
  return bytes;
}

}  // namespace

TEST(a_layout_is_what_its_description_says) {
  for (std::int64_t out_features : {8, 24, 64, 136})
    for (std::int64_t in_features : {16, 48, 64, 144}) {
      const LinearCase p(DType::bfloat16, 0, out_features, in_features);
      EXPECT(p.layout.values() == expected(p));
    }
  EXPECT(LinearCase(DType::float16, 0, 0, 16).layout.size() == 0);
  EXPECT(LinearCase(DType::float16, 0, 8, 0).layout.size() == 0);
}

TEST(bad_weights_are_not_packed) {
  const LinearCase p(DType::bfloat16, 0, 16, 32);
  const Guarded<std::uint8_t> layout(std::int64_t(p.layout.size()));
  const auto refused = [&](auto change, Status expected = Status::invalid_argument) {
    Sparse24Weight weight = p.weight();
    change(weight);
    EXPECT(cuda::sparse24_pack(weight, layout.data(), nullptr) == expected);
  };
  refused([](Sparse24Weight& w) { w.out_features = 12; });
  refused([](Sparse24Weight& w) { w.in_features = 24; });
  refused([](Sparse24Weight& w) { w.in_features = -16; });
  refused([](Sparse24Weight& w) { w.values = nullptr; });
  refused([](Sparse24Weight& w) { w.indices = nullptr; });
  refused([](Sparse24Weight& w) { w.values = static_cast<const char*>(w.values) + 2; });
  refused([](Sparse24Weight& w) { w.indices = w.indices + 1; });
  refused([](Sparse24Weight& w) { w.dtype = DType(4); });
  refused([](Sparse24Weight& w) { w.dtype = DType::float32; }, Status::unsupported);
  EXPECT(cuda::sparse24_pack(p.weight(), nullptr, nullptr) == Status::invalid_argument);
  EXPECT(cuda::sparse24_pack(p.weight(), layout.data() + 8, nullptr) == Status::invalid_argument);
  for (std::uint8_t byte : layout.values()) EXPECT(byte == 0xff);
  std::int64_t bytes = -1;
  EXPECT(cuda::sparse24_layout_bytes(12, 32, DType::bfloat16, &bytes) == Status::invalid_argument);
  EXPECT(cuda::sparse24_layout_bytes(16, 32, DType::float32, &bytes) == Status::unsupported);
  EXPECT(cuda::sparse24_layout_bytes(16, 32, DType::bfloat16, nullptr) == Status::invalid_argument);
  EXPECT(bytes == -1);
}
