// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <mutex>

#include "build_config.h"
#include "cuda/device.h"

namespace madtp::cuda {
namespace {

#ifdef MADTP_SIMT
std::string_view library_archs() { return simt::options.archs; }
#else
std::string_view library_archs() { return MADTP_CUDA_ARCHS; }
#endif

bool ask(int id, Device* device) {
  int major, minor;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, id) == cudaSuccess;
  };
  if (!get(&major, cudaDevAttrComputeCapabilityMajor) || !get(&minor, cudaDevAttrComputeCapabilityMinor) ||
      !get(&device->multiprocessors, cudaDevAttrMultiProcessorCount) ||
      !get(&device->block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
      !get(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor))
    return false;
  device->id = id;
  device->capability = 10 * major + minor;
  device->has_code = has_code(library_archs(), device->capability);
  device->specific_code = specific_code(library_archs(), device->capability);
  return true;
}

// use(number, kind) for each of `archs` that a device runs: 90 and 'a' of "90a", 80 and ' ' of "80".
template <typename Use>
void for_each_runnable(std::string_view archs, int capability, Use&& use) {
  while (!archs.empty()) {
    const std::string_view arch = archs.substr(0, archs.find(';'));
    archs.remove_prefix(std::min(arch.size() + 1, archs.size()));
    int number = 0;
    const char* const end = arch.data() + arch.size();
    const char* const suffix = std::from_chars(arch.data(), end, number).ptr;
    const bool is_newer = capability >= number, is_family = capability / 10 == number / 10;
    const char kind = suffix == end ? ' ' : *suffix;
    if (kind == 'a' ? capability == number : is_newer && (kind != 'f' || is_family)) use(number, kind);
  }
}

}  // namespace

bool has_code(std::string_view archs, int capability) {
  bool found = false;
  for_each_runnable(archs, capability, [&](int, char) { found = true; });
  return found;
}

int specific_code(std::string_view archs, int capability) {
  int newest = 0;
  for_each_runnable(archs, capability, [&](int number, char kind) {
    if (kind != ' ') newest = std::max(newest, number);
  });
  return newest;
}

Status current_device(Device* device) {
  struct Known {
    int id = -1;
    Device device;
  };
  static std::array<Known, 64> known;  // devices of higher numbers take turns
  static std::mutex mutex;
  int id;
  if (cudaGetDevice(&id) == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(mutex);
    Known& entry = known[std::size_t(id) % known.size()];
    if (entry.id != id) entry.id = ask(id, &entry.device) ? id : -1;
    if (entry.id == id) {
      *device = entry.device;
      return device->capability >= 80 && device->has_code ? Status::ok : Status::unsupported;
    }
  }
  cudaGetLastError();
  return Status::unsupported;  // no device, or no driver
}

}  // namespace madtp::cuda
