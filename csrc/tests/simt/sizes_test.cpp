// SPDX-License-Identifier: Apache-2.0
// Every CUDA entry point with a size of 0 in every place, and with sizes that no address or grid can count.

#include "sizes.h"

#include "madtp/sparse24.h"
#include "madtp/tokens.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 27;  // features or tokens of a product

// On a 16-byte boundary, for whatever is only looked at.
alignas(16) unsigned char memory[1 << 14];

Sparse24Linear linear(std::int64_t tokens, std::int64_t out_features, std::int64_t in_features) {
  Sparse24Linear a{};
  a.dtype = a.weight_dtype = DType::bfloat16;
  a.x = a.layout = memory;
  a.tokens = tokens;
  a.out_features = out_features;
  a.in_features = a.x_stride = in_features;
  return a;
}

}  // namespace

TEST(sparse24_sizes_of_zero) {
  const Capability pretended(90);
  for (const std::int64_t out_features : {0, 8}) {
    for (const std::int64_t in_features : {0, 16}) {
      for (const bool transposed : {false, true}) {
        const Guarded<std::uint16_t> values(out_features * in_features / 2);
        const Guarded<std::uint8_t> indices(out_features * in_features / 8);
        const Guarded<std::int32_t> has_nan(1);
        const std::int64_t stride = transposed ? out_features : in_features;
        EXPECT(cuda::sparse24_prune(
                   {DType::bfloat16, memory, stride, nullptr, 0, out_features, in_features, transposed},
                   values.data(), indices.data(), has_nan.data(), nullptr) == Status::ok);
        EXPECT(has_nan[0] == 0);
        std::int64_t bytes = -1;
        EXPECT(cuda::sparse24_layout_bytes(out_features, in_features, DType::bfloat16, &bytes) == Status::ok);
        EXPECT((bytes == 0) == (out_features == 0 || in_features == 0));
        const Guarded<unsigned char> layout(bytes);
        EXPECT(
            cuda::sparse24_pack({DType::bfloat16, values.data(), indices.data(), out_features, in_features},
                                layout.data(), nullptr) == Status::ok);
        for (const std::int64_t tokens : {0, 5}) {
          Sparse24Linear a = linear(tokens, out_features, in_features);
          a.layout = layout.data();
          const Guarded<std::uint16_t> out(tokens * out_features);
          EXPECT(cuda::sparse24_linear(a, out.data(), out_features, nullptr) == Status::ok);
          for (const std::uint16_t y : out.values()) EXPECT(y == 0);
        }
      }
    }
  }
}

TEST(token_sizes_of_zero) {
  const std::int32_t ends[] = {0, 3}, none[] = {0, 0}, source[] = {0, 1, 2, padding_row};
  const std::int32_t padding[] = {padding_row, padding_row, padding_row, padding_row};
  const std::uint8_t keep[] = {1, 1, 1};
  const float merge_weight[] = {0, 0, 0};
  for (const std::int64_t tokens : {0, 3}) {
    for (const std::int64_t capacity : {0, 3, 4}) {
      for (const std::int64_t batch : {0, 1}) {
        for (const std::int64_t channels : {0, 5}) {
          const std::int32_t* const cu_seqlens = tokens == 0 ? none : ends;
          const TokenSelection s{keep,         cu_seqlens, cu_seqlens, tokens == 0 ? padding : source,
                                 merge_weight, tokens,     capacity,   batch};
          const Guarded<float> out(capacity * channels), normed(capacity * channels), mean(capacity),
              rstd(capacity), grad_x(tokens * channels), grad_weight(tokens);
          const auto* const x = reinterpret_cast<const float*>(memory);
          EXPECT(cuda::gather_merge(x, DType::float32, channels, channels, s, out.data(), nullptr) ==
                 Status::ok);
          for (const float y : out.values()) EXPECT(y == 0);
          EXPECT(cuda::gather_merge_layernorm(x, DType::float32, channels, channels, s, x, x, DType::float32,
                                              1e-5, out.data(), normed.data(), mean.data(), rstd.data(),
                                              nullptr) == Status::ok);
          for (const float y : normed.values()) EXPECT(y == 0);
          EXPECT(cuda::gather_merge_backward(x, channels, x, DType::float32, channels, channels, s,
                                             grad_x.data(), grad_weight.data(), nullptr) == Status::ok);
          for (const float y : grad_weight.values()) EXPECT(y == 0);
        }
      }
    }
  }
}

TEST(sizes_that_are_too_large_are_refused) {
  const Capability pretended(90);
  const auto refused = [](Status status) { EXPECT(status == Status::invalid_argument); };
  auto* const ints = reinterpret_cast<std::int32_t*>(memory);
  std::int64_t bytes = -1;
  for (const std::int64_t size :
       {kMost + 16, std::int64_t{1} << 31, std::int64_t{1} << 60, INT64_MAX, INT64_MIN, std::int64_t{-16}}) {
    refused(cuda::sparse24_layout_bytes(size, 16, DType::bfloat16, &bytes));
    refused(cuda::sparse24_layout_bytes(8, size, DType::bfloat16, &bytes));
    refused(cuda::sparse24_linear(linear(size, 8, 16), memory, 8, nullptr));
    refused(cuda::sparse24_prune({DType::bfloat16, memory, 16, nullptr, 0, size, 16}, memory, memory, ints,
                                 nullptr));
  }
  EXPECT(bytes == -1);
  for (const std::int64_t size : {std::int64_t{1} << 31, INT64_MAX, INT64_MIN, std::int64_t{-1}}) {
    const TokenSelection good{memory, ints, ints, ints, reinterpret_cast<float*>(memory), 3, 3, 1};
    const auto gather = [&](const TokenSelection& s, std::int64_t channels, std::int64_t stride) {
      float* const m = reinterpret_cast<float*>(memory);
      refused(cuda::gather_merge(m, DType::float32, stride, channels, s, m, nullptr));
      refused(cuda::gather_merge_backward(m, stride, m, DType::float32, 4, channels, s, m, m, nullptr));
      refused(cuda::gather_merge_layernorm(m, DType::float32, stride, channels, s, m, m, DType::float32, 1e-5,
                                           m, m, m, m, nullptr));
    };
    gather(good, size, 4);
    if (size < -1 || size == INT64_MAX) gather(good, 4, size);
    for (std::int64_t TokenSelection::* field :
         {&TokenSelection::tokens, &TokenSelection::capacity, &TokenSelection::batch}) {
      TokenSelection odd = good;
      odd.*field = size;
      gather(odd, 4, 4);
    }
  }

  // Sizes that are allowed, but not together: no grid has a block for every tile.
  Sparse24Linear a = linear(kMost, kMost, 16);
  int count = -1;
  EXPECT(cuda::sparse24_linear_configs(a, nullptr, 0, &count) == Status::ok && count == 0);
  refused(cuda::sparse24_linear(a, memory, kMost, nullptr));
  a = linear(kMost, 8, 16);
  a.x_stride = INT64_MAX / 16 * 8;
  refused(cuda::sparse24_linear(a, memory, 8, nullptr));
  ints[0] = 7;
  refused(cuda::sparse24_prune({DType::bfloat16, memory, kMost, nullptr, 0, kMost, kMost, true}, memory,
                               memory, ints, nullptr));
  refused(cuda::sparse24_pack({DType::bfloat16, memory, memory, kMost, kMost}, memory, nullptr));
  EXPECT(ints[0] == 7);
}
