// SPDX-License-Identifier: Apache-2.0
// Which configurations of a linear layer there are on which device; each of them is right, no other runs.

#include <vector>

#include "cuda/sparse24/architectures.h"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::test;

namespace {

using Config = cuda::Sparse24Config;

std::vector<Config> list(const Sparse24Linear& inputs) {
  int count = -1;
  EXPECT(cuda::sparse24_linear_configs(inputs, nullptr, 0, &count) == Status::ok && count > 0);
  std::vector<Config> result(static_cast<std::size_t>(count));
  EXPECT(cuda::sparse24_linear_configs(inputs, result.data(), count, &count) == Status::ok);
  return result;
}

std::size_t count(const std::vector<Config>& configs, int architecture) {
  return std::size_t(std::count_if(configs.begin(), configs.end(), [=](const Config& config) {
    return config.architecture == architecture;
  }));
}

Status run(const Sparse24Linear& inputs, const Config& config, std::uint16_t* out) {
  return cuda::sparse24_linear(inputs, out, inputs.out_features, nullptr, &config);
}

}  // namespace

TEST(every_configuration_on_the_list_follows_the_equation) {
  for (const cuda::LinearArchitecture* of : cuda::kLinearArchitectures) {
    const int capability = of->architecture;
    const Capability pretended(capability);
    const LinearCase p(DType::bfloat16, 70, 136, 64 * 8);
    const Sparse24Linear inputs = p.inputs(Activation::gelu);
    const std::vector<Config> configs = list(inputs);
    EXPECT(count(configs, 80) == 5);
    EXPECT(count(configs, 90) == (capability == 90 ? 15 : 0));  // 3 clusters, 5 tiles
    EXPECT(count(configs, capability) > 0);
    std::size_t of_any = 0;
    for (const cuda::LinearArchitecture* any : cuda::kLinearArchitectures)
      of_any += count(configs, any->architecture);
    EXPECT(configs.size() == of_any);
    for (const Config& config : configs) {
      const Guarded<std::uint16_t> out(p.tokens * p.out_features);
      EXPECT(run(inputs, config, out.data()) == Status::ok);
      EXPECT(within_twice(p, inputs, out.data(), p.out_features));
    }
  }
}

TEST(the_list_is_of_what_can_run_here) {
  const auto counts = [](int capability, const char* archs, std::int64_t in_features) {
    const Capability pretended(capability, archs);
    const std::vector<Config> configs =
        list(LinearCase(DType::float16, 4, 16, in_features).inputs(Activation::none));
    return std::vector<std::size_t>{count(configs, 80), count(configs, 90)};
  };
  using Counts = std::vector<std::size_t>;
  EXPECT((counts(90, "80;90a", 512) == Counts{5, 15}));
  EXPECT((counts(90, "80;90a", 0) == Counts{5, 0}));
  EXPECT((counts(90, "90a", 64) == Counts{5, 15}));
  EXPECT((counts(90, "80", 512) == Counts{5, 0}));
  EXPECT((counts(120, "80;90a", 512) == Counts{5, 0}));
}

TEST(a_short_list_is_the_beginning_of_the_long_one) {
  const LinearCase p(DType::bfloat16, 4, 16, 64);
  const Sparse24Linear inputs = p.inputs(Activation::none);
  const std::vector<Config> all = list(inputs);
  Config two[3] = {{}, {}, {1, 2, 3}};
  int count = -1;
  EXPECT(cuda::sparse24_linear_configs(inputs, two, 2, &count) == Status::ok);
  EXPECT(count == int(all.size()));
  for (std::size_t i = 0; i < 2; ++i)
    EXPECT(two[i].tile_tokens == all[i].tile_tokens && two[i].cluster == all[i].cluster);
  EXPECT(two[2].architecture == 1);
  EXPECT(cuda::sparse24_linear_configs(inputs, two, 2, nullptr) == Status::invalid_argument);
  EXPECT(cuda::sparse24_linear_configs(inputs, two, -1, &count) == Status::invalid_argument);
  EXPECT(cuda::sparse24_linear_configs(inputs, nullptr, 2, &count) == Status::invalid_argument);
}

TEST(no_configuration_off_the_list_runs) {
  const LinearCase p(DType::bfloat16, 4, 16, 32);
  const Sparse24Linear inputs = p.inputs(Activation::none);
  const Guarded<std::uint16_t> out(4 * 16);
  for (const Config& config : {Config{80, 32, 32}, Config{80, 64, 64, 2}, Config{80, 64, 32},
                               Config{90, 32, 128}, Config{90, 128, 64}, Config{90, 64, 128, 0},
                               Config{90, 64, 128, 3}, Config{90, 256, 256}, Config{100, 64, 128}})
    EXPECT(run(inputs, config, out.data()) == Status::invalid_argument);
  const Capability ampere(80);
  EXPECT(run(inputs, {90, 64, 128}, out.data()) == Status::invalid_argument);
  for (std::uint16_t bits : out.values()) EXPECT(bits == 0xffff);
}
