// SPDX-License-Identifier: Apache-2.0
#pragma once

// A stack of its own for each thread of a block, and the switch between them. On x86-64 the switch saves what
// the ABI asks a function to keep and no more, several times faster than ucontext, which serves elsewhere.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(MADTP_SIMT_UCONTEXT)
#define MADTP_SIMT_UCONTEXT_SWITCH 1
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace madtp::simt {

constexpr std::size_t kPage = 4096;

// A stack, as AddressSanitizer wants to hear of it.
struct StackBounds {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
};

#ifdef MADTP_SIMT_UCONTEXT_SWITCH
struct Context {
  ucontext_t saved;
  StackBounds bounds;
};

inline void jump(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

inline void start_at(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  context.bounds = {stack, bytes};
  makecontext(&context.saved, entry, 0);
}
#else
struct Context {
  void* stack_pointer = nullptr;
  StackBounds bounds;
};

extern "C" void madtp_simt_switch(void** save, void* load);
asm(R"(
.text
.weak madtp_simt_switch
.type madtp_simt_switch, @function
madtp_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void jump(Context& from, Context& to) { madtp_simt_switch(&from.stack_pointer, to.stack_pointer); }

inline void start_at(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // as if called: the stack is 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
  context.bounds = {stack, bytes};
}
#endif

// Comes first in a fiber that begins, with what it was switched to from.
inline void has_switched([[maybe_unused]] void* fake_stack, [[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &from.bounds.bottom, &from.bounds.bytes);
#endif
}

inline void switch_to(Context& from, Context& to) {
  void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack, to.bounds.bottom, to.bounds.bytes);
#endif
  jump(from, to);
  has_switched(fake_stack, to);
}

// Memory with a page after it, and one before it, that nobody may touch.
class GuardedPages {
 public:
  GuardedPages() = default;
  explicit GuardedPages(std::size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const all = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, kFlags, -1, 0);
    if (all == MAP_FAILED) return;
    data_ = static_cast<unsigned char*>(all) + kPage;
    if (mprotect(data_, bytes_, PROT_READ | PROT_WRITE) != 0) data_ = nullptr;
  }
  GuardedPages(GuardedPages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  GuardedPages& operator=(GuardedPages&& other) noexcept {
    unsigned char* const data = data_;
    const std::size_t bytes = bytes_;
    data_ = other.data_, bytes_ = other.bytes_;
    other.data_ = data, other.bytes_ = bytes;
    return *this;
  }
  ~GuardedPages() {
    if (data_ != nullptr) munmap(data_ - kPage, bytes_ + 2 * kPage);
  }

  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  unsigned char* end() const { return data_ + bytes_; }

 private:
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace madtp::simt
