#pragma once

// The kernels behind madtp::cuda::sparse24_linear, one per architecture. Arguments are checked by then, and
// neither rows nor features are 0.

#include <cstdint>

#include "madtp/sparse24.h"

namespace madtp::cuda {

// What can be tuned. A kernel has some of these only, and says Status::invalid_argument to others.
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

Sparse24Config default_sm80(const Sparse24Linear& inputs, const Device& device);
Status linear_sm80(const Sparse24Linear& inputs, void* out, std::int64_t out_stride,
                   const Sparse24Config& config, void* workspace, void* stream);

}  // namespace madtp::cuda
