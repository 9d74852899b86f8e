// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace madtp {

// What every entry point returns: the library never throws, prints or exits.
enum class Status : int {
  ok = 0,
  invalid_argument = 1,  // a size, dtype or pointer breaks a documented rule; nothing was written
  unsupported = 2,       // this build or this machine cannot run it
  cuda_error = 3,        // the CUDA runtime refused the launch
  out_of_memory = 4,     // scratch memory could not be had; nothing was written
};

constexpr const char* to_string(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::invalid_argument:
      return "invalid argument";
    case Status::unsupported:
      return "unsupported";
    case Status::out_of_memory:
      return "out of memory";
    case Status::cuda_error:
      return "CUDA error";
  }
  return "unknown status";
}

}  // namespace madtp
