// SPDX-License-Identifier: Apache-2.0
// token_importance, select_tokens and score_and_select: the grids and buffers of
// madtp_kernels/triton/tokens/scores.py and layout.py.

#include "madtp/tokens.h"

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

constexpr double kLog2E = 1.4426950408889634;
constexpr std::int64_t kNarrow = 16, kWide = 32, kWidest = 128;  // alignment tokens of a block of logits
constexpr std::int64_t kMaxParts = 8;           // programs of a sequence that share its alignment tokens
constexpr std::int64_t kSharedLogits = 32768;   // of a sequence, from which on it is shared out
constexpr std::int64_t kSharedSequences = 128;  // from which on a program for each keeps a device busy

bool is_valid(const ScoreInputs& s) {
  return is_count(s.tokens) && is_count(s.batch) && s.cu_seqlens != nullptr &&
         is_matrix(s.mag_logits, s.logits_dtype, s.tokens, s.alignment_tokens, s.logits_stride) &&
         is_count(s.alignment_tokens) && s.alignment_tokens >= 1 && std::abs(s.logits_stride) <= INT32_MAX;
}

bool is_valid(const SelectionOutputs& s, std::int64_t tokens) {
  return is_present(s.keep, tokens) && s.cu_seqlens_out != nullptr && is_present(s.source, tokens) &&
         is_present(s.merge_weight, tokens);
}

bool is_workspace(const void* data) {
  return data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

bool is_temperature(double value) { return value >= 0 && std::isfinite(value); }

// How many programs share the alignment tokens of a sequence; 1: one does all of it. Lengths are on the
// device, so it is the mean that decides.
std::int64_t parts_of(const ScoreInputs& s) {
  const bool is_long = s.tokens * s.alignment_tokens >= kSharedLogits * s.batch;
  const std::int64_t blocks = s.alignment_tokens <= kNarrow ? 1 : quotient_up(s.alignment_tokens, kWide);
  return is_long && s.batch < kSharedSequences ? std::min(blocks, kMaxParts) : 1;
}

// log2(e) / tau, 0 where nothing is pruned. A tiny tau must not give 0 * inf, nor a huge one -inf * 0.
float scale_of(double temperature) {
  using Limits = std::numeric_limits<float>;
  if (temperature == 0) return 0;
  return float(std::clamp(kLog2E / temperature, double(Limits::min()), double(Limits::max())));
}

struct Buffers {
  float *guidance, *pruned_importance, *copies, *threshold;
  std::int32_t *count, *first_rows;
  std::uint8_t* unprotected;
  std::int64_t bytes;

  Buffers(const ScoreInputs& s, void* workspace) {
    const std::int64_t parts = parts_of(s);
    triton::Workspace room(workspace);
    guidance = room.take<float>(s.tokens);
    count = room.take<std::int32_t>(s.batch);
    pruned_importance = room.take<float>(s.batch);
    copies = room.take<float>(parts - 1, s.tokens);
    threshold = room.take<float>(s.batch, parts);
    first_rows = room.take<std::int32_t>(s.batch);
    unprotected = room.take<std::uint8_t>(s.tokens);
    bytes = room.bytes();
  }
};

class Scores {
 public:
  Scores(const ScoreInputs& s, void* workspace, void* stream)
      : s_(s),
        b_(s, workspace),
        launcher_(triton::tokens_kernels, stream),
        dtype_(triton::name_of(s.logits_dtype)),
        summary_index_(s.summary_index != nullptr ? s.summary_index : b_.first_rows),
        protected_(s.protected_rows != nullptr ? s.protected_rows : b_.unprotected) {}

  const triton::Kernel* importance_kernel() { return find("importance_kernel", block()); }
  const triton::Kernel* select_kernel() { return find("select_kernel", block()); }
  const triton::Kernel* layout_kernel() { return launcher_.find("layout_kernel"); }
  const triton::Kernel* keep_kernel() { return launcher_.find("keep_kernel"); }
  const triton::Kernel* threshold_kernel() { return find("threshold_kernel", kWide); }
  const triton::Kernel* guidance_kernel() {
    return find("guidance_kernel", s_.alignment_tokens <= 2 * kWide ? 2 * kWide : kWidest);
  }

  Status status() const { return launcher_.status(); }

  // What is not given is zeros: row 0 is the summary token, and no row protected.
  void begin() {
    if (s_.summary_index == nullptr) launcher_.fill(b_.first_rows, 0, s_.batch * 4);
    if (s_.protected_rows == nullptr) launcher_.fill(b_.unprotected, 0, s_.tokens);
  }

  void importance(const triton::Kernel* kernel, const float* summary_attention,
                  const float* received_attention, float* importance) {
    launcher_.launch(kernel, s_.batch, summary_attention, received_attention, s_.mag_logits, s_.cu_seqlens,
                     summary_index_, protected_, b_.guidance, importance, s_.tokens, s_.alignment_tokens,
                     s_.logits_stride);
  }

  void select(const triton::Kernel* kernel, const float* importance, float scale,
              const SelectionOutputs& to) {
    launcher_.launch(kernel, s_.batch, importance, s_.mag_logits, s_.cu_seqlens, summary_index_, protected_,
                     to.keep, b_.count, b_.pruned_importance, scale, s_.tokens, s_.alignment_tokens,
                     s_.logits_stride);
  }

  // Importance and selection, several programs to a sequence.
  void shared(const triton::Kernel* guidance, const triton::Kernel* threshold, const triton::Kernel* keep,
              const float* summary_attention, const float* received_attention, float scale, float* importance,
              const SelectionOutputs& to) {
    const std::int64_t parts = parts_of(s_);
    launcher_.launch(guidance, quotient_up(s_.tokens, (*guidance)["BLOCK_T"]), s_.mag_logits, b_.guidance,
                     s_.tokens, s_.alignment_tokens, s_.logits_stride);
    launcher_.launch(threshold, s_.batch * parts, summary_attention, received_attention, b_.guidance,
                     s_.mag_logits, s_.cu_seqlens, summary_index_, protected_, importance, b_.copies,
                     b_.threshold, scale, s_.tokens, s_.alignment_tokens, s_.logits_stride, parts);
    launcher_.launch(keep, s_.batch, importance, b_.threshold, s_.cu_seqlens, summary_index_, protected_,
                     to.keep, b_.count, b_.pruned_importance, scale, s_.tokens, parts);
  }

  void layout(const triton::Kernel* kernel, const float* importance, const SelectionOutputs& to) {
    launcher_.launch(kernel, std::max<std::int64_t>(s_.batch, 1), importance, to.keep, s_.cu_seqlens,
                     b_.count, b_.pruned_importance, to.cu_seqlens_out, to.source, to.merge_weight, s_.tokens,
                     s_.batch);
  }

 private:
  std::int64_t block() const { return s_.alignment_tokens <= kNarrow ? kNarrow : kWide; }
  const triton::Kernel* find(const char* kernel, std::int64_t columns) {
    return launcher_.find(std::string(kernel) + "/" + dtype_ + "/" + std::to_string(columns));
  }

  const ScoreInputs& s_;
  const Buffers b_;
  triton::Launcher launcher_;
  const std::string dtype_;
  const std::int32_t* summary_index_;
  const std::uint8_t* protected_;
};

}  // namespace

Status score_workspace(const ScoreInputs& inputs, std::int64_t* bytes) {
  if (!is_valid(inputs) || bytes == nullptr) return Status::invalid_argument;
  *bytes = Buffers(inputs, nullptr).bytes;
  return Status::ok;
}

Status token_importance(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, float* importance, void* workspace, void* stream) {
  if (!is_valid(inputs) || !is_present(summary_attention, inputs.tokens) ||
      !is_present(received_attention, inputs.tokens) || !is_present(importance, inputs.tokens) ||
      !is_workspace(workspace))
    return Status::invalid_argument;
  if (inputs.batch == 0) return Status::ok;
  Scores scores(inputs, workspace, stream);
  const triton::Kernel* const kernel = scores.importance_kernel();
  if (kernel == nullptr) return scores.status();
  scores.begin();
  scores.importance(kernel, summary_attention, received_attention, importance);
  return scores.status();
}

Status select_tokens(const float* importance, const ScoreInputs& inputs, double temperature,
                     const SelectionOutputs& selection, void* workspace, void* stream) {
  if (!is_valid(inputs) || !is_temperature(temperature) || !is_valid(selection, inputs.tokens) ||
      !is_present(importance, inputs.tokens) || !is_workspace(workspace))
    return Status::invalid_argument;
  Scores scores(inputs, workspace, stream);
  const triton::Kernel *const select = scores.select_kernel(), *const layout = scores.layout_kernel();
  if (scores.status() != Status::ok) return scores.status();
  if (inputs.batch > 0) {
    scores.begin();
    scores.select(select, importance, scale_of(temperature), selection);
  }
  scores.layout(layout, importance, selection);
  return scores.status();
}

Status score_and_select(const float* summary_attention, const float* received_attention,
                        const ScoreInputs& inputs, double temperature, float* importance,
                        const SelectionOutputs& selection, void* workspace, void* stream) {
  if (!is_valid(inputs) || !is_temperature(temperature) || !is_valid(selection, inputs.tokens) ||
      !is_present(summary_attention, inputs.tokens) || !is_present(received_attention, inputs.tokens) ||
      !is_present(importance, inputs.tokens) || !is_workspace(workspace))
    return Status::invalid_argument;
  Scores scores(inputs, workspace, stream);
  const float scale = scale_of(temperature);
  const triton::Kernel* const layout = scores.layout_kernel();
  if (inputs.batch > 0 && parts_of(inputs) > 1) {
    const triton::Kernel *const guidance = scores.guidance_kernel(),
                                *const threshold = scores.threshold_kernel(),
                                *const keep = scores.keep_kernel();
    if (scores.status() != Status::ok) return scores.status();
    scores.begin();
    scores.shared(guidance, threshold, keep, summary_attention, received_attention, scale, importance,
                  selection);
  } else if (inputs.batch > 0) {
    const triton::Kernel *const importances = scores.importance_kernel(), *const select =
                                                                              scores.select_kernel();
    if (scores.status() != Status::ok) return scores.status();
    scores.begin();
    scores.importance(importances, summary_attention, received_attention, importance);
    scores.select(select, importance, scale, selection);
  }
  if (layout != nullptr) scores.layout(layout, importance, selection);
  return scores.status();
}

}  // namespace madtp::cuda
