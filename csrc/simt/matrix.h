// SPDX-License-Identifier: Apache-2.0
#pragma once

// ldmatrix, mma.sp and wgmma.sp, element by element, by the fragment tables of the PTX manual.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "simt/copies.h"

namespace madtp::simt {

// Element `half` (0: low) of a register of two.
inline float element(std::uint32_t word, int half, bool is_float16) {
  const std::uint16_t bits = std::uint16_t(half == 0 ? word : word >> 16);
  if (!is_float16) return __bfloat162float({bits});
  __half value;
  std::memcpy(&value, &bits, sizeof bits);
  return __half2float(value);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  struct Lane {
    std::uint32_t* r;
    std::uint32_t address;
  } mine{r, address};
  with_warp("ldmatrix.x4", mine, [](auto&& of) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      for (unsigned row = 0; row < 8; ++row) {
        const unsigned char* const from = shared(block(), of(matrix * 8 + row).address, 16, 16, "ldmatrix");
        for (unsigned t = 0; t < 4; ++t) std::memcpy(&of(row * 4 + t).r[matrix], from + 4 * t, 4);
      }
    }
  });
}

// The columns of the two kept values of a group of four, from its nibble of the metadata.
struct KeptColumns {
  unsigned first, second;
};
inline KeptColumns kept_columns(std::uint32_t nibble) {
  const KeptColumns kept{nibble & 3, nibble >> 2 & 3};
  if (kept.first >= kept.second) fail("metadata: the columns %u, %u do not ascend", kept.first, kept.second);
  return kept;
}

// Rows of 32 columns, 2:4, as the 32 lanes of a warp hold 16 of them: words 0 and 2 of a lane are columns
// 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of the kept values of row g = lane / 4, t = lane % 4, words 1 and 3 those
// of row g + 8. Of the lanes of row g, number 2 selector + h has the metadata of columns 16 h on: its low
// half of row g, its high half of row g + 8, a nibble for each group of four.
template <typename Word, typename Metadata, typename Use>
void for_each_kept(int row, int selector, bool is_float16, Word&& word, Metadata&& metadata, Use&& use) {
  const unsigned g = unsigned(row % 8);
  const int high = row / 8;
  for (int group = 0; group < 8; ++group) {
    const std::uint32_t bits = metadata(g * 4 + unsigned(2 * selector + group / 4));
    const KeptColumns kept = kept_columns(bits >> (16 * high + 4 * (group % 4)) & 15);
    // Kept values 2 group and 2 group + 1 of the row are one word.
    const std::uint32_t pair = word(g * 4 + unsigned(group % 4), high + 2 * (group / 4));
    use(4 * group + int(kept.first), element(pair, 0, is_float16));
    use(4 * group + int(kept.second), element(pair, 1, is_float16));
  }
}

inline void mma_sp_m16n8k32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4],
                            std::uint32_t metadata, int selector, bool is_float16) {
  struct Lane {
    float* d;
    const std::uint32_t *a, *b;
    std::uint32_t metadata;
  } mine{d, a, b, metadata};
  with_warp(selector == 0 ? "mma.sp, selector 0" : "mma.sp, selector 1", mine, [&](auto&& of) {
    float right[32][8];  // b: register i of a lane holds rows 8 i + 2 t, + 1 of column g
    for (unsigned lane = 0; lane < 32; ++lane)
      for (unsigned i = 0; i < 8; ++i)
        right[i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4] =
            element(of(lane).b[i / 2], int(i % 2), is_float16);
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for_each_kept(
          row, selector, is_float16, [&](unsigned lane, int i) { return of(lane).a[i]; },
          [&](unsigned lane) { return of(lane).metadata; },
          [&](int column, float value) {
            for (int n = 0; n < 8; ++n) sums[n] += value * right[column][n];
          });
      for (unsigned n = 0; n < 8; ++n)
        of(unsigned(row % 8) * 4 + n / 2).d[row / 8 * 2 + int(n % 2)] += sums[n];
    }
  });
}

// --- wgmma

inline MatrixQueue& matrix_queue() { return block().matrices[self().number / kWarpgroupSize]; }

inline void setmaxnreg(int registers) {
  with_warpgroup("setmaxnreg", registers, [](auto&& of) {
    for (unsigned i = 1; i < kWarpgroupSize; ++i)
      if (of(i) != of(0)) fail("setmaxnreg: threads of a warpgroup ask for %d and %d", of(0), of(i));
  });
}

inline void wgmma_fence() {
  int nothing = 0;
  with_warpgroup("wgmma.fence", nothing, [](auto&&) { matrix_queue().fenced = true; });
}

inline void wgmma_commit() {
  int nothing = 0;
  with_warpgroup("wgmma.commit_group", nothing, [](auto&&) {
    MatrixQueue& queue = matrix_queue();
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
    queue.fenced = false;
  });
}

inline void wgmma_wait(int pending) {
  with_warpgroup("wgmma.wait_group", pending, [](auto&& of) {
    MatrixQueue& queue = matrix_queue();
    while (queue.groups.size() > std::size_t(of(0))) {
      for (const MatrixQueue::Operation& operation : queue.groups.front()) operation();
      queue.groups.pop_front();
    }
    if (queue.groups.empty() && queue.open.empty()) queue.accumulators.clear();
  });
}

// Element (row, k) of the operand that a descriptor names: rows of k, 128 bytes swizzled.
inline float described(Block& b, std::uint64_t descriptor, int row, int k, bool is_float16) {
  const std::uint32_t start = std::uint32_t(descriptor & 0x3fff) << 4;
  const std::uint32_t eight_rows = std::uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the swizzle of a descriptor must be that of 128 bytes");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: the base offset of a descriptor must be 0");
  if (eight_rows != 1024) fail("wgmma: eight rows must be 1024 bytes, a descriptor has %u", eight_rows);
  if (start % 1024 >= 128) fail("wgmma: a descriptor must begin in the first row of 1024 bytes");
  const std::uint32_t plain =
      start + std::uint32_t(row % 8) * 128 + std::uint32_t(row / 8) * eight_rows + std::uint32_t(k) * 2;
  const std::uint32_t address = swizzle_128(plain);
  const unsigned char* const at = shared(b, address, 2, 2, "wgmma");
  const unsigned writer = b.unfenced[(address - kSharedBase) / 16];
  if (writer != 0) fail("wgmma: reads what thread %u wrote with cp.async and never fenced", writer - 1);
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return element(bits, 0, is_float16);
}

// One thread's part of an instruction.
struct MatrixLane {
  float* d;
  const std::uint32_t* a;
  std::uint32_t a_words[4];
  std::uint64_t b;
  std::uint32_t metadata;
  bool accumulate;
};

inline void wgmma_sp_m64k32(float* d, const std::uint32_t (&a)[4], std::uint64_t descriptor,
                            std::uint32_t metadata, int n_count, int selector, bool accumulate,
                            bool is_float16) {
  MatrixLane mine{d, a, {a[0], a[1], a[2], a[3]}, descriptor, metadata, accumulate};
  with_warpgroup(selector == 0 ? "wgmma.sp, selector 0" : "wgmma.sp, selector 1", mine, [&](auto&& of) {
    MatrixQueue& queue = matrix_queue();
    if (!queue.fenced) fail("wgmma: its group has not begun with wgmma.fence");
    const std::size_t own = std::size_t(n_count) / 2;  // sums of a thread
    std::vector<MatrixLane> lanes;
    for (unsigned i = 0; i < kWarpgroupSize; ++i) {
      const MatrixLane& lane = of(i);
      if (lane.b != of(0).b || lane.accumulate != of(0).accumulate)
        fail("wgmma: the descriptors of a warpgroup differ");
      lanes.push_back(lane);
      // From the first instruction on, the sums may not be touched until a wait.
      queue.accumulators.emplace(lane.d, std::vector<float>(lane.d, lane.d + own));
    }
    Block& b = block();
    queue.open.push_back([&queue, &b, lanes, own, n_count, selector, is_float16] {
      const std::uint64_t descriptor = lanes[0].b;
      for (const MatrixLane& lane : lanes) {
        const std::vector<float>& expected = queue.accumulators.at(lane.d);
        if (std::memcmp(expected.data(), lane.d, own * sizeof(float)) != 0)
          fail("wgmma: sums were touched while it was under way");
        if (std::memcmp(lane.a, lane.a_words, sizeof lane.a_words) != 0)
          fail("wgmma: registers of its A operand were written while it was under way");
      }
      std::vector<float> right(std::size_t(32 * n_count));
      for (int k = 0; k < 32; ++k)
        for (int n = 0; n < n_count; ++n)
          right[std::size_t(k * n_count + n)] = described(b, descriptor, n, k, is_float16);
      std::vector<float> sums(static_cast<std::size_t>(n_count));
      for (int row = 0; row < 64; ++row) {  // warp w of the warpgroup has rows 16 w on
        const MatrixLane* const warp = &lanes[std::size_t(row / 16 * kWarpSize)];
        std::fill(sums.begin(), sums.end(), 0.0f);
        for_each_kept(
            row % 16, selector, is_float16, [&](unsigned lane, int i) { return warp[lane].a_words[i]; },
            [&](unsigned lane) { return warp[lane].metadata; },
            [&](int column, float value) {
              const float* const from = &right[std::size_t(column * n_count)];
              for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += value * from[n];
            });
        for (int n = 0; n < n_count; ++n) {
          const MatrixLane& lane = warp[row % 8 * 4 + n % 8 / 2];
          float& to = lane.d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
          to = (lane.accumulate ? to : 0.0f) + sums[std::size_t(n)];
        }
      }
      for (const MatrixLane& lane : lanes) queue.accumulators.at(lane.d).assign(lane.d, lane.d + own);
    });
  });
}

}  // namespace madtp::simt
