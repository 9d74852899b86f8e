// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then choose a kernel as those of sparse24_linear do.

#include "cuda/quantized/kernels.h"
#include "cuda/sparse24/checks.h"
#include "cuda/sparse24/choose.h"
#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"
#include "madtp/quantized.h"

namespace madtp::cuda {
namespace {

bool is_quantized_shape(std::int64_t out_features, std::int64_t in_features) {
  return sparse24_supports_shape(out_features, in_features) && out_features <= kMaxSize &&
         in_features <= kMaxQuantizedInFeatures;
}

bool is_valid(const QuantizedRows& a, std::int64_t tokens, std::int64_t in_features) {
  return (a.type == QuantizedType::int8 || a.type == QuantizedType::e4m3) &&
         is_output(a.values, a.stride, tokens, in_features) && a.stride % 16 == 0 &&
         is_present(a.scale, tokens, 1);
}

LinearCall call_of(const QuantizedLinear& a, const QuantizedRows& rows) {
  LinearCall call;
  static_cast<Sparse24Linear&>(call) = {a.dtype,       rows.values,  rows.stride,       a.tokens,
                                        a.layout,      a.dtype,      a.out_features,    a.in_features,
                                        a.bias,        a.bias_dtype, a.activation,      a.scale,
                                        a.scale_dtype, a.residual,   a.residual_stride, a.num_rows};
  call.x_scale = rows.scale;
  call.weight_scale = a.weight_scale;
  return call;
}

// What of a call does not depend on its output, and the device.
Status check(const QuantizedLinear& a, const QuantizedRows& rows, Device* device) {
  if (!is_quantized_shape(a.out_features, a.in_features) || size_of(a.dtype) == 0 || a.tokens < 0 ||
      a.tokens > kMaxSize || !is_valid(rows, a.tokens, a.in_features) ||
      !is_present(a.layout, a.out_features, a.in_features) ||
      !is_present(a.weight_scale, a.out_features, 1) || !is_epilogue(call_of(a, rows)))
    return Status::invalid_argument;
  if (!a.sparse) return Status::unsupported;
  return current_device(device);
}

LinearArchitectures& architectures_of(QuantizedType type) {
  return type == QuantizedType::int8 ? kInt8LinearArchitectures : kE4M3LinearArchitectures;
}

}  // namespace

Status quantize_rows(DType dtype, const void* x, std::int64_t x_stride, std::int64_t tokens,
                     std::int64_t in_features, const std::int32_t* num_rows, const QuantizedRows& rows,
                     void* stream) {
  if (size_of(dtype) == 0 || !is_quantized_shape(0, in_features) || tokens < 0 || tokens > kMaxSize ||
      !is_matrix(x, x_stride, tokens, in_features) || !is_valid(rows, tokens, in_features) ||
      !is_aligned(num_rows, 4))
    return Status::invalid_argument;
  Device device;
  const Status status = current_device(&device);
  if (status != Status::ok || tokens == 0) return status;
  return quantize(dtype, x, x_stride, tokens, in_features, num_rows, rows, stream);
}

Status quantized_layout_bytes(std::int64_t out_features, std::int64_t in_features, std::int64_t* bytes) {
  if (!is_quantized_shape(out_features, in_features) || bytes == nullptr) return Status::invalid_argument;
  *bytes = WeightLayout<1>(out_features, in_features).bytes();
  return Status::ok;
}

Status quantized_pack(const QuantizedWeight& weight, void* layout, void* stream) {
  const std::int64_t out_features = weight.out_features, in_features = weight.in_features;
  if (weight.indices == nullptr && out_features > 0 && in_features > 0) return Status::unsupported;
  if (!is_quantized_shape(out_features, in_features) ||
      !is_present(weight.values, out_features, in_features) ||
      !is_present(weight.indices, out_features, in_features) ||
      !is_present(layout, out_features, in_features))
    return Status::invalid_argument;
  Device device;
  const Status status = current_device(&device);
  if (status != Status::ok || out_features == 0 || in_features == 0) return status;
  const Sparse24Weight same{DType::float32, weight.values, weight.indices, out_features, in_features};
  return pack_weight(same, 1, layout, stream);
}

Status quantized_linear_configs(const QuantizedLinear& inputs, const QuantizedRows& rows,
                                Sparse24Config* list, int capacity, int* count) {
  if (count == nullptr || capacity < 0 || (list == nullptr && capacity > 0)) return Status::invalid_argument;
  Device device;
  const Status status = check(inputs, rows, &device);
  if (status != Status::ok) return status;
  list_configs(architectures_of(rows.type), call_of(inputs, rows), device, list, capacity, count);
  return Status::ok;
}

Status quantized_linear(const QuantizedLinear& inputs, const QuantizedRows& rows, void* out,
                        std::int64_t out_stride, void* stream, const Sparse24Config* asked) {
  if (!is_output(out, out_stride, inputs.tokens, inputs.out_features)) return Status::invalid_argument;
  Device device;
  Status status = check(inputs, rows, &device);
  if (status != Status::ok) return status;
  const LinearCall call = call_of(inputs, rows);
  Choice choice;
  status = choose(architectures_of(rows.type), call, device, asked, &choice);
  // Of e4m3 there may be no kernel for a device at all.
  if (status != Status::ok) return asked == nullptr ? Status::unsupported : status;
  if (inputs.tokens == 0 || inputs.out_features == 0) return Status::ok;
  return choice.architecture->run(call, out, out_stride, choice.config, device, stream);
}

}  // namespace madtp::cuda
