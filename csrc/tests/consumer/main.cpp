// SPDX-License-Identifier: Apache-2.0
// Prunes two of four tokens, merges them, and checks the numbers.
#include <madtp/tokens.h>
#include <madtp/version.h>

#include <cstdint>
#include <cstdio>

int main() {
  const float x[4][2] = {{1, 2}, {3, 4}, {5, 6}, {7, 8}};
  const std::uint8_t keep[4] = {1, 0, 1, 0};
  const float merge_weight[4] = {0, 0.25f, 0, 0.75f};
  const std::int32_t cu_seqlens[2] = {0, 4};
  const std::int32_t cu_seqlens_out[2] = {0, 3};
  const std::int32_t source[3] = {0, 2, -1};  // two kept rows, then the merged row of sequence 0
  const madtp::TokenSelection selection{keep, cu_seqlens, cu_seqlens_out, source, merge_weight, 4, 3, 1};

  float out[3][2] = {};
  const madtp::Status status =
      madtp::cpu::gather_merge(x, madtp::DType::float32, 2, 2, selection, out, /*threads=*/1);
  std::printf("madtp %s, CUDA %d: %s, merged row (%g, %g)\n", MADTP_VERSION, MADTP_HAS_CUDA,
              madtp::to_string(status), out[2][0], out[2][1]);
  const bool right = out[0][0] == 1 && out[1][1] == 6 && out[2][0] == 6 && out[2][1] == 7;
  return status == madtp::Status::ok && right ? 0 : 1;
}
