// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then run the kernels of the chosen instruction set.

#include "madtp/sparse24.h"

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/sparse24_checks.h"

namespace madtp::cpu {
namespace {

bool is_weight_shape(std::int64_t out_features, std::int64_t in_features, DType dtype) {
  return size_of(dtype) != 0 && sparse24_supports_shape(out_features, in_features) &&
         is_count(out_features) && is_count(in_features) &&
         is_addressable(out_features, in_features, in_features, sizeof(float));  // a layout takes less
}

}  // namespace

Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes) {
  if (!is_weight_shape(out_features, in_features, weight_dtype) || bytes == nullptr)
    return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_layout_bytes(out_features, in_features, weight_dtype, bytes));
}

Status sparse24_pack(const Sparse24Weight& weight, void* layout, int threads) {
  const std::int64_t out_features = weight.out_features, in_features = weight.in_features;
  if (!is_weight_shape(out_features, in_features, weight.dtype) ||
      !is_present(weight.values, out_features, in_features) ||
      !is_present(weight.indices, out_features, in_features) ||
      !is_present(layout, out_features, in_features) || threads < 1 ||
      !is_ascending(weight.indices, out_features * in_features / 8))
    return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_pack(weight, layout, threads));
}

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, int threads) {
  const std::int64_t out_features = dense.out_features, in_features = dense.in_features;
  if (!is_weight_shape(out_features, in_features, dense.dtype) ||
      !is_matrix(dense.weight, dense.dtype, out_features, in_features, dense.weight_stride) ||
      (dense.score != nullptr &&
       !is_matrix(dense.score, DType::float32, out_features, in_features, dense.score_stride)) ||
      !is_present(values, out_features, in_features) || !is_present(indices, out_features, in_features) ||
      threads < 1)
    return Status::invalid_argument;
  if (dense.transposed) return Status::unsupported;
  MADTP_DISPATCH(sparse24_prune(dense, values, indices, threads));
}

Status sparse24_linear(const Sparse24Linear& a, void* out, std::int64_t out_stride, int threads) {
  if (!is_weight_shape(a.out_features, a.in_features, a.weight_dtype) || !is_count(a.tokens) ||
      !is_matrix(a.x, a.dtype, a.tokens, a.in_features, a.x_stride) ||
      !is_output(out, a.dtype, a.tokens, a.out_features, out_stride) ||
      (a.residual != nullptr &&
       !is_matrix(a.residual, a.dtype, a.tokens, a.out_features, a.residual_stride)) ||
      !is_present(a.layout, a.out_features, a.in_features) || threads < 1)
    return Status::invalid_argument;
  if ((a.weight_dtype != DType::float32 && a.weight_dtype != a.dtype) ||
      !is_affine(a.bias, a.bias_dtype, a.dtype) || !is_affine(a.scale, a.scale_dtype, a.dtype) ||
      !is_activation(a.activation))
    return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_linear(a, out, out_stride, threads));
}

}  // namespace madtp::cpu
