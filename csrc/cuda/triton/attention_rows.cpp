// SPDX-License-Identifier: Apache-2.0
// attention_rows: the grids and buffers of madtp_kernels/triton/attention_rows/forward.py.

#include "madtp/attention_rows.h"

#include <cmath>
#include <string>

#include "cpu/checks.h"
#include "cuda/triton/kernels.h"
#include "sizes.h"

namespace madtp::cuda {
namespace {

using cpu::is_matrix;
using cpu::is_present;

constexpr std::int64_t kAligned = 8;           // elements: what the kernels take sizes to be multiples of
constexpr std::int64_t kMaxStride = 1 << 24;   // between rows, which are addressed by 32 bits
constexpr std::int64_t kMostKeyHeads = 65535;  // that a grid can count
constexpr double kLog2E = 1.4426950408889634;

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// (rows, heads, head_dim)
bool is_tensor(const AttentionRowsInputs& a, const void* data, std::int64_t rows, std::int64_t heads,
               const std::int64_t (&strides)[2]) {
  for (const std::int64_t stride : strides)
    if (stride % kAligned != 0) return false;
  return is_matrix(data, a.dtype, rows, product_of({heads, a.head_dim}), strides[0]) &&
         is_addressable(heads, a.head_dim, strides[1], size_of(a.dtype)) && is_aligned(data) &&
         std::abs(strides[0]) < kMaxStride && std::abs(strides[1]) <= INT32_MAX;
}

bool is_valid(const AttentionRowsInputs& a) {
  return is_count(a.rows) && is_count(a.tokens) && is_count(a.batch) && is_count(a.heads) &&
         is_count(a.key_heads) && is_count(a.head_dim) && a.key_heads > 0 && a.key_heads <= kMostKeyHeads &&
         a.heads > 0 && a.heads % a.key_heads == 0 && a.head_dim > 0 && a.head_dim % kAligned == 0 &&
         a.cu_seqlens_q != nullptr && a.cu_seqlens_k != nullptr &&
         is_tensor(a, a.q_rows, a.rows, a.heads, a.q_strides) &&
         is_tensor(a, a.k, a.tokens, a.key_heads, a.k_strides) && std::isfinite(a.softmax_scale);
}

struct Buffers {
  float *highest, *weight;
  std::int32_t* last;  // a position after all keys
  std::int64_t bytes;

  Buffers(const AttentionRowsInputs& a, void* workspace) {
    triton::Workspace room(workspace);
    highest = room.take<float>(a.rows, a.heads);
    weight = room.take<float>(a.rows, a.heads);
    last = room.take<std::int32_t>(a.rows);
    bytes = room.bytes();
  }
};

}  // namespace

Status attention_rows(const AttentionRowsInputs& a, float* attention, void* workspace, void* stream) {
  if (!is_valid(a) || !is_present(attention, a.tokens) || workspace == nullptr || !is_aligned(workspace))
    return Status::invalid_argument;
  if (a.tokens == 0) return Status::ok;
  triton::Launcher launcher(triton::attention_rows_kernels, stream);
  if (a.rows == 0 || a.batch == 0) {
    launcher.fill(attention, 0, a.tokens * 4);
    return launcher.status();
  }
  const std::int64_t group = a.heads / a.key_heads;
  const std::string dtype = triton::name_of(a.dtype);
  const triton::Kernel* const softmax = launcher.find("row_softmax_kernel/" + dtype);
  const triton::Kernel* const sums = launcher.find("attention_rows_kernel/" + dtype);
  if (launcher.status() != Status::ok) return launcher.status();
  if (group > (*softmax)["BLOCK_M"]) return Status::unsupported;

  const Buffers buffers(a, workspace);
  const std::int32_t* position = a.row_position;
  if (position == nullptr) {
    constexpr int kLarge = 0x7f;  // of each byte
    launcher.fill(buffers.last, kLarge, a.rows * 4);
    position = buffers.last;
  }
  const float scale = float(double(a.softmax_scale) * kLog2E);
  launcher.launch_grid(softmax, a.rows, a.key_heads, a.q_rows, a.k, a.cu_seqlens_q, a.cu_seqlens_k, position,
                       buffers.highest, buffers.weight, a.q_strides[0], a.q_strides[1], a.k_strides[0],
                       a.k_strides[1], scale, a.rows, a.tokens, a.batch, group, a.head_dim);
  const std::int64_t blocks = quotient_up(a.tokens, (*sums)["BLOCK_N"]);
  launcher.launch(sums, product_of({blocks, a.batch}), a.q_rows, a.k, a.cu_seqlens_q, a.cu_seqlens_k,
                  position, buffers.highest, buffers.weight, attention, a.q_strides[0], a.q_strides[1],
                  a.k_strides[0], a.k_strides[1], scale, a.rows, a.tokens, a.batch, a.key_heads, group,
                  a.head_dim);
  return launcher.status();
}

Status attention_rows_workspace(const AttentionRowsInputs& a, std::int64_t* bytes) {
  if (!is_valid(a) || bytes == nullptr) return Status::invalid_argument;
  *bytes = Buffers(a, nullptr).bytes;
  return Status::ok;
}

}  // namespace madtp::cuda
