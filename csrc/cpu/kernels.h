// SPDX-License-Identifier: Apache-2.0
#pragma once

// Declares the kernels of every instruction set this library is compiled for. A new op adds its header to the
// three lists.

#include "build_config.h"

#define MADTP_ISA baseline
#include "cpu/kernels/attention.h"
#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/sparse24.h"
#include "cpu/kernels/tokens.h"
#undef MADTP_ISA

#if MADTP_HAS_AVX2
#define MADTP_ISA avx2
#include "cpu/kernels/attention.h"
#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/sparse24.h"
#include "cpu/kernels/tokens.h"
#undef MADTP_ISA
#endif

#if MADTP_HAS_AVX2_VNNI
namespace madtp::cpu::avx2_vnni {
using namespace avx2;  // what is not declared here itself
}
#define MADTP_ISA avx2_vnni
#include "cpu/kernels/quantized.h"
#undef MADTP_ISA
#endif

#if MADTP_HAS_AVX512
#define MADTP_ISA avx512
#include "cpu/kernels/attention.h"
#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/quantized.h"
#include "cpu/kernels/sparse24.h"
#include "cpu/kernels/tokens.h"
#undef MADTP_ISA
#endif

#if MADTP_HAS_AVX512_VNNI
namespace madtp::cpu::avx512_vnni {
using namespace avx512;
}
#define MADTP_ISA avx512_vnni
#include "cpu/kernels/quantized.h"
#undef MADTP_ISA
#endif

#if MADTP_HAS_AVX512_BF16
namespace madtp::cpu::avx512_bf16 {
using namespace avx512_vnni;
}
#define MADTP_ISA avx512_bf16
#include "cpu/kernels/attention.h"
#include "cpu/kernels/sparse24.h"
#undef MADTP_ISA
#endif

#if MADTP_HAS_NEON_DOTPROD
namespace madtp::cpu::neon_dotprod {
using namespace baseline;
}
#define MADTP_ISA neon_dotprod
#include "cpu/kernels/quantized.h"
#undef MADTP_ISA
#endif
