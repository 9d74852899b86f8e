// SPDX-License-Identifier: Apache-2.0
#pragma once

// Single instructions, as functions of operands in host memory. instructions.cuh is compiled twice, by nvcc
// for a GPU and as C++ for the simulated machine, and what they make of the same operands must agree.

#include <cstdint>

#include "madtp/status.h"

namespace madtp::test {

struct LdmatrixOperands {
  std::uint32_t shared[256][4];
  std::uint32_t rows[32];  // of `shared`, that a lane names
};
struct LdmatrixResult {
  std::uint32_t r[32][4];  // by lane, as below
};

struct StmatrixOperands {
  std::uint32_t r[32][4];
  std::uint32_t rows[32];  // of the result, that a lane names: each once
};
struct StmatrixResult {
  std::uint16_t shared[32][8];
};

struct CopyOperands {
  alignas(16) unsigned char from[32][16];
  std::uint32_t to[32];  // 16-byte chunk of shared memory, each once
  int bytes[32];         // that are read
};
struct CopyResult {
  unsigned char shared[32][16];
};

// What products are made of; sums of int8 are int32, and float here, which has all that they come to.
enum class Operand { bfloat16, float16, int8, e4m3 };

struct MmaOperands {
  std::uint32_t a[32][4], b[32][4], metadata[32];
  float d[32][4];
};
struct MmaResult {
  float d[32][4];
};

struct WgmmaOperands {
  alignas(16) std::uint32_t x[256][32];          // b of two steps along k, 64 bytes each
  std::uint32_t a[2][128][4], metadata[2][128];  // of both; of 16-bit elements with selector 0, then 1
  float d[128][128];
};
struct WgmmaResult {
  float d[128][128];  // of a thread the first n / 2
};

constexpr int kMatrixRows = 13, kMatrixColumns = 72, kMatrixStride = 80, kBoxRows = 8, kBoxColumns = 64;
struct BoxOperands {
  alignas(16) std::uint16_t x[kMatrixRows][kMatrixStride];  // of which kMatrixColumns are the matrix
};
struct BoxResult {
  std::uint16_t shared[2][2][kBoxRows][kBoxColumns];  // by block of the cluster and box, as they lie
};

// Status::unsupported where the device has no such instruction.
struct Instructions {
  Status (*ldmatrix_x4)(const LdmatrixOperands&, LdmatrixResult*);
  Status (*ldmatrix_x4_trans)(const LdmatrixOperands&, LdmatrixResult*);
  Status (*stmatrix_x4_trans)(const StmatrixOperands&, StmatrixResult*);
  Status (*cp_async_16)(const CopyOperands&, CopyResult*);
  Status (*mma_sp)(Operand, int selector, const MmaOperands&, MmaResult*);  // of 8-bit elements selector 0
  // Both steps, added to d or, without `accumulate`, the second one alone.
  Status (*wgmma_sp)(Operand, int n, bool accumulate, const WgmmaOperands&, WgmmaResult*);
  // One block copies the box at (column, row); of two, each copies one into both, the second the box below.
  Status (*tma_load_2d)(int blocks, int column, int row, const BoxOperands&, BoxResult*);
};

// Those of the CUDA device, and of the simulated machine.
__attribute__((visibility("default"))) Instructions gpu_instructions();
Instructions simulated_instructions();

// Whether there is a CUDA device that the library has code for.
__attribute__((visibility("default"))) bool has_gpu();

}  // namespace madtp::test
