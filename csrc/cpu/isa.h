// SPDX-License-Identifier: Apache-2.0
#pragma once

// The CPU kernels in csrc/cpu/kernels are compiled once per instruction set, each into its own namespace
// (madtp::cpu::baseline, ::avx2, ::avx512, and where dot products of bytes or of bfloat16 serve ::avx2_vnni,
// ::avx512_vnni, ::neon_dotprod and ::avx512_bf16); the one in use is chosen at run time, once per process.

#include <string>
#include <vector>

#include "build_config.h"
#include "madtp/status.h"

namespace madtp::cpu {

enum class Isa : int { baseline, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, neon_dotprod };

struct IsaChoice {
  Isa isa = Isa::baseline;
  std::string error;  // why MADTP_CPU_ISA cannot be honoured; empty when it can
};

const char* to_string(Isa isa);

// What this library was compiled for, from the narrowest to the widest.
std::vector<Isa> compiled_isas();

// The part of compiled_isas() that this CPU and its operating system can run. Never empty.
std::vector<Isa> available_isas();

// The widest available, or the one the environment variable MADTP_CPU_ISA names. Read at first use, then
// fixed.
const IsaChoice& isa_choice();

}  // namespace madtp::cpu

#if MADTP_HAS_AVX2
#define MADTP_CASE_AVX2(...)    \
  case ::madtp::cpu::Isa::avx2: \
    return ::madtp::cpu::avx2::__VA_ARGS__;
#else
#define MADTP_CASE_AVX2(...)
#endif

#if MADTP_HAS_AVX2_VNNI
#define MADTP_CASE_AVX2_VNNI(...)    \
  case ::madtp::cpu::Isa::avx2_vnni: \
    return ::madtp::cpu::avx2_vnni::__VA_ARGS__;
#else
#define MADTP_CASE_AVX2_VNNI(...)
#endif

#if MADTP_HAS_AVX512
#define MADTP_CASE_AVX512(...)    \
  case ::madtp::cpu::Isa::avx512: \
    return ::madtp::cpu::avx512::__VA_ARGS__;
#else
#define MADTP_CASE_AVX512(...)
#endif

#if MADTP_HAS_AVX512_VNNI
#define MADTP_CASE_AVX512_VNNI(...)    \
  case ::madtp::cpu::Isa::avx512_vnni: \
    return ::madtp::cpu::avx512_vnni::__VA_ARGS__;
#else
#define MADTP_CASE_AVX512_VNNI(...)
#endif

#if MADTP_HAS_AVX512_BF16
#define MADTP_CASE_AVX512_BF16(...)    \
  case ::madtp::cpu::Isa::avx512_bf16: \
    return ::madtp::cpu::avx512_bf16::__VA_ARGS__;
#else
#define MADTP_CASE_AVX512_BF16(...)
#endif

#if MADTP_HAS_NEON_DOTPROD
#define MADTP_CASE_NEON_DOTPROD(...)    \
  case ::madtp::cpu::Isa::neon_dotprod: \
    return ::madtp::cpu::neon_dotprod::__VA_ARGS__;
#else
#define MADTP_CASE_NEON_DOTPROD(...)
#endif

// The body of a public entry point: MADTP_DISPATCH(gather_merge(x, dtype)) returns
// madtp::cpu::<isa>::gather_merge(x, dtype), or Status::unsupported when MADTP_CPU_ISA asks for what is not
// here.
#define MADTP_DISPATCH(...)                                             \
  do {                                                                  \
    const ::madtp::cpu::IsaChoice& choice = ::madtp::cpu::isa_choice(); \
    if (!choice.error.empty()) return ::madtp::Status::unsupported;     \
    switch (choice.isa) {                                               \
      MADTP_CASE_NEON_DOTPROD(__VA_ARGS__)                              \
      MADTP_CASE_AVX512_BF16(__VA_ARGS__)                               \
      MADTP_CASE_AVX512_VNNI(__VA_ARGS__)                               \
      MADTP_CASE_AVX512(__VA_ARGS__)                                    \
      MADTP_CASE_AVX2_VNNI(__VA_ARGS__)                                 \
      MADTP_CASE_AVX2(__VA_ARGS__)                                      \
      default:                                                          \
        return ::madtp::cpu::baseline::__VA_ARGS__;                     \
    }                                                                   \
  } while (false)
