// SPDX-License-Identifier: Apache-2.0
#pragma once

// The device that a call is for.

#include <string_view>

#include "madtp/status.h"

namespace madtp::cuda {

struct Device {
  int capability;  // 80 for 8.0
  int multiprocessors;
  int block_shared_bytes;  // the most that a block may have
  int shared_bytes;        // what a multiprocessor has
  bool has_code;           // whether the library has code for it
  int specific_code;       // N where that is of this architecture (sm_<N>a) or family (sm_<N>f) alone, or 0
  int id = 0;              // as the CUDA runtime numbers it
};

// Whether a library built for `archs` (as in MADTP_CUDA_ARCHS) has code for a device. "80" is for that and
// all newer ones, "90a" for that alone, "100f" for those of its family from it on.
bool has_code(std::string_view archs, int capability);

// The newest of the architecture-specific and family-specific `archs` that a device runs: 90 of "90a"; or 0.
int specific_code(std::string_view archs, int capability);

// The current device. Status::unsupported where there is none, where it is older than 8.0, and where the
// library has no code for it. Safe to call from any thread; a device is asked once.
Status current_device(Device* device);

}  // namespace madtp::cuda
