// SPDX-License-Identifier: Apache-2.0
// ldmatrix.trans and stmatrix.trans, by the fragment table of the PTX manual: lane 4 g + t has elements 2 t
// and 2 t + 1 of column g.

#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"
#include "tests/simt/sparse24_cases.h"

using namespace madtp;
using namespace madtp::cuda;
using namespace madtp::test;

namespace {

constexpr int kMatrices = 4, kRows = 8, kColumns = 8;

// Lane 8 m + r names row r of matrix m; rows lie in shared memory in the order of their numbers, times 5.
int place(int matrix, int row) { return (matrix * kRows + row) * 5 % (kMatrices * kRows); }

void turns_over(const std::uint16_t* in, std::uint16_t* out, std::uint32_t* fragments) {
  MADTP_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x);
  std::memcpy(shared + lane * 16, in + lane * kColumns, 16);
  __syncwarp();
  const std::uint32_t from = ptx::shared_address(shared) + std::uint32_t(place(lane / 8, lane % 8) * 16);
  std::uint32_t words[4];
  ptx::ldmatrix_x4_trans(words, from);
  std::memcpy(fragments + lane * 4, words, sizeof words);
  ptx::stmatrix_x4_trans(from + kMatrices * kRows * 16, words);
  __syncwarp();
  std::memcpy(out + lane * kColumns, shared + (kMatrices * kRows + lane) * 16, 16);
}

}  // namespace

TEST(matrices_are_turned_over_and_back) {
  std::vector<std::uint16_t> in(kMatrices * kRows * kColumns), out(in.size());
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = std::uint16_t(1000 + i);
  std::vector<std::uint32_t> fragments(32 * 4);
  EXPECT(launch(turns_over, LaunchShape{1, 32, 2 * kMatrices * kRows * 16}, nullptr, in.data(), out.data(),
                fragments.data()) == Status::ok);
  EXPECT(out == in);
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const int column = lane / 4, row = lane % 4 * 2;
      const auto at = [&](int r) {
        return std::uint32_t(in[std::size_t(place(matrix, r) * kColumns + column)]);
      };
      EXPECT(fragments[std::size_t(lane * 4 + matrix)] == (at(row) | at(row + 1) << 16));
    }
  }
}
