/* SPDX-License-Identifier: Apache-2.0 */
/* What main.cpp does, through the C ABI. */
#include <madtp/c_api.h>
#include <stdio.h>

int main(void) {
  const float x[4][2] = {{1, 2}, {3, 4}, {5, 6}, {7, 8}};
  const uint8_t keep[4] = {1, 0, 1, 0};
  const float merge_weight[4] = {0, 0.25f, 0, 0.75f};
  const int32_t cu_seqlens[2] = {0, 4};
  const int32_t cu_seqlens_out[2] = {0, 3};
  const int32_t source[3] = {0, 2, -1}; /* two kept rows, then the merged row of sequence 0 */
  const madtp_token_selection selection = {
      .struct_size = sizeof selection,
      .keep = keep,
      .cu_seqlens_in = cu_seqlens,
      .cu_seqlens_out = cu_seqlens_out,
      .source = source,
      .merge_weight = merge_weight,
      .tokens = 4,
      .capacity = 3,
      .batch = 1,
  };

  float out[3][2] = {{0}};
  const madtp_status status =
      madtp_cpu_gather_merge(x, MADTP_DTYPE_FLOAT32, 2, 2, &selection, out, /*threads=*/1);
  printf("madtp %s, CUDA %d: %s, merged row (%g, %g)\n", madtp_version(), madtp_has_cuda(),
         madtp_status_string(status), out[2][0], out[2][1]);
  return status == MADTP_STATUS_OK && out[0][0] == 1 && out[1][1] == 6 && out[2][0] == 6 && out[2][1] == 7
             ? 0
             : 1;
}
