// SPDX-License-Identifier: Apache-2.0
// varlen_attention: the grids and buffers of madtp_kernels/triton/attention/forward.py and statistics.py.

#include "madtp/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/checks.h"
#include "cuda/triton/kernels.h"
#include "sizes.h"

namespace madtp::cuda {
namespace {

using cpu::is_matrix;
using cpu::is_present;

constexpr std::int64_t kHeadStep = 8, kMaxHeadDim = 256;
constexpr std::int64_t kAligned = 8;          // elements: what the kernels take strides to be multiples of
constexpr std::int64_t kMaxStride = 1 << 24;  // between rows, which are addressed by 32 bits
constexpr double kLog2E = 1.4426950408889634;

AttentionInputs resolved(AttentionInputs a) {
  if (a.key_heads == 0) a.key_heads = a.heads;
  if (a.causal) a.window_right = 0;
  return a;
}

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// (rows, heads, head_dim)
bool is_tensor(const AttentionInputs& a, const void* data, std::int64_t rows, std::int64_t heads,
               const std::int64_t (&strides)[2]) {
  for (const std::int64_t stride : strides)
    if (stride % kAligned != 0) return false;
  return is_matrix(data, a.dtype, rows, heads * a.head_dim, strides[0]) &&
         is_addressable(heads, a.head_dim, strides[1], size_of(a.dtype)) && is_aligned(data) &&
         std::abs(strides[0]) < kMaxStride && std::abs(strides[1]) <= INT32_MAX;
}

bool has_valid_heads(const AttentionInputs& a) {
  return is_count(a.heads) && is_count(a.key_heads) &&
         (a.key_heads > 0 ? a.heads % a.key_heads == 0 : a.heads == 0) && a.head_dim >= kHeadStep &&
         a.head_dim <= kMaxHeadDim && a.head_dim % kHeadStep == 0;
}

bool is_valid(const AttentionInputs& a, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
              bool statistics) {
  return has_valid_heads(a) && (a.heads > 0 || !statistics) && is_count(a.batch) && is_count(a.tokens_q) &&
         is_count(a.tokens_k) && max_seqlen_q >= 0 && max_seqlen_q <= a.tokens_q && max_seqlen_k >= 0 &&
         max_seqlen_k <= a.tokens_k &&
         (!statistics || (a.tokens_q == a.tokens_k && max_seqlen_q == max_seqlen_k)) &&
         a.cu_seqlens_q != nullptr && a.cu_seqlens_k != nullptr &&
         is_tensor(a, a.q, a.tokens_q, a.heads, a.q_strides) &&
         is_tensor(a, a.k, a.tokens_k, a.key_heads, a.k_strides) &&
         is_tensor(a, a.v, a.tokens_k, a.key_heads, a.v_strides) && std::isfinite(a.softmax_scale) &&
         a.softmax_scale >= 0 && std::isfinite(a.softcap) && a.softcap >= 0 && a.window_left >= -1 &&
         a.window_right >= -1;
}

// What a forward writes beside its results.
struct Buffers {
  float *lse, *norms, *partial, *from_summary;
  std::int32_t* first_rows;
  std::int64_t bytes;

  // blocks: of queries, of which the statistics keep a sum for each key.
  Buffers(const AttentionInputs& a, std::int64_t blocks, bool statistics, void* workspace) {
    triton::Workspace room(workspace);
    lse = room.take<float>(a.heads, a.tokens_q);
    norms = room.take<float>(a.heads, a.tokens_q);
    partial = statistics ? room.take<float>(blocks, a.tokens_q) : nullptr;
    from_summary = statistics ? room.take<float>(a.heads, a.tokens_q) : nullptr;
    first_rows = statistics ? room.take<std::int32_t>(a.batch) : nullptr;
    bytes = room.bytes();
  }
};

// The fewest queries that a block of the statistics has, whatever the device: it decides how large a
// workspace is.
constexpr std::int64_t kFewestQueries = 32;

class Forward {
 public:
  Forward(const AttentionInputs& a, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, void* stream)
      : a_(a),
        max_q_(max_seqlen_q),
        max_k_(max_seqlen_k),
        launcher_(triton::attention_kernels, stream),
        scale_(float(std::clamp(double(a.softmax_scale) * kLog2E, double(std::numeric_limits<float>::min()),
                                double(std::numeric_limits<float>::max())))),
        masked_(a.window_left >= 0 || a.window_right >= 0),
        left_(a.window_left < 0 ? max_k_ : std::min(a.window_left, max_k_)),
        right_(a.window_right < 0 ? max_q_ : std::min(a.window_right, max_q_)) {}

  Status run(void* out, float* lse, float* summary_attention, float* received_attention, void* workspace) {
    const bool statistics = summary_attention != nullptr;
    const Buffers buffers(a_, quotient_up(max_q_, kFewestQueries), statistics, workspace);
    if (lse == nullptr) lse = buffers.lse;
    if (a_.tokens_q == 0 || a_.heads == 0) return Status::ok;
    if (max_q_ == 0 || a_.batch == 0) {
      launcher_.fill(out, 0, a_.tokens_q * a_.heads * a_.head_dim * std::int64_t(size_of(a_.dtype)));
      launcher_.fill(lse, 0, a_.tokens_q * a_.heads * 4);
      if (statistics) {
        launcher_.fill(summary_attention, 0, a_.tokens_q * 4);
        launcher_.fill(received_attention, 0, a_.tokens_q * 4);
      }
      return launcher_.status();
    }
    if (a_.softcap > 0 || a_.alibi_slopes != nullptr) return Status::unsupported;
    // All of them first, so that a library without one of them writes nothing.
    const triton::Kernel* const attention = launcher_.find(name("attention_kernel"));
    const triton::Kernel *maximum = nullptr, *from_summary = nullptr, *finish = nullptr;
    if (statistics) {
      maximum = launcher_.find(name("head_maximum_kernel"));
      from_summary = launcher_.find(name("from_summary_kernel"));
      if (maximum != nullptr)
        finish = launcher_.find("finish_kernel/" + std::to_string((*maximum)["BLOCK_M"]) + mask());
    }
    if (launcher_.status() != Status::ok) return launcher_.status();

    const std::int64_t group = a_.heads / a_.key_heads;
    const std::int64_t blocks = quotient_up(max_q_, (*attention)["BLOCK_M"]);
    const auto forward = [&](const auto&... bounds) {
      launcher_.launch(attention, product_of({blocks, a_.heads, a_.batch}), a_.q, a_.k, a_.v, a_.cu_seqlens_q,
                       a_.cu_seqlens_k, out, lse, buffers.norms, a_.q_strides[0], a_.q_strides[1],
                       a_.k_strides[0], a_.k_strides[1], a_.v_strides[0], a_.v_strides[1], scale_, bounds...,
                       a_.tokens_q, a_.tokens_k, a_.heads, a_.batch, max_q_, max_k_, group);
    };
    bounded(forward);
    if (!statistics) return launcher_.status();

    const std::int32_t* summary_index = a_.summary_index;
    if (summary_index == nullptr) {
      launcher_.fill(buffers.first_rows, 0, a_.batch * 4);
      summary_index = buffers.first_rows;
    }
    const std::int64_t queries = quotient_up(max_q_, (*maximum)["BLOCK_M"]);
    const std::int64_t keys = quotient_up(max_q_, (*maximum)["BLOCK_N"]);
    const auto head_maximum = [&](const auto&... bounds) {
      launcher_.launch(maximum, product_of({keys, queries, a_.batch}), a_.q, a_.k, lse, a_.cu_seqlens_q,
                       summary_index, buffers.partial, a_.q_strides[0], a_.q_strides[1], a_.k_strides[0],
                       a_.k_strides[1], scale_, bounds..., a_.tokens_q, a_.heads, max_q_, group);
    };
    bounded(head_maximum);
    const std::int64_t few_keys = quotient_up(max_q_, (*from_summary)["BLOCK"]);
    const auto of_summary = [&](const auto&... bounds) {
      launcher_.launch(from_summary, product_of({few_keys, a_.heads, a_.batch}), a_.q, a_.k, lse,
                       a_.cu_seqlens_q, summary_index, buffers.from_summary, a_.q_strides[0], a_.q_strides[1],
                       a_.k_strides[0], a_.k_strides[1], scale_, bounds..., a_.tokens_q, a_.heads, max_q_,
                       group);
    };
    bounded(of_summary);
    const auto finished = [&](const auto&... bounds) {
      launcher_.launch(finish, product_of({quotient_up(max_q_, (*finish)["BLOCK"]), a_.batch}),
                       buffers.partial, buffers.from_summary, buffers.norms, a_.cu_seqlens_q, summary_index,
                       summary_attention, received_attention, bounds..., a_.tokens_q, a_.heads, a_.batch,
                       max_q_);
    };
    bounded(finished);
    return launcher_.status();
  }

 private:
  std::string mask() const { return masked_ ? "/masked" : "/plain"; }

  std::string name(const char* kernel) const {
    return std::string(kernel) + "/" + triton::name_of(a_.dtype) + "/" + std::to_string(a_.head_dim) + mask();
  }

  // launch(the bounds of a window), or nothing where kernels have none.
  template <typename Launch>
  void bounded(const Launch& launch) {
    if (masked_) {
      launch(left_, right_);
    } else {
      launch();
    }
  }

  const AttentionInputs& a_;
  std::int64_t max_q_, max_k_;
  triton::Launcher launcher_;
  float scale_;
  bool masked_;
  std::int64_t left_, right_;
};

}  // namespace

Status varlen_attention(const AttentionInputs& inputs, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                        void* out, float* lse, float* summary_attention, float* received_attention,
                        void* workspace, void* stream) {
  const AttentionInputs a = resolved(inputs);
  const bool statistics = summary_attention != nullptr || received_attention != nullptr;
  if (!is_valid(a, max_seqlen_q, max_seqlen_k, statistics) ||
      !is_matrix(out, a.dtype, a.tokens_q, a.heads * a.head_dim) || !is_aligned(out) ||
      workspace == nullptr || !is_aligned(workspace))
    return Status::invalid_argument;
  if (statistics &&
      !(is_present(summary_attention, a.tokens_q) && is_present(received_attention, a.tokens_q)))
    return Status::invalid_argument;
  return Forward(a, max_seqlen_q, max_seqlen_k, stream)
      .run(out, lse, summary_attention, received_attention, workspace);
}

Status varlen_attention_workspace(const AttentionInputs& inputs, std::int64_t max_seqlen_q,
                                  std::int64_t max_seqlen_k, bool statistics, std::int64_t* bytes) {
  const AttentionInputs a = resolved(inputs);
  if (!is_valid(a, max_seqlen_q, max_seqlen_k, statistics) || bytes == nullptr)
    return Status::invalid_argument;
  *bytes = Buffers(a, quotient_up(max_seqlen_q, kFewestQueries), statistics, nullptr).bytes;
  return Status::ok;
}

}  // namespace madtp::cuda
