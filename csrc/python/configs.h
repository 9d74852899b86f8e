// SPDX-License-Identifier: Apache-2.0
#pragma once

// madtp::cuda::Sparse24Config for Python.

#include <optional>
#include <tuple>
#include <vector>

#include "madtp/sparse24.h"
#include "python/common.h"

#if MADTP_HAS_CUDA
namespace madtp::python {

// A configuration, or None for what runs unasked.
using Config = std::tuple<int, int, int, int>;

template <typename Function>
auto with_config(const std::optional<Config>& given, Function&& function) {
  if (!given) return function(nullptr);
  const auto [architecture, tile_tokens, tile_out_features, cluster] = *given;
  const cuda::Sparse24Config config{architecture, tile_tokens, tile_out_features, cluster};
  return function(&config);
}

// All that list(configs, capacity, count) writes.
template <typename List>
std::vector<Config> all_configs(const char* name, List&& list) {
  int count = 0;
  check(list(nullptr, 0, &count), name);
  std::vector<cuda::Sparse24Config> configs(static_cast<std::size_t>(count));
  check(list(configs.data(), count, &count), name);
  std::vector<Config> result;
  for (const cuda::Sparse24Config& c : configs)
    result.emplace_back(c.architecture, c.tile_tokens, c.tile_out_features, c.cluster);
  return result;
}

}  // namespace madtp::python
#endif
