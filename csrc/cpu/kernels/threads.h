// SPDX-License-Identifier: Apache-2.0
#pragma once

#if !defined(MADTP_ISA)
#error "files in cpu/kernels are compiled once per instruction set: see cmake/Isa.cmake"
#endif

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace madtp::cpu::MADTP_ISA {

// The number of this thread inside its parallel region.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// body(task, thread) for every task, on at most `threads` threads. Alone it needs no team, whose barrier
// costs a system call: more than a small task.
template <typename Body>
inline void for_each_task(std::int64_t tasks, int threads, Body&& body) {
  if (threads == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t task = 0; task < tasks; ++task) body(task, thread_number());
}

}  // namespace madtp::cpu::MADTP_ISA
