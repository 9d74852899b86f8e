// SPDX-License-Identifier: Apache-2.0
// Kernels are loaded when they are first launched, once for all devices: libraries of the driver belong to no
// context.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "cuda/device.h"
#include "cuda/triton/kernels.h"
#include "sizes.h"

namespace madtp::cuda::triton {
namespace {

// From the driver that is there: the library does not link it.
struct Driver {
  decltype(&cuCtxGetCurrent) current_context = nullptr;
  decltype(&cuLibraryLoadData) load = nullptr;
  decltype(&cuLibraryGetKernel) kernel = nullptr;
  decltype(&cuKernelSetAttribute) set_attribute = nullptr;
  decltype(&cuLaunchKernel) launch = nullptr;

  bool is_complete() const { return current_context && load && kernel && set_attribute && launch; }
};

#ifdef MADTP_SIMT
#define MADTP_FIND(function, version) function
#else
template <typename Function>
Function* find(const char* name, unsigned version, Function*) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess)
    return reinterpret_cast<Function*>(function);
  cudaGetLastError();
  return nullptr;
}
#define MADTP_FIND(function, version) find(#function, version, decltype (&function)(nullptr))
#endif

Driver find_driver() {
  return {MADTP_FIND(cuCtxGetCurrent, 12000), MADTP_FIND(cuLibraryLoadData, 12000),
          MADTP_FIND(cuLibraryGetKernel, 12000), MADTP_FIND(cuKernelSetAttribute, 12000),
          MADTP_FIND(cuLaunchKernel, 12000)};
}

const Driver& driver() {
  static const Driver found = find_driver();
  return found;
}

Status to_status(CUresult result) {
  switch (result) {
    case CUDA_SUCCESS:
      return Status::ok;
    case CUDA_ERROR_OUT_OF_MEMORY:
      return Status::out_of_memory;
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
      return Status::unsupported;
    case CUDA_ERROR_INVALID_HANDLE:   // a stream that is none,
    case CUDA_ERROR_INVALID_CONTEXT:  // or of another device
      return Status::invalid_argument;
    default:
      return Status::cuda_error;
  }
}

// The runtime makes a context when it needs one; the driver does not.
bool has_context() {
  CUcontext context = nullptr;
  if (driver().current_context(&context) == CUDA_SUCCESS && context != nullptr) return true;
  if (cudaFree(nullptr) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

Status load(const Kernel& kernel, const void* image, CUkernel* loaded) {
  static std::mutex mutex;
  static std::unordered_map<const Kernel*, CUkernel> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = all.find(&kernel);
  if (known != all.end()) {
    *loaded = known->second;
    return Status::ok;
  }
  CUlibrary library;
  Status status = to_status(driver().load(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0));
  if (status == Status::ok) status = to_status(driver().kernel(loaded, library, kernel.entry));
  if (status == Status::ok) all.emplace(&kernel, *loaded);
  return status;
}

// The code of a GPU, which others of its generation run too: sm_80 is for 8.x.
int arch_of(int capability) { return capability >= 80 && capability < 90 ? 80 : capability; }

}  // namespace

int Kernel::operator[](const char* constant) const {
  for (const Constant& known : constants)
    if (known.name != nullptr && std::strcmp(known.name, constant) == 0) return known.value;
  return 0;
}

const char* name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

Launcher::Launcher(const Family& family, void* stream) : family_(family), stream_(stream) {
  Device device;
  status_ = current_device(&device);
  if (status_ == Status::ok && !driver().is_complete()) status_ = Status::unsupported;
  if (status_ != Status::ok) return;
  device_ = device.id;
  arch_ = arch_of(device.capability);
}

const Kernel* Launcher::find(const std::string& name) {
  if (status_ != Status::ok) return nullptr;
  for (std::size_t i = 0; i < family_.count; ++i) {
    const Kernel& kernel = family_.kernels[i];
    if (kernel.arch == arch_ && name == kernel.name) return &kernel;
  }
  status_ = Status::unsupported;
  return nullptr;
}

void Launcher::fill(void* data, int byte, std::int64_t bytes) {
  if (status_ != Status::ok || bytes == 0) return;
  const cudaError_t error =
      cudaMemsetAsync(data, byte, std::size_t(bytes), static_cast<cudaStream_t>(stream_));
  if (error == cudaSuccess) return;
  cudaGetLastError();
  status_ = error == cudaErrorInvalidResourceHandle ? Status::invalid_argument : Status::cuda_error;
}

void Launcher::run(const Kernel* kernel, std::int64_t columns, std::int64_t rows, const Argument* arguments,
                   std::size_t count) {
  if (status_ != Status::ok) return;
  if (!is_count(columns) || rows > 65535) {
    status_ = Status::invalid_argument;
    return;
  }
  union {
    std::uint64_t word;
    std::int32_t number;
    float value;
  } values[kMostArguments] = {};
  void* parameters[kMostArguments];
  const std::size_t all = std::strlen(kernel->signature);
  bool fits = all >= count && all <= kMostArguments;
  for (std::size_t i = 0; fits && i < all; ++i) {
    parameters[i] = &values[i];
    const char code = kernel->signature[i];
    if (i >= count) {
      fits = code == 'p';
    } else if (code == 'p') {
      fits = arguments[i].kind == Argument::pointer;
      values[i].word = arguments[i].word;
    } else if (code == 'i') {
      fits = arguments[i].kind == Argument::integer;
      values[i].number = std::int32_t(arguments[i].word);
    } else {
      fits = arguments[i].kind == Argument::number;
      values[i].value = arguments[i].value;
    }
  }
  if (!fits || !has_context()) {  // the first: a table of other kernels than this code was written for
    status_ = Status::cuda_error;
    return;
  }
  // Without code, for tests of launches, the row stands for it.
  const void* const image =
      family_.images == nullptr ? static_cast<const void*>(kernel) : family_.images + kernel->offset;
  CUkernel loaded = nullptr;
  status_ = load(*kernel, image, &loaded);
  constexpr int kUnasked = 48 * 1024;
  if (status_ == Status::ok && kernel->shared_bytes > kUnasked)
    status_ = to_status(driver().set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                               kernel->shared_bytes, loaded, device_));
  if (status_ == Status::ok)
    status_ = to_status(driver().launch(
        reinterpret_cast<CUfunction>(loaded), unsigned(columns), unsigned(rows), 1, unsigned(kernel->threads),
        1, 1, unsigned(kernel->shared_bytes), static_cast<CUstream>(stream_), parameters, nullptr));
}

template <typename T>
T* Workspace::take(std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kAligned = 256;
  T* const piece = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + bytes_);
  const std::int64_t size = product_of({rows, columns, std::int64_t(sizeof(T))});
  bytes_ = sum_of({bytes_, quotient_up(size, kAligned) * kAligned});
  return piece;
}
template float* Workspace::take<float>(std::int64_t, std::int64_t);
template std::int32_t* Workspace::take<std::int32_t>(std::int64_t, std::int64_t);
template std::uint8_t* Workspace::take<std::uint8_t>(std::int64_t, std::int64_t);

}  // namespace madtp::cuda::triton
