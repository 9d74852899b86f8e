// SPDX-License-Identifier: Apache-2.0
#pragma once

// Kernels that come compiled: this machine does not run them, but records what was asked of the driver.

#include <string>
#include <vector>

namespace madtp::simt {

struct DriverLaunch {
  const void* image;  // what was loaded
  std::string entry;
  unsigned columns, rows, threads, shared_bytes;
  void* stream;
  void** parameters;  // while `on_launch` runs
};

struct DriverOptions {
  int load_error = 0;    // the CUresult of every load,
  int launch_error = 0;  // and of every launch
  void (*on_launch)(const DriverLaunch&) = nullptr;
};
inline DriverOptions driver_options;
inline int loads = 0;  // how many images were loaded

}  // namespace madtp::simt
