// SPDX-License-Identifier: Apache-2.0
#pragma once

// The Triton kernels that the library holds, and how one is launched.

#include <cstddef>
#include <cstdint>
#include <string>

#include "madtp/dtype.h"
#include "madtp/status.h"

namespace madtp::cuda::triton {

struct Constant {
  const char* name;
  int value;
};

// A row of a table that madtp_kernels/triton/embed.py writes.
struct Kernel {
  const char* name;   // the kernel, and what is fixed in it: attention_kernel/bfloat16/64/plain
  const char* entry;  // its symbol
  int arch;           // 80, 90
  // Of each parameter: p a pointer, i int32, f float32. Pointers behind the arguments of a launch are null.
  const char* signature;
  int threads, shared_bytes;
  Constant constants[6];  // block sizes and what else was fixed; a null name ends them
  std::size_t offset, bytes;

  // By name; 0 where there is none.
  int operator[](const char* constant) const;
};

// The kernels of a family of ops, and their code: null in a build for tests of launches.
struct Family {
  const Kernel* kernels;
  std::size_t count;
  const unsigned char* images;
};

// Empty in a library that was built without Triton.
extern const Family attention_kernels, attention_rows_kernels, tokens_kernels;

// Of a launch.
struct Argument {
  enum Kind { pointer, integer, number } kind;
  std::uint64_t word;  // a pointer or an integer
  float value;

  Argument(const void* data) : kind(pointer), word(std::uint64_t(data)), value(0) {}
  Argument(std::int64_t size) : kind(integer), word(std::uint64_t(size)), value(0) {}
  Argument(float scale) : kind(number), word(0), value(scale) {}
};

constexpr std::size_t kMostArguments = 32;

const char* name_of(DType dtype);

// The kernels of a family for the current device, and a stream of it. What goes wrong first stays, and
// nothing is launched after it.
class Launcher {
 public:
  Launcher(const Family& family, void* stream);

  // The kernel of this name for the device. Null, and Status::unsupported, where the library has none.
  const Kernel* find(const std::string& name);

  // Status::invalid_argument for more blocks than a grid can count.
  template <typename... Arguments>
  void launch(const Kernel* kernel, std::int64_t blocks, const Arguments&... arguments) {
    launch_grid(kernel, blocks, 1, arguments...);
  }
  template <typename... Arguments>
  void launch_grid(const Kernel* kernel, std::int64_t columns, std::int64_t rows,
                   const Arguments&... arguments) {
    static_assert(sizeof...(arguments) <= kMostArguments - 2, "kMostArguments");
    const Argument all[] = {Argument(arguments)...};
    run(kernel, columns, rows, all, sizeof...(arguments));
  }
  void fill(void* data, int byte, std::int64_t bytes);

  Status status() const { return status_; }

 private:
  void run(const Kernel* kernel, std::int64_t columns, std::int64_t rows, const Argument* arguments,
           std::size_t count);

  const Family& family_;
  void* stream_;
  int device_ = 0, arch_ = 0;
  Status status_;
};

// Takes pieces of a workspace, or counts the bytes of one where that is null.
class Workspace {
 public:
  explicit Workspace(void* data) : data_(static_cast<char*>(data)) {}

  template <typename T>
  T* take(std::int64_t rows, std::int64_t columns = 1);
  std::int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  std::int64_t bytes_ = 0;
};

}  // namespace madtp::cuda::triton
