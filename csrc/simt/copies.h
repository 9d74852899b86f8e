// SPDX-License-Identifier: Apache-2.0
#pragma once

// cp.async and its groups; TMA copies of boxes, swizzled, into one block or several of a cluster. What a copy
// will write is poisoned when it is issued.

#include <cuda.h>

#include <cstring>

#include "simt/mbarrier.h"

namespace madtp::simt {

inline void cp_async(std::uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) fail("cp.async: %d of 16 bytes", bytes);
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail("cp.async: the global address is no multiple of 16");
  std::memset(shared(block(), to, 16, 16, "cp.async"), kPoison, 16);
  block().unfenced[(to - kSharedBase) / 16] = self().number + 1;
  self().open_copies.push_back({to, from, bytes});
}

inline void commit_copies() {
  self().copies.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}

inline void land(const AsyncCopy& copy) {
  unsigned char* const to = shared(block(), copy.to, 16, 16, "cp.async");
  if (copy.bytes > 0) std::memcpy(to, copy.from, std::size_t(copy.bytes));
  std::memset(to + copy.bytes, 0, std::size_t(16 - copy.bytes));
}

inline void wait_for_copies(int pending) {
  std::deque<std::vector<AsyncCopy>>& groups = self().copies;
  while (groups.size() > std::size_t(pending)) {
    for (const AsyncCopy& copy : groups.front()) land(copy);
    groups.pop_front();
  }
}

// Ordinary writes before it, such as those of cp.async, are seen by wgmma after the next barrier.
inline void fence_proxy_async() {
  for (unsigned& writer : block().unfenced)
    if (writer == self().number + 1) writer = 0;
}

// Of rows of 128 bytes, 16-byte chunk c of row r lies where chunk c ^ (r % 8) would.
inline std::uint32_t swizzle_128(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void land(Block& b, std::uint32_t to, const CUtensorMap& map, int column, int row) {
  const std::uint32_t row_bytes = map.box_columns * 2;
  for (std::uint32_t r = 0; r < map.box_rows; ++r) {
    for (std::uint32_t c = 0; c < map.box_columns; ++c) {
      const std::uint32_t plain = to + r * row_bytes + c * 2;
      unsigned char* const at = shared(b, map.swizzled ? swizzle_128(plain) : plain, 2, 2, "TMA");
      const std::int64_t x = std::int64_t(column) + c, y = std::int64_t(row) + r;
      const bool inside = x >= 0 && y >= 0 && x < std::int64_t(map.columns) && y < std::int64_t(map.rows);
      if (inside) {
        std::memcpy(at, map.data + std::uint64_t(y) * map.row_bytes + std::uint64_t(x) * 2, 2);
      } else {
        std::memset(at, 0, 2);
      }
    }
  }
}

inline void tma_load(std::uint32_t to, const CUtensorMap& map, int column, int row, std::uint32_t barrier,
                     unsigned blocks) {
  const std::uint32_t bytes = map.box_columns * map.box_rows * 2;
  if (map.data == nullptr) fail("TMA: an empty tensor map");
  // A swizzled row of 128 bytes: its place in 1024 bytes says how it is permuted.
  if (map.swizzled && map.box_columns * 2 != 128) fail("TMA: only rows of 128 bytes are modelled swizzled");
  if (blocks == 0 || blocks >> machine->blocks.size() != 0)
    fail("TMA: blocks %x of a cluster of %zu", blocks, machine->blocks.size());
  for (Block& b : machine->blocks) {
    if ((blocks >> b.rank & 1) == 0) continue;
    std::memset(shared(b, to, bytes, map.swizzled ? 1024 : 128, "TMA"), kPoison, bytes);
    for (std::uint32_t i = (to - kSharedBase) / 16; i < (to - kSharedBase + bytes) / 16; ++i)
      b.unfenced[i] = 0;
    at_barrier(b, barrier, "TMA");
    machine->bulk_copies.push_back([&b, to, map, column, row, barrier, bytes] {
      land(b, to, map, column, row);
      mbarrier_complete_tx(b, barrier, int(bytes));
    });
  }
}

}  // namespace madtp::simt
