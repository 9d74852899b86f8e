// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <cstdlib>

#if MADTP_HAS_AVX2 || MADTP_HAS_AVX512
#include <cpuid.h>
#endif
#if MADTP_HAS_NEON_DOTPROD
#include <sys/auxv.h>
#endif

namespace madtp::cpu {
namespace {

#if MADTP_HAS_AVX2 || MADTP_HAS_AVX512
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx2_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx2_vnni() { return false; }
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
#endif

#if MADTP_HAS_NEON_DOTPROD
bool has_neon_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
bool has_neon_dotprod() { return false; }
#endif

bool has(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return has_avx2();
    case Isa::avx2_vnni:
      return has_avx2_vnni();
    case Isa::avx512:
      return has_avx512();
    case Isa::avx512_vnni:
      return has_avx512_vnni();
    case Isa::avx512_bf16:
      return has_avx512_bf16();
    case Isa::neon_dotprod:
      return has_neon_dotprod();
    default:
      return true;
  }
}

IsaChoice choose() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("MADTP_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return {available.back(), ""};
  std::string names;
  for (Isa isa : available) {
    if (std::string(wanted) == to_string(isa)) return {isa, ""};
    names += (names.empty() ? "" : ", ") + std::string(to_string(isa));
  }
  return {Isa::baseline, "MADTP_CPU_ISA must be one of " + names +
                             " (what this build and this CPU have), got '" + wanted + "'"};
}

}  // namespace

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx2_vnni:
      return "avx2_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::neon_dotprod:
      return "neon_dotprod";
    default:
      return "baseline";
  }
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if MADTP_HAS_AVX2
  isas.push_back(Isa::avx2);
#endif
#if MADTP_HAS_AVX2_VNNI
  isas.push_back(Isa::avx2_vnni);
#endif
#if MADTP_HAS_AVX512
  isas.push_back(Isa::avx512);
#endif
#if MADTP_HAS_AVX512_VNNI
  isas.push_back(Isa::avx512_vnni);
#endif
#if MADTP_HAS_AVX512_BF16
  isas.push_back(Isa::avx512_bf16);
#endif
#if MADTP_HAS_NEON_DOTPROD
  isas.push_back(Isa::neon_dotprod);
#endif
  return isas;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : compiled_isas()) {
    if (has(isa)) isas.push_back(isa);
  }
  return isas;
}

const IsaChoice& isa_choice() {
  static const IsaChoice choice = choose();
  return choice;
}

}  // namespace madtp::cpu
