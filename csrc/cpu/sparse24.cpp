// The public entry points: they check their arguments, then run the kernels of the chosen instruction set.

#include "madtp/sparse24.h"

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace madtp::cpu {
namespace {

bool weight_shape(std::int64_t features, std::int64_t channels, DType dtype) {
  return size_of(dtype) != 0 && features >= 0 && features % 8 == 0 && channels >= 0 && channels % 16 == 0 &&
         features <= INT32_MAX && channels <= INT32_MAX;
}

bool ascending(const Sparse24Weight& weight) {
  constexpr unsigned valid = 1 << 4 | 1 << 8 | 1 << 12 | 1 << 9 | 1 << 13 | 1 << 14;  // i0 | i1 << 2, i0 < i1
  unsigned all = 1;
  for (std::int64_t i = 0; i < weight.features * weight.channels / 8; ++i)
    all &= valid >> (weight.indices[i] & 15) & valid >> (weight.indices[i] >> 4);
  return all != 0;
}

// A vector of float32 or `dtype`, or none.
bool affine(const void* data, DType data_dtype, DType dtype) {
  return data == nullptr || data_dtype == DType::float32 || data_dtype == dtype;
}

}  // namespace

Status sparse24_layout_bytes(std::int64_t features, std::int64_t channels, DType weight_dtype,
                             std::int64_t* bytes) {
  if (!weight_shape(features, channels, weight_dtype) || bytes == nullptr) return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_layout_bytes(features, channels, weight_dtype, bytes));
}

Status sparse24_pack(const Sparse24Weight& weight, void* layout, int threads) {
  const std::int64_t features = weight.features, channels = weight.channels;
  if (!weight_shape(features, channels, weight.dtype) || !is_present(weight.values, features, channels) ||
      !is_present(weight.indices, features, channels) || !is_present(layout, features, channels) ||
      threads < 1 || !ascending(weight))
    return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_pack(weight, layout, threads));
}

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, int threads) {
  const std::int64_t features = dense.features, channels = dense.channels;
  if (!weight_shape(features, channels, dense.dtype) || !is_present(dense.weight, features, channels) ||
      !is_present(values, features, channels) || !is_present(indices, features, channels) || threads < 1)
    return Status::invalid_argument;
  if (dense.transposed) return Status::unsupported;
  MADTP_DISPATCH(sparse24_prune(dense, values, indices, threads));
}

Status sparse24_linear(const Sparse24Linear& a, void* out, std::int64_t out_stride, int threads) {
  if (!weight_shape(a.features, a.channels, a.weight_dtype) || a.rows < 0 || a.rows > INT32_MAX ||
      !is_matrix(a.x, a.dtype, a.rows, a.channels) || !is_matrix(out, a.dtype, a.rows, a.features) ||
      !is_present(a.layout, a.features, a.channels) || threads < 1)
    return Status::invalid_argument;
  if ((a.weight_dtype != DType::float32 && a.weight_dtype != a.dtype) ||
      !affine(a.bias, a.bias_dtype, a.dtype) || !affine(a.scale, a.scale_dtype, a.dtype) ||
      a.activation < Activation::none || a.activation > Activation::relu)
    return Status::invalid_argument;
  MADTP_DISPATCH(sparse24_linear(a, out, out_stride, threads));
}

}  // namespace madtp::cpu
