#pragma once

// What runs behind the entry points of madtp/sparse24.h, which have checked the arguments.

#include <cstdint>

#include "madtp/sparse24.h"

namespace madtp::cuda {

Status prune_weight(const Sparse24Dense& dense, void* values, std::uint8_t* indices, std::int32_t* has_nan,
                    void* stream);

Status pack_weight(const Sparse24Weight& weight, void* layout, void* stream);

// What can be tuned of a linear layer. A kernel has some of these only, and says Status::invalid_argument to
// others.
struct Sparse24Config {
  int tile_tokens, tile_features;  // of a block
  int split_k = 1;                 // blocks that share the channels of a tile
  int cluster = 1;                 // blocks that share the tokens of a tile
};

// What a default is chosen by.
struct Device {
  int capability;  // 80 for 8.0
  int multiprocessors;
  int block_shared_bytes;  // the most that a block may have
  int shared_bytes;        // of a multiprocessor
};

// One kernel per architecture, given some rows and features.
Sparse24Config default_sm80(const Sparse24Linear& inputs, const Device& device);
Status linear_sm80(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                   const Sparse24Config& config, void* workspace, void* stream);

Sparse24Config default_sm90(const Sparse24Linear& inputs, const Device& device);
std::int64_t workspace_sm90(const Sparse24Linear& inputs, const Sparse24Config& config);
Status linear_sm90(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                   const Sparse24Config& config, const Device& device, void* workspace, void* stream);

}  // namespace madtp::cuda
