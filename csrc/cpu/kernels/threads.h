#pragma once

#if !defined(MADTP_ISA)
#error "files in cpu/kernels are compiled once per instruction set: see cmake/Isa.cmake"
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace madtp::cpu::MADTP_ISA {

// Of the thread inside its parallel region.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace madtp::cpu::MADTP_ISA
