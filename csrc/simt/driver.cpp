// SPDX-License-Identifier: Apache-2.0
#include "simt/driver.h"

#include <cuda.h>

#include <mutex>
#include <set>
#include <utility>

namespace {

using madtp::simt::driver_options;

using Entry = std::pair<const void*, std::string>;  // of an image

std::mutex mutex;
std::set<Entry>& entries() {
  static std::set<Entry> all;
  return all;
}

}  // namespace

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(&mutex);
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  if (driver_options.load_error != 0) return CUresult(driver_options.load_error);
  const std::lock_guard<std::mutex> lock(mutex);
  ++madtp::simt::loads;
  *library = reinterpret_cast<CUlibrary>(const_cast<void*>(code));
  return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  *kernel = reinterpret_cast<CUkernel>(const_cast<Entry*>(&*entries().emplace(library, name).first));
  return CUDA_SUCCESS;
}

CUresult cuKernelSetAttribute(CUfunction_attribute, int, CUkernel, CUdevice) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned, unsigned block_x,
                        unsigned, unsigned, unsigned shared_bytes, CUstream stream, void** parameters,
                        void**) {
  if (driver_options.launch_error != 0) return CUresult(driver_options.launch_error);
  const Entry& entry = *reinterpret_cast<const Entry*>(function);
  if (driver_options.on_launch != nullptr)
    driver_options.on_launch(
        {entry.first, entry.second, grid_x, grid_y, block_x, shared_bytes, stream, parameters});
  return CUDA_SUCCESS;
}
