// SPDX-License-Identifier: Apache-2.0
// gather_merge, its backward and gather_merge_layernorm of csrc/cuda beside those of the CPU.

#include "madtp/tokens.h"

#include <cuda_runtime.h>

#include <cstring>
#include <random>
#include <vector>

#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};
constexpr std::int64_t kChannels[] = {1, 8, 37, 128, 264, 1024, 1032};

template <typename T>
Guarded<T> guarded(const std::vector<T>& values) {
  Guarded<T> copy(std::int64_t(values.size()));
  std::copy(values.begin(), values.end(), copy.data());
  return copy;
}

// A selection of sequences of these lengths, some of their rows pruned at random; rows past the last
// sequence.
struct Selected {
  Guarded<std::uint8_t> keep;
  Guarded<float> merge_weight;
  Guarded<std::int32_t> cu_seqlens, cu_seqlens_out, source;
  std::int64_t tokens = 0, capacity = 0, batch;

  Selected(const std::vector<int>& lengths, double share, int padding) : batch(std::int64_t(lengths.size())) {
    std::mt19937 generator(unsigned(lengths.size() * 7 + lengths[0]));
    std::vector<std::uint8_t> kept;
    std::vector<float> weights;
    std::vector<std::int32_t> ends{0}, ends_out{0}, sources;
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      int pruned = 0;
      for (int i = 0; i < lengths[b]; ++i) {
        const bool keeps = i == 0 || generator() % 1000 >= share * 1000;
        pruned += !keeps;
        if (keeps) sources.push_back(std::int32_t(kept.size()));
        weights.push_back(keeps ? 0 : float(generator() % 100) / 100);
        kept.push_back(keeps);
      }
      if (pruned > 0) sources.push_back(-std::int32_t(b) - 1);
      ends.push_back(std::int32_t(kept.size()));
      ends_out.push_back(std::int32_t(sources.size()));
    }
    sources.resize(sources.size() + std::size_t(padding), padding_row);
    tokens = std::int64_t(kept.size()), capacity = std::int64_t(sources.size());
    keep = guarded(kept), merge_weight = guarded(weights);
    cu_seqlens = guarded(ends), cu_seqlens_out = guarded(ends_out);
    source = guarded(sources);
  }
  TokenSelection selection() const {
    return {keep.data(),
            cu_seqlens.data(),
            cu_seqlens_out.data(),
            source.data(),
            merge_weight.data(),
            tokens,
            capacity,
            batch};
  }
};

const std::vector<int> kBatches[] = {{5, 0, 4}, {1}, {70, 3, 1, 33}, {1100}};

// (count,) of a dtype, drawn; bytes, since the dtype is chosen at run time.
Guarded<unsigned char> draw(DType dtype, std::int64_t count, unsigned seed) {
  Guarded<unsigned char> bytes(count * std::int64_t(size_of(dtype)));
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = normal(generator);
    const std::uint16_t narrow = dtype == DType::float32 ? std::uint16_t(0) : encode(x, dtype);
    std::memcpy(bytes.data() + i * std::int64_t(size_of(dtype)),
                dtype == DType::float32 ? static_cast<const void*>(&x) : &narrow, size_of(dtype));
  }
  return bytes;
}

float at(const Guarded<unsigned char>& bytes, DType dtype, std::int64_t i) {
  if (dtype != DType::float32) {
    std::uint16_t narrow;
    std::memcpy(&narrow, bytes.data() + i * 2, 2);
    return decode(narrow, dtype);
  }
  float x;
  std::memcpy(&x, bytes.data() + i * 4, 4);
  return x;
}

// Equal but for the last place of the dtype.
bool close(const Guarded<unsigned char>& a, const Guarded<unsigned char>& b, DType dtype) {
  const double step = dtype == DType::float32 ? 2e-6 : dtype == DType::bfloat16 ? 1.0 / 128 : 1.0 / 1024;
  for (std::int64_t i = 0; i < std::int64_t(a.size() / size_of(dtype)); ++i) {
    const double x = at(a, dtype, i), y = at(b, dtype, i);
    if (!(std::abs(x - y) <= step * std::max(std::abs(x), std::abs(y)) + 1e-5)) return false;
  }
  return true;
}

bool close(const Guarded<float>& a, const Guarded<float>& b) {
  for (std::int64_t i = 0; i < std::int64_t(a.size()); ++i)
    if (!(std::abs(a[i] - b[i]) <= 1e-5f * std::max(std::abs(a[i]), 1.0f) * 8)) return false;
  return true;
}

// body(selection, dtype, channels, stride) on aligned rows and others.
template <typename Body>
void for_each_problem(Body&& body) {
  for (const std::vector<int>& lengths : kBatches)
    for (DType dtype : kTypes)
      for (std::int64_t channels : kChannels)
        for (std::int64_t gap : {0, 3})
          if (lengths[0] == 5 ||
              (channels < 1000 && (lengths[0] < 1000 || channels == 37 || channels == 128)))
            body(Selected(lengths, 0.6, gap == 0 ? 0 : 5), dtype, channels, channels + gap);
}

}  // namespace

TEST(gather_merge_is_that_of_the_cpu) {
  for_each_problem([](const Selected& s, DType dtype, std::int64_t channels, std::int64_t stride) {
    const Guarded<unsigned char> x = draw(dtype, s.tokens * stride, 1);
    const std::int64_t bytes = s.capacity * channels * std::int64_t(size_of(dtype));
    const Guarded<unsigned char> expected(bytes), got(bytes);
    EXPECT(cpu::gather_merge(x.data(), dtype, stride, channels, s.selection(), expected.data(), 1) ==
           Status::ok);
    EXPECT(cuda::gather_merge(x.data(), dtype, stride, channels, s.selection(), got.data(), nullptr) ==
           Status::ok);
    EXPECT(close(got, expected, dtype));
  });
}

TEST(its_backward_is_that_of_the_cpu) {
  for_each_problem([](const Selected& s, DType dtype, std::int64_t channels, std::int64_t stride) {
    const Guarded<unsigned char> x = draw(dtype, s.tokens * stride, 1),
                                 grad = draw(dtype, s.capacity * stride, 2);
    const std::int64_t bytes = s.tokens * channels * std::int64_t(size_of(dtype));
    const Guarded<unsigned char> expected(bytes), got(bytes);
    const Guarded<float> expected_weight(s.tokens), got_weight(s.tokens);
    EXPECT(cpu::gather_merge_backward(grad.data(), stride, x.data(), dtype, stride, channels, s.selection(),
                                      expected.data(), expected_weight.data(), 1) == Status::ok);
    EXPECT(cuda::gather_merge_backward(grad.data(), stride, x.data(), dtype, stride, channels, s.selection(),
                                       got.data(), got_weight.data(), nullptr) == Status::ok);
    EXPECT(close(got, expected, dtype));
    EXPECT(close(got_weight, expected_weight));
  });
}

TEST(gather_merge_layernorm_is_that_of_the_cpu) {
  for_each_problem([](const Selected& s, DType dtype, std::int64_t channels, std::int64_t stride) {
    for (DType affine : {DType::float32, dtype}) {
      const Guarded<unsigned char> x = draw(dtype, s.tokens * stride, 1), weight = draw(affine, channels, 2),
                                   bias = draw(affine, channels, 3);
      const std::int64_t bytes = s.capacity * channels * std::int64_t(size_of(dtype));
      const Guarded<unsigned char> expected(bytes), got(bytes), expected_normed(bytes), got_normed(bytes);
      const Guarded<float> mean(s.capacity), rstd(s.capacity), got_mean(s.capacity), got_rstd(s.capacity);
      EXPECT(cpu::gather_merge_layernorm(x.data(), dtype, stride, channels, s.selection(), weight.data(),
                                         bias.data(), affine, 1e-3, expected.data(), expected_normed.data(),
                                         mean.data(), rstd.data(), 1) == Status::ok);
      EXPECT(cuda::gather_merge_layernorm(x.data(), dtype, stride, channels, s.selection(), weight.data(),
                                          bias.data(), affine, 1e-3, got.data(), got_normed.data(),
                                          got_mean.data(), got_rstd.data(), nullptr) == Status::ok);
      EXPECT(close(got, expected, dtype));
      EXPECT(close(got_mean, mean));
      for (std::int64_t i = 0; i < s.capacity; ++i)
        EXPECT_NEAR(got_rstd[i], rstd[i],
                    1e-2 * std::abs(rstd[i]));  // of rows that may differ in a last place
      for (std::int64_t i = 0; i < s.capacity * channels; ++i)
        EXPECT_NEAR(at(got_normed, dtype, i), at(expected_normed, dtype, i),
                    dtype == DType::float32 ? 1e-3 : 0.1);
    }
  });
}

TEST(what_names_no_row_is_zeros_and_reads_nothing) {
  Selected s({5, 0, 4}, 0.6, 3);
  const Guarded<unsigned char> x = draw(DType::float32, s.tokens * 8, 1);
  for (std::int64_t i = 0; i < s.capacity; ++i) s.source[i] = i % 2 ? INT32_MAX : INT32_MIN + 1;
  const Guarded<unsigned char> out(s.capacity * 8 * 4), grad_x(s.tokens * 8 * 4);
  const Guarded<float> grad_weight(s.tokens);
  EXPECT(cuda::gather_merge(x.data(), DType::float32, 8, 8, s.selection(), out.data(), nullptr) ==
         Status::ok);
  for (std::int64_t i = 0; i < s.capacity * 8; ++i) EXPECT(at(out, DType::float32, i) == 0);
  for (std::int64_t b = 0; b <= s.batch; ++b) s.cu_seqlens[b] = s.cu_seqlens_out[b] = INT32_MAX - int(b);
  EXPECT(cuda::gather_merge_backward(out.data(), 8, x.data(), DType::float32, 8, 8, s.selection(),
                                     grad_x.data(), grad_weight.data(), nullptr) == Status::ok);
}

TEST(bad_arguments_are_refused) {
  const Selected s({5, 0, 4}, 0.6, 0);
  const Guarded<unsigned char> x = draw(DType::float32, s.tokens * 8, 1), out(s.capacity * 8 * 4);
  const auto refused = [](Status status) { EXPECT(status == Status::invalid_argument); };
  refused(cuda::gather_merge(nullptr, DType::float32, 8, 8, s.selection(), out.data(), nullptr));
  refused(cuda::gather_merge(x.data(), DType(9), 8, 8, s.selection(), out.data(), nullptr));
  refused(cuda::gather_merge(x.data(), DType::float32, 8, -1, s.selection(), out.data(), nullptr));
  TokenSelection broken = s.selection();
  broken.capacity = -1;
  refused(cuda::gather_merge(x.data(), DType::float32, 8, 8, broken, out.data(), nullptr));
  for (std::int64_t i = 0; i < std::int64_t(out.size()); ++i) EXPECT(out[i] == 0xff);
}

TEST(what_a_device_refuses_is_a_status) {
  const Selected s({5, 0, 4}, 0.6, 0);
  const Guarded<unsigned char> x = draw(DType::float32, s.tokens * 8, 1), out(s.capacity * 8 * 4);
  const auto status = [&](cudaError_t error) {
    simt::options.error = error;
    const Status result =
        cuda::gather_merge(x.data(), DType::float32, 8, 8, s.selection(), out.data(), nullptr);
    simt::options.error = cudaSuccess;
    return result;
  };
  EXPECT(status(cudaErrorInvalidValue) == Status::cuda_error);
  EXPECT(status(cudaErrorNoKernelImageForDevice) == Status::unsupported);
  EXPECT(status(cudaErrorInvalidDeviceFunction) == Status::unsupported);
  EXPECT(status(cudaSuccess) == Status::ok);
}
