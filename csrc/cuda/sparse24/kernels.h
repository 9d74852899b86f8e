#pragma once

// What runs behind the entry points of madtp/sparse24.h, which have checked the arguments.

#include <cstdint>
#include <functional>

#include "cuda/device.h"
#include "madtp/sparse24.h"

namespace madtp::cuda {

Status prune_weight(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                    void* stream);

Status pack_weight(const Sparse24Weight& weight, void* layout, void* stream);

// One kernel per architecture, given some rows and features. configs: use(config) for each that can run the
// inputs on the device. default: of these, what runs unasked.
using UseConfig = std::function<void(const Sparse24Config&)>;

void configs_sm80(const Sparse24Linear& inputs, const Device& device, const UseConfig& use);
Sparse24Config default_sm80(const Sparse24Linear& inputs, const Device& device);
Status linear_sm80(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                   const Sparse24Config& config, void* stream);

void configs_sm90(const Sparse24Linear& inputs, const Device& device, const UseConfig& use);
Sparse24Config default_sm90(const Sparse24Linear& inputs, const Device& device);
std::int64_t workspace_sm90(const Sparse24Linear& inputs, const Sparse24Config& config);
Status linear_sm90(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                   const Sparse24Config& config, const Device& device, void* workspace, void* stream);

}  // namespace madtp::cuda
