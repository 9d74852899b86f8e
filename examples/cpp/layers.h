// SPDX-License-Identifier: Apache-2.0
#pragma once

// The parts of a pruned tower, each on the kernels of madtp. Rows are float32, contiguous, one after another.

#include <madtp/attention.h>
#include <madtp/quantized.h>
#include <madtp/sparse24.h>
#include <madtp/tokens.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.h"

namespace example {

using Floats = std::vector<float>;

inline void check(madtp::Status status, const std::string& what) {
  if (status != madtp::Status::ok) throw std::runtime_error(what + ": " + madtp::to_string(status));
}

// A Linear whose weight is 2:4, int8 or both, as a saved model has it: residual + activation(x W^T + bias).
class PackedLinear {
 public:
  PackedLinear(const Safetensors& file, const std::string& name, const std::string& scheme,
               std::int64_t out_features, std::int64_t in_features, int threads)
      : name_(name),
        integer_(scheme != "sparse24"),
        sparse_(scheme != "int8"),
        out_(out_features),
        in_(in_features) {
    if (scheme != "sparse24" && scheme != "int8" && scheme != "int8_24")
      throw std::runtime_error(name + ": has the unknown scheme " + scheme);
    bias_ = file.read<float>(name + ".bias", {out_});
    const std::int64_t kept = sparse_ ? in_ / 2 : in_;
    std::vector<std::uint8_t> indices;
    if (sparse_)
      indices = file.read<std::uint8_t>(name + (integer_ ? ".weight_indices" : ".indices"), {out_, in_ / 8});
    std::int64_t bytes = 0;
    if (integer_) {
      const auto values = file.read<std::int8_t>(name + ".weight", {out_, kept});
      weight_scale_ = file.read<float>(name + ".weight_scale", {out_});
      check(madtp::cpu::quantized_layout_bytes(out_, in_, sparse_, &bytes), name);
      layout_.resize(std::size_t(bytes));
      const std::uint8_t* where = sparse_ ? indices.data() : nullptr;
      check(madtp::cpu::quantized_pack({values.data(), where, out_, in_}, layout_.data(), threads), name);
    } else {
      const auto values = file.read<float>(name + ".weight", {out_, kept});
      check(madtp::cpu::sparse24_layout_bytes(out_, in_, madtp::DType::float32, &bytes), name);
      layout_.resize(std::size_t(bytes));
      check(madtp::cpu::sparse24_pack({madtp::DType::float32, values.data(), indices.data(), out_, in_},
                                      layout_.data(), threads),
            name);
    }
  }

  // x (tokens, in_features), residual (tokens, out_features) or null -> (tokens, out_features)
  Floats run(const Floats& x, madtp::Activation activation, const float* residual, int threads) const {
    const std::int64_t tokens = std::int64_t(x.size()) / in_;
    Floats y(std::size_t(tokens * out_));
    if (integer_) {
      madtp::QuantizedLinear a{};
      fill(&a, x, tokens, activation, residual);
      a.weight_scale = weight_scale_.data();
      a.sparse = sparse_;
      check(madtp::cpu::quantized_linear(a, y.data(), out_, threads), name_);
    } else {
      madtp::Sparse24Linear a{};
      fill(&a, x, tokens, activation, residual);
      check(madtp::cpu::sparse24_linear(a, y.data(), out_, threads), name_);
    }
    return y;
  }

 private:
  template <class Linear>
  void fill(Linear* a, const Floats& x, std::int64_t tokens, madtp::Activation activation,
            const float* residual) const {
    a->x = x.data(), a->x_stride = in_, a->tokens = tokens;
    a->layout = layout_.data(), a->out_features = out_, a->in_features = in_;
    a->bias = bias_.data(), a->activation = activation;
    a->residual = residual, a->residual_stride = out_;
  }

  std::string name_;
  bool integer_, sparse_;
  std::int64_t out_, in_;
  std::vector<char> layout_;
  Floats bias_, weight_scale_;
};

// A dense Linear, x W^T + bias. The library has no dense product in float32, but one is the sum of two 2:4
// ones: of every four columns the first two, and the last two.
class DenseLinear {
 public:
  // weight (out_features, in_features), bias (out_features,) or empty; rows are added up to a multiple of 8.
  DenseLinear(std::string name, const Floats& weight, Floats bias, std::int64_t out_features,
              std::int64_t in_features, int threads)
      : name_(std::move(name)), out_((out_features + 7) / 8 * 8), in_(in_features), bias_(std::move(bias)) {
    bias_.resize(std::size_t(out_), 0.0f);
    for (int half = 0; half < 2; ++half) {
      const std::vector<std::uint8_t> indices(std::size_t(out_ * in_ / 8), half == 0 ? 0x44 : 0xee);
      Floats values(std::size_t(out_ * in_ / 2), 0.0f);
      for (std::int64_t i = 0; i < out_features * in_ / 2; ++i)
        values[std::size_t(i)] = weight[std::size_t(i / 2 * 4 + 2 * half + i % 2)];
      std::int64_t bytes = 0;
      check(madtp::cpu::sparse24_layout_bytes(out_, in_, madtp::DType::float32, &bytes), name_);
      layouts_[half].resize(std::size_t(bytes));
      check(madtp::cpu::sparse24_pack({madtp::DType::float32, values.data(), indices.data(), out_, in_},
                                      layouts_[half].data(), threads),
            name_);
    }
  }

  std::int64_t out_features() const { return out_; }  // with the rows that were added

  Floats run(const Floats& x, int threads) const {
    const std::int64_t tokens = std::int64_t(x.size()) / in_;
    Floats first(std::size_t(tokens * out_)), y(first.size());
    madtp::Sparse24Linear a{};
    a.x = x.data(), a.x_stride = in_, a.tokens = tokens;
    a.layout = layouts_[0].data(), a.out_features = out_, a.in_features = in_;
    a.bias = bias_.data();
    check(madtp::cpu::sparse24_linear(a, first.data(), out_, threads), name_);
    a.layout = layouts_[1].data(), a.bias = nullptr;
    a.residual = first.data(), a.residual_stride = out_;
    check(madtp::cpu::sparse24_linear(a, y.data(), out_, threads), name_);
    return y;
  }

 private:
  std::string name_;
  std::int64_t out_, in_;
  std::vector<char> layouts_[2];
  Floats bias_;
};

// Sequences one after another, and which of their tokens are left.
struct Batch {
  Floats x;                              // (tokens, channels)
  std::vector<std::int32_t> cu_seqlens;  // (batch + 1,)

  std::int64_t tokens() const { return cu_seqlens.back(); }
  std::int64_t size() const { return std::int64_t(cu_seqlens.size()) - 1; }
};

// A selection of tokens with the memory that it points to.
struct Selected {
  std::vector<std::uint8_t> keep;
  std::vector<std::int32_t> cu_seqlens, source;
  Floats merge_weight;

  explicit Selected(const Batch& batch)
      : keep(std::size_t(batch.tokens()), 1),
        cu_seqlens(batch.cu_seqlens),
        source(keep.size()),
        merge_weight(keep.size(), 0.0f) {
    std::iota(source.begin(), source.end(), 0);  // all tokens, until select_tokens writes here
  }

  madtp::SelectionOutputs outputs() {
    return {keep.data(), cu_seqlens.data(), source.data(), merge_weight.data()};
  }

  madtp::TokenSelection selection(const Batch& batch) const {
    return {keep.data(),         batch.cu_seqlens.data(), cu_seqlens.data(), source.data(),
            merge_weight.data(), batch.tokens(),          cu_seqlens.back(), batch.size()};
  }
};

struct LayerNorm {
  Floats weight, bias;
  double eps;

  // The tokens that are left of x, which replace those of the batch, and their norms.
  Floats prune(Batch* batch, const Floats& x, const Selected& selected, int threads) const {
    const std::int64_t channels = std::int64_t(weight.size()), left = selected.cu_seqlens.back();
    Floats gathered(std::size_t(left * channels)), normed(gathered.size());
    Floats mean(std::size_t(left), 0.0f), rstd(mean);
    check(madtp::cpu::gather_merge_layernorm(x.data(), madtp::DType::float32, channels, channels,
                                             selected.selection(*batch), weight.data(), bias.data(),
                                             madtp::DType::float32, eps, gathered.data(), normed.data(),
                                             mean.data(), rstd.data(), threads),
          "LayerNorm");
    *batch = {std::move(gathered), selected.cu_seqlens};
    return normed;
  }

  Floats run(const Batch& batch, int threads) const {
    Batch all{{}, batch.cu_seqlens};
    return prune(&all, batch.x, Selected(batch), threads);
  }
};

struct Attention {
  Floats out;                // (tokens, channels)
  Floats summary, received;  // (tokens,), the statistics; empty without
};

// qkv (tokens, 3 * channels): queries, keys and values side by side.
inline Attention attend(const Batch& batch, const Floats& qkv, std::int64_t channels, std::int64_t heads,
                        bool statistics, int threads) {
  const std::int64_t tokens = batch.tokens(), head_dim = channels / heads;
  madtp::AttentionInputs a{};
  a.dtype = madtp::DType::float32;
  a.q = qkv.data(), a.k = qkv.data() + channels, a.v = qkv.data() + 2 * channels;
  for (std::int64_t* strides : {a.q_strides, a.k_strides, a.v_strides})
    strides[0] = 3 * channels, strides[1] = head_dim;
  a.cu_seqlens_q = a.cu_seqlens_k = batch.cu_seqlens.data();
  a.tokens_q = a.tokens_k = tokens;
  a.batch = batch.size(), a.heads = heads, a.head_dim = head_dim;
  a.softmax_scale = float(std::pow(double(head_dim), -0.5));
  Attention to;
  to.out.resize(std::size_t(tokens * channels));
  if (statistics) {
    to.summary.resize(std::size_t(tokens));
    to.received.resize(std::size_t(tokens));
  }
  std::int64_t bytes = 0;
  check(madtp::cpu::varlen_attention_workspace(a, statistics, threads, &bytes), "attention");
  std::vector<char> workspace(std::size_t(bytes) + 1);
  check(madtp::cpu::varlen_attention(a, to.out.data(), nullptr, statistics ? to.summary.data() : nullptr,
                                     statistics ? to.received.data() : nullptr, workspace.data(), threads),
        "attention");
  return to;
}

}  // namespace example
