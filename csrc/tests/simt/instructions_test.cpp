// SPDX-License-Identifier: Apache-2.0
// The instructions of the simulated machine against the tables of the PTX manual, written out here again.
// That hardware agrees with the machine is for tests/gpu/instructions_test.cpp to say, on the same operands.

#include <cstring>

#include "tests/gpu/operands.h"

using namespace madtp;
using namespace madtp::test;

namespace {

std::uint16_t half_of(std::uint32_t word, int half) {  // 0: low
  return std::uint16_t(word >> (16 * half));
}

void expect_sum(float got, Operand operand, Numbers numbers, const Bounded& expected) {
  EXPECT_NEAR(double(got), expected.sum,
              numbers == Numbers::integers || operand == Operand::int8 ? 0 : expected.tolerance(operand));
}

}  // namespace

TEST(ldmatrix_follows_the_fragment_table) {
  std::mt19937 generator(1);
  for (int round = 0; round < 5; ++round) {
    const LdmatrixOperands operands = draw_ldmatrix(generator);
    LdmatrixResult got;
    EXPECT(simulated_instructions().ldmatrix_x4(operands, &got) == Status::ok);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)  // matrix i: row lane / 4, its elements 2 t and 2 t + 1
        EXPECT(got.r[lane][i] == operands.shared[operands.rows[8 * i + lane / 4]][lane % 4]);
  }
}

// Lane 4 g + t has elements 2 t and 2 t + 1 of column g.
TEST(transposed_ldmatrix_follows_the_fragment_table) {
  std::mt19937 generator(7);
  for (int round = 0; round < 5; ++round) {
    const LdmatrixOperands operands = draw_ldmatrix(generator);
    LdmatrixResult got;
    EXPECT(simulated_instructions().ldmatrix_x4_trans(operands, &got) == Status::ok);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
          const int row = lane % 4 * 2 + half, column = lane / 4;
          const std::uint32_t pair = operands.shared[operands.rows[8 * i + row]][column / 2];
          EXPECT(half_of(got.r[lane][i], half) == half_of(pair, column % 2));
        }
  }
}

TEST(transposed_stmatrix_follows_the_fragment_table) {
  std::mt19937 generator(8);
  for (int round = 0; round < 5; ++round) {
    const StmatrixOperands operands = draw_stmatrix(generator);
    StmatrixResult got;
    EXPECT(simulated_instructions().stmatrix_x4_trans(operands, &got) == Status::ok);
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column)
          EXPECT(got.shared[operands.rows[8 * i + row]][column] ==
                 half_of(operands.r[4 * column + row / 2][i], row % 2));
  }
}

TEST(cp_async_fills_with_zeros) {
  std::mt19937 generator(2);
  for (int round = 0; round < 5; ++round) {
    const CopyOperands operands = draw_copies(generator);
    CopyResult got;
    EXPECT(simulated_instructions().cp_async_16(operands, &got) == Status::ok);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 16; ++i)
        EXPECT(got.shared[operands.to[lane]][i] == (i < operands.bytes[lane] ? operands.from[lane][i] : 0));
  }
}

TEST(mma_sp_follows_the_fragment_tables) {
  std::mt19937 generator(3);
  for (Operand operand : kOperands)
    for (Numbers numbers : {Numbers::integers, Numbers::normal})
      for (int selector = 0; selector < (has_selectors(operand) ? 2 : 1); ++selector) {
        const MmaCase now(operand, selector, numbers, generator);
        MmaResult got;
        EXPECT(simulated_instructions().mma_sp(operand, selector, now.operands, &got) == Status::ok);
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) expect_sum(got.d[lane][i], operand, numbers, now.expected(lane, i));
      }
}

TEST(e4m3_is_what_8_9_has) {
  const Capability ampere(80);
  std::mt19937 generator(9);
  const MmaCase now(Operand::e4m3, 0, Numbers::integers, generator);
  MmaResult d;
  EXPECT(simulated_instructions().mma_sp(Operand::e4m3, 0, now.operands, &d) == Status::unsupported);
}

TEST(wgmma_sp_follows_the_fragment_tables) {
  std::mt19937 generator(4);
  for (Operand operand : kOperands)
    for (Numbers numbers : {Numbers::integers, Numbers::normal})
      for (int n : {64, 128, 256})
        for (bool accumulate : {false, true}) {
          const WgmmaCase now(operand, n, accumulate, numbers, generator);
          WgmmaResult got;
          EXPECT(simulated_instructions().wgmma_sp(operand, n, accumulate, now.operands, &got) == Status::ok);
          for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < n / 2; ++i)
              expect_sum(got.d[thread][i], operand, numbers, now.expected(thread, i));
        }
}

TEST(boxes_are_swizzled_and_zero_outside) {
  std::mt19937 generator(5);
  const BoxOperands operands = draw_matrix(generator);
  for (int blocks : {1, 2})
    for (int column : kBoxColumnsAt)
      for (int row : kBoxRowsAt) {
        BoxResult got;
        EXPECT(simulated_instructions().tma_load_2d(blocks, column, row, operands, &got) == Status::ok);
        for (int block = 0; block < blocks; ++block)
          for (int box = 0; box < blocks; ++box)
            for (int r = 0; r < kBoxRows; ++r)
              for (int c = 0; c < kBoxColumns; ++c) {
                const int y = row + box * kBoxRows + r, x = column + c;
                const bool inside = y >= 0 && y < kMatrixRows && x >= 0 && x < kMatrixColumns;
                // 16-byte chunk c / 8 lies where chunk c / 8 ^ r would
                EXPECT(got.shared[block][box][r][(c / 8 ^ r) * 8 + c % 8] == (inside ? operands.x[y][x] : 0));
              }
      }
}

TEST(instructions_that_a_device_lacks_are_refused) {
  const Capability ampere(80);
  BoxResult box;
  std::mt19937 generator(6);
  EXPECT(simulated_instructions().tma_load_2d(1, 0, 0, draw_matrix(generator), &box) == Status::unsupported);
  StmatrixResult stored;
  EXPECT(simulated_instructions().stmatrix_x4_trans(draw_stmatrix(generator), &stored) ==
         Status::unsupported);
  const WgmmaCase now(Operand::bfloat16, 64, true, Numbers::integers, generator);
  WgmmaResult d;
  EXPECT(simulated_instructions().wgmma_sp(Operand::bfloat16, 64, true, now.operands, &d) ==
         Status::unsupported);
}
