// SPDX-License-Identifier: Apache-2.0
#pragma once

// wgmma.sp, as matrix.h has mma.sp, and the registers of a warpgroup.

#include "simt/matrix.h"

namespace madtp::simt {

inline MatrixQueue& matrix_queue() { return block().matrices[self().number / kWarpgroupSize]; }

// The registers of a block are those of its launch: what one warpgroup gives back another may take.
inline void setmaxnreg_dec(int registers) {
  with_warpgroup("setmaxnreg.dec", registers, [](auto&& of) {
    Block& b = block();
    int& now = b.registers[self().number / kWarpgroupSize];
    if (of(0) > now) fail("setmaxnreg.dec: from %d registers to %d", now, of(0));
    b.free_registers += (now - of(0)) * kWarpgroupSize;
    now = of(0);
    wake_all(&b.free_registers);
  });
}

inline void setmaxnreg_inc(int registers) {
  Block& b = block();
  int& now = b.registers[self().number / kWarpgroupSize];
  with_warpgroup("setmaxnreg.inc", registers, [&](auto&& of) {
    if (of(0) < now) fail("setmaxnreg.inc: from %d registers to %d", now, of(0));
  });
  while (now < registers && b.free_registers < (registers - now) * kWarpgroupSize)
    wait("setmaxnreg.inc", &b.free_registers);
  b.free_registers -= (registers - now) * kWarpgroupSize;  // the first thread takes them for all
  now = registers;
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

// The address of a byte of a row of the operand that a descriptor names: rows of k, 128 bytes swizzled.
inline std::uint32_t described_address(std::uint64_t descriptor, int row, int byte) {
  const std::uint32_t start = std::uint32_t(descriptor & 0x3fff) << 4;
  const std::uint32_t eight_rows = std::uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the swizzle of a descriptor must be that of 128 bytes");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: the base offset of a descriptor must be 0");
  if (eight_rows != 1024) fail("wgmma: eight rows must be 1024 bytes, a descriptor has %u", eight_rows);
  if (start % 1024 >= 128) fail("wgmma: a descriptor must begin in the first row of 1024 bytes");
  return swizzle_128(start + std::uint32_t(row % 8) * 128 + std::uint32_t(row / 8) * eight_rows +
                     std::uint32_t(byte));
}

// Element (row, k).
inline float described(Block& b, std::uint64_t descriptor, int row, int k, Element element) {
  const std::uint32_t bytes = std::uint32_t(bytes_of(element));
  const std::uint32_t address = described_address(descriptor, row, k * int(bytes));
  const unsigned char* const at = shared(b, address, bytes, bytes, "wgmma");
  std::uint32_t bits = 0;
  std::memcpy(&bits, at, bytes);
  return element_of(bits, 0, element);
}

inline std::vector<unsigned char> bytes_at(const void* data, std::size_t bytes) {
  const unsigned char* const from = static_cast<const unsigned char*>(data);
  return std::vector<unsigned char>(from, from + bytes);
}

// What wgmma reads must be there when it is issued, and stay.
inline void check_operand(Block& b, std::uint64_t descriptor, int rows, int row_bytes) {
  for (int row = 0; row < rows; ++row)
    for (int byte = 0; byte < row_bytes; byte += 16)
      check_read(b, described_address(descriptor, row, byte), "wgmma");
}

// One thread's part of an instruction.
template <typename Sum>
struct MatrixLane {
  Sum* d;
  const std::uint32_t* a;
  std::uint32_t a_words[4];
  std::uint64_t b;
  std::uint32_t metadata;
  bool accumulate;
};

// d (64, n_count) = a (64, 16 w, 2:4) b (16 w, n_count), as mma_sp has the operands.
template <typename Sum>
void wgmma_sp(Sum* d, const std::uint32_t (&a)[4], std::uint64_t descriptor, std::uint32_t metadata,
              int n_count, int selector, bool accumulate, Element element) {
  MatrixLane<Sum> mine{d, a, {a[0], a[1], a[2], a[3]}, descriptor, metadata, accumulate};
  with_warpgroup(selector == 0 ? "wgmma.sp, selector 0" : "wgmma.sp, selector 1", mine, [&](auto&& of) {
    MatrixQueue& queue = matrix_queue();
    if (!queue.fenced) fail("wgmma: its group has not begun with wgmma.fence");
    const std::size_t own = std::size_t(n_count) / 2 * sizeof(Sum);  // bytes of the sums of a thread
    std::vector<MatrixLane<Sum>> lanes;
    for (unsigned i = 0; i < kWarpgroupSize; ++i) {
      const MatrixLane<Sum>& lane = of(i);
      if (lane.b != of(0).b || lane.accumulate != of(0).accumulate)
        fail("wgmma: the descriptors of a warpgroup differ");
      lanes.push_back(lane);
      // From the first instruction on, the sums may not be touched until a wait.
      queue.accumulators.emplace(lane.d, bytes_at(lane.d, own));
    }
    Block& b = block();
    check_operand(b, of(0).b, n_count, 64);
    queue.open.push_back([&queue, &b, lanes, own, n_count, selector, element] {
      const std::uint64_t descriptor = lanes[0].b;
      for (const MatrixLane<Sum>& lane : lanes) {
        if (queue.accumulators.at(lane.d) != bytes_at(lane.d, own))
          fail("wgmma: sums were touched while it was under way");
        if (std::memcmp(lane.a, lane.a_words, sizeof lane.a_words) != 0)
          fail("wgmma: registers of its A operand were written while it was under way");
      }
      check_operand(b, descriptor, n_count, 64);
      const int depth = 16 * elements_of_word(element);
      std::vector<Sum> right(std::size_t(depth * n_count));
      for (int k = 0; k < depth; ++k)
        for (int n = 0; n < n_count; ++n)
          right[std::size_t(k * n_count + n)] = Sum(described(b, descriptor, n, k, element));
      std::vector<Sum> sums(static_cast<std::size_t>(n_count));
      for (int row = 0; row < 64; ++row) {  // warp w of the warpgroup has rows 16 w on
        const MatrixLane<Sum>* const warp = &lanes[std::size_t(row / 16 * kWarpSize)];
        std::fill(sums.begin(), sums.end(), Sum(0));
        for_each_kept(
            row % 16, selector, element, [&](unsigned lane, int i) { return warp[lane].a_words[i]; },
            [&](unsigned lane) { return warp[lane].metadata; },
            [&](int column, float value) {
              const Sum* const from = &right[std::size_t(column * n_count)];
              for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += Sum(value) * from[n];
            });
        for (int n = 0; n < n_count; ++n) {
          const MatrixLane<Sum>& lane = warp[row % 8 * 4 + n % 8 / 2];
          Sum& to = lane.d[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
          to = (lane.accumulate ? to : Sum(0)) + sums[std::size_t(n)];
        }
      }
      for (const MatrixLane<Sum>& lane : lanes) queue.accumulators.at(lane.d) = bytes_at(lane.d, own);
    });
  });
}

}  // namespace madtp::simt
