// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then choose a kernel and its configuration for
// the current device.

#include "cuda/sparse24/checks.h"
#include "cuda/sparse24/choose.h"
#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"
#include "madtp/sparse24.h"
#include "sizes.h"

namespace madtp::cuda {
namespace {

bool is_valid(const Sparse24Linear& a) {
  return is_weight_shape(a.out_features, a.in_features, a.weight_dtype) && a.weight_dtype == a.dtype &&
         a.tokens >= 0 && a.tokens <= kMaxSize && is_matrix(a.x, a.x_stride, a.tokens, a.in_features) &&
         is_present(a.layout, a.out_features, a.in_features) && is_epilogue(a);
}

bool is_valid(const Sparse24Dense& a) {
  const std::int64_t rows = a.transposed ? a.in_features : a.out_features;
  const std::int64_t columns = a.transposed ? a.out_features : a.in_features;
  return is_weight_shape(a.out_features, a.in_features, a.dtype) &&
         is_matrix(a.weight, a.weight_stride, rows, columns) &&
         (a.score == nullptr || is_matrix(a.score, a.score_stride, rows, columns));
}

// What of a call does not depend on its output, and the device.
Status check(const Sparse24Linear& inputs, Device* device) {
  if (!is_valid(inputs)) return Status::invalid_argument;
  if (inputs.dtype == DType::float32) return Status::unsupported;
  return current_device(device);
}

}  // namespace

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                      void* stream) {
  if (!is_valid(dense) || !is_present(values, dense.out_features, dense.in_features) ||
      !is_present(indices, dense.out_features, dense.in_features) || has_nan == nullptr ||
      !is_aligned(has_nan, 4))
    return Status::invalid_argument;
  Device device;
  const Status status = current_device(&device);
  return status != Status::ok ? status : prune_weight(dense, values, indices, has_nan, stream);
}

Status sparse24_layout_bytes(std::int64_t out_features, std::int64_t in_features, DType weight_dtype,
                             std::int64_t* bytes) {
  if (!is_weight_shape(out_features, in_features, weight_dtype) || bytes == nullptr)
    return Status::invalid_argument;
  if (weight_dtype == DType::float32) return Status::unsupported;
  *bytes = WeightLayout<2>(out_features, in_features).bytes();
  return Status::ok;
}

Status sparse24_pack(const Sparse24Weight& weight, void* layout, void* stream) {
  const std::int64_t out_features = weight.out_features, in_features = weight.in_features;
  if (!is_weight_shape(out_features, in_features, weight.dtype) ||
      !is_present(weight.values, out_features, in_features) ||
      !is_present(weight.indices, out_features, in_features) ||
      !is_present(layout, out_features, in_features))
    return Status::invalid_argument;
  if (weight.dtype == DType::float32) return Status::unsupported;
  Device device;
  const Status status = current_device(&device);
  if (status != Status::ok || out_features == 0 || in_features == 0) return status;
  return pack_weight(weight, 2, layout, stream);
}

Status sparse24_linear_configs(const Sparse24Linear& inputs, Sparse24Config* list, int capacity, int* count) {
  if (count == nullptr || capacity < 0 || (list == nullptr && capacity > 0)) return Status::invalid_argument;
  Device device;
  const Status status = check(inputs, &device);
  if (status != Status::ok) return status;
  list_configs(kLinearArchitectures, {inputs}, device, list, capacity, count);
  return Status::ok;
}

Status sparse24_linear(const Sparse24Linear& inputs, void* out, std::int64_t out_stride, void* stream,
                       const Sparse24Config* asked) {
  if (!is_valid(inputs) || !is_output(out, out_stride, inputs.tokens, inputs.out_features))
    return Status::invalid_argument;
  Device device;
  Choice choice;
  Status status = check(inputs, &device);
  if (status == Status::ok) status = choose(kLinearArchitectures, {inputs}, device, asked, &choice);
  if (status != Status::ok || inputs.tokens == 0 || inputs.out_features == 0) return status;
  return choice.architecture->run({inputs}, out, out_stride, choice.config, device, stream);
}

}  // namespace madtp::cuda
