// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which kernel runs a call, of a table of architectures.

#include "cuda/sparse24/architectures.h"
#include "madtp/status.h"

namespace madtp::cuda {

// What a call runs.
struct Choice {
  const LinearArchitecture* architecture = nullptr;
  Sparse24Config config{};
};

inline bool is_same(const Sparse24Config& a, const Sparse24Config& b) {
  return a.architecture == b.architecture && a.tile_tokens == b.tile_tokens &&
         a.tile_out_features == b.tile_out_features && a.cluster == b.cluster;
}

// Status::invalid_argument where the configuration asked for cannot run, or none can.
inline Status choose(LinearArchitectures& architectures, const LinearCall& call, const Device& device,
                     const Sparse24Config* asked, Choice* choice) {
  for (const LinearArchitecture* one : architectures) {
    if (asked == nullptr) {
      choice->config = one->default_config(call, device);
      if (choice->config.architecture == 0) continue;
    } else {
      if (one->architecture != asked->architecture) continue;
      bool can_run = false;
      const UseConfig find = [&](const Sparse24Config& config) { can_run |= is_same(config, *asked); };
      one->configs(call, device, std::ref(find));
      if (!can_run) continue;
      choice->config = *asked;
    }
    choice->architecture = one;
    return Status::ok;
  }
  return Status::invalid_argument;
}

// Writes the first `capacity` configurations that can run a call, those of the newest architecture first, and
// how many there are.
inline void list_configs(LinearArchitectures& architectures, const LinearCall& call, const Device& device,
                         Sparse24Config* list, int capacity, int* count) {
  *count = 0;
  const auto write = [&](const Sparse24Config& config) {
    if (*count < capacity) list[*count] = config;
    ++*count;
  };
  for (const LinearArchitecture* one : architectures)
    one->configs(call, device, std::ref(write));  // a reference, for which std::function allocates nothing
}

}  // namespace madtp::cuda
