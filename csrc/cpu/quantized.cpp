// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernels of the chosen instruction set.

#include "madtp/quantized.h"

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/sparse24_checks.h"

namespace madtp::cpu {
namespace {

bool is_weight_shape(std::int64_t out_features, std::int64_t in_features, bool sparse) {
  return is_count(out_features) && is_count(in_features) && in_features <= kMaxQuantizedInFeatures &&
         (!sparse || sparse24_supports_shape(out_features, in_features)) &&
         is_addressable(out_features, in_features, in_features, sizeof(float));  // a layout takes less
}

}  // namespace

Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, bool sparse,
                              std::int64_t* bytes, bool many_rows) {
  if (!is_weight_shape(out_features, in_features, sparse) || bytes == nullptr)
    return Status::invalid_argument;
  MADTP_DISPATCH(quantized_layout_bytes(out_features, in_features, sparse, many_rows, bytes));
}

Status quantized_pack(const QuantizedWeight& weight, void* layout, int threads) {
  const std::int64_t out_features = weight.out_features, in_features = weight.in_features;
  const bool sparse = weight.indices != nullptr;
  if (!is_weight_shape(out_features, in_features, sparse) ||
      !is_present(weight.values, out_features, in_features) ||
      !is_present(layout, out_features, in_features) || threads < 1 ||
      (sparse && !is_ascending(weight.indices, out_features * in_features / 8)))
    return Status::invalid_argument;
  MADTP_DISPATCH(quantized_pack(weight, layout, threads));
}

Status quantized_linear(const QuantizedLinear& a, void* out, std::int64_t out_stride, int threads) {
  if (!is_weight_shape(a.out_features, a.in_features, a.sparse) || !is_count(a.tokens) ||
      !is_matrix(a.x, a.dtype, a.tokens, a.in_features, a.x_stride) ||
      !is_output(out, a.dtype, a.tokens, a.out_features, out_stride) ||
      (a.residual != nullptr &&
       !is_matrix(a.residual, a.dtype, a.tokens, a.out_features, a.residual_stride)) ||
      !is_present(a.layout, a.out_features, a.in_features) || !is_present(a.weight_scale, a.out_features) ||
      threads < 1 || !is_affine(a.bias, a.bias_dtype, a.dtype) ||
      !is_affine(a.scale, a.scale_dtype, a.dtype) || !is_activation(a.activation))
    return Status::invalid_argument;
  MADTP_DISPATCH(quantized_linear(a, out, out_stride, threads));
}

}  // namespace madtp::cpu
