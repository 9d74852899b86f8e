// SPDX-License-Identifier: Apache-2.0
// Every instruction that the simulated machine models, on a GPU and on that machine: the same operands, the
// same result. Copies and integers agree to the last bit; of other numbers either sum is within the rounding
// of float32 of the true one, since a tensor core adds in an order of its own.
//
// With the name of a test only that one runs: an instruction that traps ends what its process has on the GPU.

#include <cstring>

#include "tests/gpu/operands.h"

using namespace madtp;
using namespace madtp::test;

namespace {

constexpr int kRounds = 20;

// The same call on both.
template <typename Result, typename Call>
void run(Result* gpu, Result* simulated, Call&& call) {
  EXPECT(call(gpu_instructions(), gpu) == Status::ok);
  EXPECT(call(simulated_instructions(), simulated) == Status::ok);
}

template <typename Result, typename Call>
void expect_same_bits(Call&& call) {
  Result gpu{}, simulated{};
  run(&gpu, &simulated, call);
  constexpr std::size_t kWords = sizeof(Result) / sizeof(std::uint32_t);
  std::uint32_t words[2][kWords];
  std::memcpy(words[0], &gpu, sizeof(Result));
  std::memcpy(words[1], &simulated, sizeof(Result));
  for (std::size_t i = 0; i < kWords; ++i)
    if (words[0][i] != words[1][i] && add_failure())
      std::printf("word %zu: %08x on the GPU, %08x simulated\n", i, words[0][i], words[1][i]);
}

// What only sm_90a has cannot be compared elsewhere.
bool has_sm90a() {
  std::mt19937 generator(0);
  BoxResult result;
  if (gpu_instructions().tma_load_2d(1, 0, 0, draw_matrix(generator), &result) != Status::unsupported)
    return true;
  std::printf("not compared: the device is not sm_90a, or the library has no code for that\n");
  return false;
}

void expect_same_sum(int thread, int i, float gpu, float simulated, Operand operand, Numbers numbers,
                     const Bounded& expected) {
  const auto is_near = [&](float sum) {
    return std::abs(double(sum) - expected.sum) <= expected.tolerance(operand);
  };
  const bool is_same = numbers == Numbers::integers || operand == Operand::int8
                           ? gpu == simulated
                           : is_near(gpu) && is_near(simulated);
  if (!is_same && add_failure())
    std::printf("thread %d, element %d: %.9g on the GPU, %.9g simulated, %.9g by the manual\n", thread, i,
                double(gpu), double(simulated), expected.sum);
}

}  // namespace

TEST(ldmatrix) {
  std::mt19937 generator(1);
  for (int round = 0; round < kRounds; ++round) {
    const LdmatrixOperands operands = draw_ldmatrix(generator);
    expect_same_bits<LdmatrixResult>(
        [&](const Instructions& of, LdmatrixResult* result) { return of.ldmatrix_x4(operands, result); });
  }
}

TEST(ldmatrix_trans) {
  std::mt19937 generator(6);
  for (int round = 0; round < kRounds; ++round) {
    const LdmatrixOperands operands = draw_ldmatrix(generator);
    expect_same_bits<LdmatrixResult>([&](const Instructions& of, LdmatrixResult* result) {
      return of.ldmatrix_x4_trans(operands, result);
    });
  }
}

TEST(stmatrix_trans) {
  if (!has_sm90a()) return;
  std::mt19937 generator(7);
  for (int round = 0; round < kRounds; ++round) {
    const StmatrixOperands operands = draw_stmatrix(generator);
    expect_same_bits<StmatrixResult>([&](const Instructions& of, StmatrixResult* result) {
      return of.stmatrix_x4_trans(operands, result);
    });
  }
}

TEST(cp_async) {
  std::mt19937 generator(2);
  for (int round = 0; round < kRounds; ++round) {
    const CopyOperands operands = draw_copies(generator);
    expect_same_bits<CopyResult>(
        [&](const Instructions& of, CopyResult* result) { return of.cp_async_16(operands, result); });
  }
}

TEST(mma_sp) {
  std::mt19937 generator(3);
  for (int round = 0; round < kRounds; ++round)
    for (Operand operand : kOperands)
      for (Numbers numbers : {Numbers::integers, Numbers::normal})
        for (int selector = 0; selector < (has_selectors(operand) ? 2 : 1); ++selector) {
          if (operand == Operand::e4m3 && !has_sm90a()) continue;
          const MmaCase now(operand, selector, numbers, generator);
          MmaResult gpu{}, simulated{};
          run(&gpu, &simulated, [&](const Instructions& of, MmaResult* result) {
            return of.mma_sp(operand, selector, now.operands, result);
          });
          for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i)
              expect_same_sum(lane, i, gpu.d[lane][i], simulated.d[lane][i], operand, numbers,
                              now.expected(lane, i));
        }
}

TEST(wgmma_sp) {
  if (!has_sm90a()) return;
  std::mt19937 generator(4);
  for (Operand operand : kOperands)
    for (Numbers numbers : {Numbers::integers, Numbers::normal})
      for (int n : {64, 128, 256})
        for (bool accumulate : {false, true}) {
          const WgmmaCase now(operand, n, accumulate, numbers, generator);
          WgmmaResult gpu{}, simulated{};
          run(&gpu, &simulated, [&](const Instructions& of, WgmmaResult* result) {
            return of.wgmma_sp(operand, n, accumulate, now.operands, result);
          });
          for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < n / 2; ++i)
              expect_same_sum(thread, i, gpu.d[thread][i], simulated.d[thread][i], operand, numbers,
                              now.expected(thread, i));
        }
}

TEST(tma_boxes) {
  if (!has_sm90a()) return;
  std::mt19937 generator(5);
  const BoxOperands operands = draw_matrix(generator);
  for (int blocks : {1, 2})
    for (int column : kBoxColumnsAt)
      for (int row : kBoxRowsAt)
        expect_same_bits<BoxResult>([&](const Instructions& of, BoxResult* result) {
          return of.tma_load_2d(blocks, column, row, operands, result);
        });
}

int main(int argc, char** argv) {
  if (!has_gpu()) {
    std::printf("skipped: there is no CUDA device that the library has code for\n");
    return 77;  // SKIP_RETURN_CODE
  }
  return run_all(argc > 1 ? argv[1] : nullptr);
}
