// The public entry points: they check their arguments, then choose a kernel for the current device.

#include "cuda/sparse24/kernels.h"
#include "cuda/sparse24/layout.cuh"
#include "madtp/sparse24.h"

namespace madtp::cuda {
namespace {

constexpr std::int64_t kMost = 1 << 27;  // so that what is counted within a tile fits 32 bits

bool weight_shape(std::int64_t features, std::int64_t channels, DType dtype) {
  return size_of(dtype) != 0 && features >= 0 && features % 8 == 0 && channels >= 0 && channels % 16 == 0 &&
         features <= kMost && channels <= kMost;
}

bool aligned(const void* data, int bytes = 16) {
  return reinterpret_cast<std::uintptr_t>(data) % unsigned(bytes) == 0;
}
// Something to point to, or nothing, on a boundary of 16 bytes.
bool present(const void* data, std::int64_t rows, std::int64_t columns) {
  return aligned(data) && (data != nullptr || rows == 0 || columns == 0);
}

bool matrix(const void* data, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
  return present(data, rows, columns) && stride % 8 == 0;
}

// A vector of float32 or `dtype`, or none.
bool affine(const void* data, DType data_dtype, DType dtype) {
  return data == nullptr || (aligned(data) && (data_dtype == DType::float32 || data_dtype == dtype));
}

bool valid(const Sparse24Linear& a) {
  return weight_shape(a.features, a.channels, a.weight_dtype) && a.weight_dtype == a.dtype && a.rows >= 0 &&
         a.rows <= kMost && matrix(a.x, a.x_stride, a.rows, a.channels) &&
         present(a.layout, a.features, a.channels) && affine(a.bias, a.bias_dtype, a.dtype) &&
         affine(a.scale, a.scale_dtype, a.dtype) && a.activation >= Activation::none &&
         a.activation <= Activation::relu &&
         (a.residual == nullptr || matrix(a.residual, a.residual_stride, a.rows, a.features)) &&
         aligned(a.total, 4);
}

bool valid(const Sparse24Dense& a) {
  const std::int64_t rows = a.transposed ? a.channels : a.features;
  const std::int64_t columns = a.transposed ? a.features : a.channels;
  return weight_shape(a.features, a.channels, a.dtype) && matrix(a.weight, a.weight_stride, rows, columns) &&
         (a.score == nullptr || matrix(a.score, a.score_stride, rows, columns));
}

// use(config) for every configuration that can run the inputs, those of the newest architecture first.
template <typename Use>
void configs(const Sparse24Linear& inputs, const Device& device, Use&& use) {
  configs_sm90(inputs, device, std::ref(use));  // a reference, for which std::function allocates nothing
  configs_sm80(inputs, device, std::ref(use));
}

bool is_same(const Sparse24Config& a, const Sparse24Config& b) {
  return a.architecture == b.architecture && a.tile_tokens == b.tile_tokens &&
         a.tile_features == b.tile_features && a.split_k == b.split_k && a.cluster == b.cluster;
}

// The configuration that a call runs. Status::invalid_argument where the one asked for cannot.
Status choose(const Sparse24Linear& inputs, const Device& device, const Sparse24Config* asked,
              Sparse24Config* config) {
  if (asked == nullptr) {
    *config = default_sm90(inputs, device);
    if (config->architecture == 0) *config = default_sm80(inputs, device);
    return Status::ok;
  }
  *config = *asked;
  bool can_run = false;
  configs(inputs, device, [&](const Sparse24Config& one) { can_run |= is_same(one, *asked); });
  return can_run ? Status::ok : Status::invalid_argument;
}

// What of a call does not depend on its output, and the device.
Status check(const Sparse24Linear& inputs, Device* device) {
  if (!valid(inputs)) return Status::invalid_argument;
  if (inputs.dtype == DType::float32) return Status::unsupported;
  return current_device(device);
}

}  // namespace

Status sparse24_prune(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                      void* stream) {
  if (!valid(dense) || !present(values, dense.features, dense.channels) ||
      !present(indices, dense.features, dense.channels) || has_nan == nullptr || !aligned(has_nan, 4))
    return Status::invalid_argument;
  Device device;
  const Status status = current_device(&device);
  return status != Status::ok ? status : prune_weight(dense, values, indices, has_nan, stream);
}

Status sparse24_layout_bytes(std::int64_t features, std::int64_t channels, DType weight_dtype,
                             std::int64_t* bytes) {
  if (!weight_shape(features, channels, weight_dtype) || bytes == nullptr) return Status::invalid_argument;
  if (weight_dtype == DType::float32) return Status::unsupported;
  *bytes = WeightLayout(features, channels).bytes();
  return Status::ok;
}

Status sparse24_pack(const Sparse24Weight& weight, void* layout, void* stream) {
  const std::int64_t features = weight.features, channels = weight.channels;
  if (!weight_shape(features, channels, weight.dtype) || !present(weight.values, features, channels) ||
      !present(weight.indices, features, channels) || !present(layout, features, channels))
    return Status::invalid_argument;
  if (weight.dtype == DType::float32) return Status::unsupported;
  Device device;
  const Status status = current_device(&device);
  if (status != Status::ok || features == 0 || channels == 0) return status;
  return pack_weight(weight, layout, stream);
}

Status sparse24_linear_configs(const Sparse24Linear& inputs, Sparse24Config* list, int capacity, int* count) {
  if (count == nullptr || capacity < 0 || (list == nullptr && capacity > 0)) return Status::invalid_argument;
  Device device;
  const Status status = check(inputs, &device);
  if (status != Status::ok) return status;
  *count = 0;
  configs(inputs, device, [&](const Sparse24Config& config) {
    if (*count < capacity) list[*count] = config;
    ++*count;
  });
  return Status::ok;
}

Status sparse24_linear_workspace(const Sparse24Linear& inputs, std::int64_t* bytes,
                                 const Sparse24Config* asked) {
  if (bytes == nullptr) return Status::invalid_argument;
  Device device;
  Sparse24Config config;
  Status status = check(inputs, &device);
  if (status == Status::ok) status = choose(inputs, device, asked, &config);
  if (status == Status::ok) *bytes = config.architecture == 90 ? workspace_sm90(inputs, config) : 0;
  return status;
}

Status sparse24_linear(const Sparse24Linear& inputs, void* out, std::int64_t out_stride, void* workspace,
                       std::int64_t workspace_bytes, void* stream, const Sparse24Config* asked) {
  if (!valid(inputs) || !matrix(out, out_stride, inputs.rows, inputs.features) || workspace_bytes < 0 ||
      !present(workspace, workspace_bytes, 1))
    return Status::invalid_argument;
  Device device;
  Sparse24Config config;
  Status status = check(inputs, &device);
  if (status == Status::ok) status = choose(inputs, device, asked, &config);
  if (status != Status::ok || inputs.rows == 0 || inputs.features == 0) return status;
  if (config.architecture == 80) return linear_sm80(inputs, out, out_stride, config, stream);
  if (workspace_bytes < workspace_sm90(inputs, config)) return Status::workspace_too_small;
  return linear_sm90(inputs, out, out_stride, config, device, workspace, stream);
}

}  // namespace madtp::cuda
