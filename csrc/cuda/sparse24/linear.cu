// SPDX-License-Identifier: Apache-2.0
// The public entry points: they check their arguments, then choose a kernel and its configuration for
// the current device.

#include "cuda/sparse24/architectures.h"
#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"
#include "madtp/sparse24.h"
#include "sizes.h"

namespace madtp::cuda {
namespace {

constexpr std::int64_t kMaxSize = 1 << 27;  // so that what is counted within a tile fits 32 bits

bool is_weight_shape(std::int64_t out_features, std::int64_t in_features, DType dtype) {
  return size_of(dtype) != 0 && sparse24_supports_shape(out_features, in_features) &&
         out_features <= kMaxSize && in_features <= kMaxSize;
}

bool is_aligned(const void* data, int bytes = 16) {
  return reinterpret_cast<std::uintptr_t>(data) % unsigned(bytes) == 0;
}

// Data on a boundary of 16 bytes, or none where there is nothing to point to.
bool is_present(const void* data, std::int64_t rows, std::int64_t columns) {
  return is_aligned(data) && (data != nullptr || rows == 0 || columns == 0);
}

bool is_matrix(const void* data, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  return is_present(data, rows, columns) && stride % 8 == 0 &&
         is_addressable(rows, columns, stride, sizeof(float));  // the widest element
}

// A vector of float32 or `dtype`, or none.
bool is_affine(const void* data, DType data_dtype, DType dtype) {
  return data == nullptr || (is_aligned(data) && (data_dtype == DType::float32 || data_dtype == dtype));
}

bool is_valid(const Sparse24Linear& a) {
  return is_weight_shape(a.out_features, a.in_features, a.weight_dtype) && a.weight_dtype == a.dtype &&
         a.tokens >= 0 && a.tokens <= kMaxSize && is_matrix(a.x, a.x_stride, a.tokens, a.in_features) &&
         is_present(a.layout, a.out_features, a.in_features) && is_affine(a.bias, a.bias_dtype, a.dtype) &&
         is_affine(a.scale, a.scale_dtype, a.dtype) && a.activation >= Activation::none &&
         a.activation <= Activation::relu &&
         (a.residual == nullptr || is_matrix(a.residual, a.residual_stride, a.tokens, a.out_features)) &&
         is_aligned(a.num_rows, 4);
}

bool is_valid(const Sparse24Dense& a) {
  const std::int64_t rows = a.transposed ? a.in_features : a.out_features;
  const std::int64_t columns = a.transposed ? a.out_features : a.in_features;
  return is_weight_shape(a.out_features, a.in_features, a.dtype) &&
         is_matrix(a.weight, a.weight_stride, rows, columns) &&
         (a.score == nullptr || is_matrix(a.score, a.score_stride, rows, columns));
}

// use(config) for every configuration that can run the inputs, those of the newest architecture first.
template <typename Use>
void for_each_config(const Sparse24Linear& inputs, const Device& device, Use&& use) {
  for (const LinearArchitecture* one : kLinearArchitectures)
    one->configs(inputs, device, std::ref(use));  // a reference, for which std::function allocates nothing
}

bool is_same(const Sparse24Config& a, const Sparse24Config& b) {
  return a.architecture == b.architecture && a.tile_tokens == b.tile_tokens &&
         a.tile_out_features == b.tile_out_features && a.cluster == b.cluster;
}

// What a call runs.
struct Choice {
  const LinearArchitecture* architecture = nullptr;
  Sparse24Config config{};
};

// Status::invalid_argument where the configuration asked for cannot run.
Status choose(const Sparse24Linear& inputs, const Device& device, const Sparse24Config* asked,
              Choice* choice) {
  for (const LinearArchitecture* one : kLinearArchitectures) {
    if (asked == nullptr) {
      choice->config = one->default_config(inputs, device);
      if (choice->config.architecture == 0) continue;
    } else {
      if (one->architecture != asked->architecture) continue;
      bool can_run = false;
      const UseConfig find = [&](const Sparse24Config& config) { can_run |= is_same(config, *asked); };
      one->configs(inputs, device, std::ref(find));
      if (!can_run) continue;
      choice->config = *asked;
    }
    choice->architecture = one;
    return Status::ok;
  }
  return Status::invalid_argument;
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
  *bytes = WeightLayout(out_features, in_features).bytes();
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
  return pack_weight(weight, layout, stream);
}

Status sparse24_linear_configs(const Sparse24Linear& inputs, Sparse24Config* list, int capacity, int* count) {
  if (count == nullptr || capacity < 0 || (list == nullptr && capacity > 0)) return Status::invalid_argument;
  Device device;
  const Status status = check(inputs, &device);
  if (status != Status::ok) return status;
  *count = 0;
  for_each_config(inputs, device, [&](const Sparse24Config& config) {
    if (*count < capacity) list[*count] = config;
    ++*count;
  });
  return Status::ok;
}

Status sparse24_linear(const Sparse24Linear& inputs, void* out, std::int64_t out_stride, void* stream,
                       const Sparse24Config* asked) {
  if (!is_valid(inputs) || !is_matrix(out, out_stride, inputs.tokens, inputs.out_features))
    return Status::invalid_argument;
  Device device;
  Choice choice;
  Status status = check(inputs, &device);
  if (status == Status::ok) status = choose(inputs, device, asked, &choice);
  if (status != Status::ok || inputs.tokens == 0 || inputs.out_features == 0) return status;
  return choice.architecture->run(inputs, out, out_stride, choice.config, device, stream);
}

}  // namespace madtp::cuda
