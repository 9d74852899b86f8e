// SPDX-License-Identifier: Apache-2.0
// The C ABI over madtp::cuda: every function has the bits of the C++ one, and what is refused writes nothing.

#include "madtp/c_api.h"

#include <vector>

#include "madtp/tokens.h"
#include "tests/simt/quantized_cases.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

template <typename T>
bool same(const Guarded<T>& a, const Guarded<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
Guarded<T> guarded(const std::vector<T>& values) {
  Guarded<T> copy(std::int64_t(values.size()));
  std::copy(values.begin(), values.end(), copy.data());
  return copy;
}

}  // namespace

TEST(tokens_have_the_bits_of_cpp) {
  constexpr std::int64_t channels = 24, tokens = 4, capacity = 3;
  const auto keep = guarded<std::uint8_t>({1, 0, 1, 0});
  const auto merge_weight = guarded<float>({0, 0.25f, 0, 0.75f});
  const auto ends = guarded<std::int32_t>({0, 4}), ends_out = guarded<std::int32_t>({0, 3});
  const auto source = guarded<std::int32_t>({0, 2, -1});
  Guarded<float> x(tokens * channels), weight(channels), bias(channels);
  for (std::int64_t i = 0; i < tokens * channels; ++i) x[i] = float(i % 17) - 8;
  for (std::int64_t i = 0; i < channels; ++i) weight[i] = float(i), bias[i] = 1;

  const TokenSelection selection{keep.data(),         ends.data(), ends_out.data(), source.data(),
                                 merge_weight.data(), tokens,      capacity,        1};
  madtp_token_selection given{sizeof given,    keep.data(),   ends.data(),
                              ends_out.data(), source.data(), merge_weight.data(),
                              tokens,          capacity,      1};
  struct Results {
    Guarded<float> out{capacity * channels}, normed{capacity * channels}, mean{capacity}, rstd{capacity};
    Guarded<float> grad_x{tokens * channels}, grad_weight{tokens};
  } ours, theirs;
  EXPECT(madtp_cuda_gather_merge(x.data(), MADTP_DTYPE_FLOAT32, channels, channels, &given, ours.out.data(),
                                 nullptr) == MADTP_STATUS_OK);
  EXPECT(cuda::gather_merge(x.data(), DType::float32, channels, channels, selection, theirs.out.data(),
                            nullptr) == Status::ok);
  EXPECT(same(ours.out, theirs.out));
  EXPECT(madtp_cuda_gather_merge_layernorm(x.data(), MADTP_DTYPE_FLOAT32, channels, channels, &given,
                                           weight.data(), bias.data(), MADTP_DTYPE_FLOAT32, 1e-5,
                                           ours.out.data(), ours.normed.data(), ours.mean.data(),
                                           ours.rstd.data(), nullptr) == MADTP_STATUS_OK);
  EXPECT(cuda::gather_merge_layernorm(x.data(), DType::float32, channels, channels, selection, weight.data(),
                                      bias.data(), DType::float32, 1e-5, theirs.out.data(),
                                      theirs.normed.data(), theirs.mean.data(), theirs.rstd.data(),
                                      nullptr) == Status::ok);
  EXPECT(same(ours.normed, theirs.normed) && same(ours.mean, theirs.mean) && same(ours.rstd, theirs.rstd));
  EXPECT(madtp_cuda_gather_merge_backward(ours.normed.data(), channels, x.data(), MADTP_DTYPE_FLOAT32,
                                          channels, channels, &given, ours.grad_x.data(),
                                          ours.grad_weight.data(), nullptr) == MADTP_STATUS_OK);
  EXPECT(cuda::gather_merge_backward(theirs.normed.data(), channels, x.data(), DType::float32, channels,
                                     channels, selection, theirs.grad_x.data(), theirs.grad_weight.data(),
                                     nullptr) == Status::ok);
  EXPECT(same(ours.grad_x, theirs.grad_x) && same(ours.grad_weight, theirs.grad_weight));

  EXPECT(madtp_cuda_gather_merge(x.data(), MADTP_DTYPE_FLOAT32, channels, channels, nullptr, ours.out.data(),
                                 nullptr) == MADTP_STATUS_INVALID_ARGUMENT);
  given.struct_size = 0;
  EXPECT(madtp_cuda_gather_merge(x.data(), MADTP_DTYPE_FLOAT32, channels, channels, &given, ours.out.data(),
                                 nullptr) == MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(same(ours.out, theirs.out));
}

TEST(sparse24_has_the_bits_of_cpp) {
  const LinearCase p(DType::bfloat16, 9, 24, 64);
  std::int64_t bytes = -1;
  EXPECT(madtp_cuda_sparse24_layout_bytes(24, 64, MADTP_DTYPE_BFLOAT16, &bytes) == MADTP_STATUS_OK);
  EXPECT(bytes == std::int64_t(p.layout.size()));
  Guarded<std::uint8_t> layout(bytes);
  const madtp_sparse24_weight weight{
      sizeof weight, p.values.data(), p.indices.data(), 24, 64, MADTP_DTYPE_BFLOAT16, 0};
  EXPECT(madtp_cuda_sparse24_pack(&weight, layout.data(), nullptr) == MADTP_STATUS_OK);
  EXPECT(same(layout, p.layout));

  const Sparse24Linear expected = p.inputs(Activation::gelu);
  madtp_sparse24_linear inputs{};
  inputs.struct_size = sizeof inputs;
  inputs.x = p.x.data(), inputs.x_stride = 64, inputs.tokens = 9;
  inputs.layout = layout.data(), inputs.out_features = 24, inputs.in_features = 64;
  inputs.bias = p.bias.data(), inputs.scale = p.scale.data();
  inputs.residual = p.residual.data(), inputs.residual_stride = 24;
  inputs.dtype = inputs.weight_dtype = MADTP_DTYPE_BFLOAT16;
  inputs.bias_dtype = inputs.scale_dtype = MADTP_DTYPE_FLOAT32;
  inputs.activation = MADTP_ACTIVATION_GELU;
  Guarded<std::uint16_t> ours(9 * 24), theirs(9 * 24);
  EXPECT(madtp_cuda_sparse24_linear(&inputs, ours.data(), 24, nullptr, nullptr) == MADTP_STATUS_OK);
  EXPECT(cuda::sparse24_linear(expected, theirs.data(), 24, nullptr) == Status::ok);
  EXPECT(same(ours, theirs));

  int count = -1, expected_count = -1;
  EXPECT(madtp_cuda_sparse24_linear_configs(&inputs, nullptr, 0, &count) == MADTP_STATUS_OK);
  EXPECT(cuda::sparse24_linear_configs(expected, nullptr, 0, &expected_count) == Status::ok);
  EXPECT(count == expected_count && count > 1);
  std::vector<madtp_sparse24_config> configs(
      2, madtp_sparse24_config{sizeof(madtp_sparse24_config), 0, 0, 0, 0});
  std::vector<cuda::Sparse24Config> expected_configs(2);
  EXPECT(madtp_cuda_sparse24_linear_configs(&inputs, configs.data(), 2, &count) == MADTP_STATUS_OK);
  EXPECT(cuda::sparse24_linear_configs(expected, expected_configs.data(), 2, &count) == Status::ok);
  for (int i = 0; i < 2; ++i) {
    EXPECT(configs[i].struct_size == sizeof configs[i] && configs[i].cluster == expected_configs[i].cluster);
    EXPECT(configs[i].architecture == expected_configs[i].architecture);
    EXPECT(configs[i].tile_tokens == expected_configs[i].tile_tokens);
    EXPECT(configs[i].tile_out_features == expected_configs[i].tile_out_features);
  }
  EXPECT(madtp_cuda_sparse24_linear(&inputs, ours.data(), 24, nullptr, &configs[1]) == MADTP_STATUS_OK);
  EXPECT(cuda::sparse24_linear(expected, theirs.data(), 24, nullptr, &expected_configs[1]) == Status::ok);
  EXPECT(same(ours, theirs));

  configs[1].struct_size = 4;
  EXPECT(madtp_cuda_sparse24_linear(&inputs, ours.data(), 24, nullptr, &configs[1]) ==
         MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(madtp_cuda_sparse24_linear_configs(&inputs, nullptr, 2, &count) == MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(madtp_cuda_sparse24_linear(nullptr, ours.data(), 24, nullptr, nullptr) ==
         MADTP_STATUS_INVALID_ARGUMENT);
  EXPECT(same(ours, theirs));
}

TEST(quantized_layers_have_the_bits_of_cpp) {
  for (const QuantizedType type : {QuantizedType::int8, QuantizedType::e4m3}) {
    const QuantizedCase p(DType::float32, 9, 24, 64, type);
    std::int64_t bytes = -1;
    EXPECT(madtp_cuda_quantized_layout_bytes(24, 64, &bytes) == MADTP_STATUS_OK);
    EXPECT(bytes == std::int64_t(p.layout.size()));
    Guarded<std::uint8_t> layout(bytes), values(9 * 64);
    Guarded<float> scale(9);
    const QuantizedWeight expected_weight = p.weight();
    const madtp_quantized_weight weight{
        sizeof weight, expected_weight.values, p.indices.data(), 24, 64, 0, 0};
    EXPECT(madtp_cuda_quantized_pack(&weight, layout.data(), nullptr) == MADTP_STATUS_OK);
    EXPECT(same(layout, p.layout));

    madtp_quantized_rows rows{sizeof rows, values.data(), 64, scale.data(), std::int32_t(type), 0};
    EXPECT(madtp_cuda_quantize_rows(MADTP_DTYPE_FLOAT32, p.x.data(), 64, 9, 64, nullptr, &rows, nullptr) ==
           MADTP_STATUS_OK);
    p.quantize();
    EXPECT(same(values, p.rows) && same(scale, p.x_scale));

    const QuantizedLinear expected = p.inputs(Activation::gelu);
    madtp_quantized_linear inputs{};
    inputs.struct_size = sizeof inputs;
    inputs.x = p.x.data(), inputs.x_stride = 64, inputs.tokens = 9;
    inputs.layout = layout.data(), inputs.weight_scale = p.weight_scale.data();
    inputs.out_features = 24, inputs.in_features = 64, inputs.sparse = 1;
    inputs.bias = p.bias.data(), inputs.scale = p.scale.data();
    inputs.residual = p.residual.data(), inputs.residual_stride = 24;
    inputs.activation = MADTP_ACTIVATION_GELU;
    Elements ours(DType::float32, 9 * 24), theirs(DType::float32, 9 * 24);
    const auto run = [&](const madtp_sparse24_config* config) {
      return madtp_cuda_quantized_linear(&inputs, &rows, ours.data(), 24, nullptr, config);
    };
    EXPECT(run(nullptr) == MADTP_STATUS_OK);
    EXPECT(cuda::quantized_linear(expected, p.quantized(), theirs.data(), 24, nullptr) == Status::ok);
    EXPECT(ours.same(theirs));

    int count = -1, expected_count = -1;
    EXPECT(cuda::quantized_linear_configs(expected, p.quantized(), nullptr, 0, &expected_count) ==
           Status::ok);
    madtp_sparse24_config config{sizeof config, 0, 0, 0, 0};
    EXPECT(madtp_cuda_quantized_linear_configs(&inputs, &rows, &config, 1, &count) == MADTP_STATUS_OK);
    EXPECT(count == expected_count && count > 0);
    EXPECT(run(&config) == MADTP_STATUS_OK);

    rows.struct_size = 4;
    EXPECT(run(nullptr) == MADTP_STATUS_INVALID_ARGUMENT);
    EXPECT(madtp_cuda_quantize_rows(MADTP_DTYPE_FLOAT32, p.x.data(), 64, 9, 64, nullptr, &rows, nullptr) ==
           MADTP_STATUS_INVALID_ARGUMENT);
    EXPECT(madtp_cuda_quantized_linear_configs(&inputs, nullptr, &config, 1, &count) ==
           MADTP_STATUS_INVALID_ARGUMENT);
    EXPECT(madtp_cuda_quantized_pack(nullptr, layout.data(), nullptr) == MADTP_STATUS_INVALID_ARGUMENT);
  }
}

TEST(pruning_has_the_bits_of_cpp) {
  Guarded<float> weight(16 * 32);
  for (std::int64_t i = 0; i < 16 * 32; ++i) weight[i] = float(i * 7 % 23) - 11;
  madtp_sparse24_dense given{};
  given.struct_size = sizeof given;
  given.weight = weight.data(), given.weight_stride = 32;
  given.out_features = 16, given.in_features = 32;
  const Sparse24Dense dense{DType::float32, weight.data(), 32, nullptr, 0, 16, 32};
  Guarded<float> ours(16 * 16), theirs(16 * 16);
  Guarded<std::uint8_t> our_indices(16 * 4), their_indices(16 * 4);
  Guarded<std::int32_t> our_nan(1), their_nan(1);
  EXPECT(madtp_cuda_sparse24_prune(&given, ours.data(), our_indices.data(), our_nan.data(), nullptr) ==
         MADTP_STATUS_OK);
  EXPECT(cuda::sparse24_prune(dense, theirs.data(), their_indices.data(), their_nan.data(), nullptr) ==
         Status::ok);
  EXPECT(same(ours, theirs) && same(our_indices, their_indices) && same(our_nan, their_nan));
  given.struct_size = 0;
  EXPECT(madtp_cuda_sparse24_prune(&given, ours.data(), our_indices.data(), our_nan.data(), nullptr) ==
         MADTP_STATUS_INVALID_ARGUMENT);
}
