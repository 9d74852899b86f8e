// SPDX-License-Identifier: Apache-2.0
#pragma once

// cp.async and its groups; TMA copies of boxes, swizzled, into one block or several of a cluster. What a copy
// will write is poisoned when it is issued.
//
// Copies of TMA and wgmma are of the async proxy. Plain stores, which nothing tells the machine of, are what
// differs from `async_view`: shared memory as that proxy sees it.

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

// What was stored before it is seen by the async proxy; of cp.async and mbarrier.init what this thread did.
inline void fence_proxy_async() {
  Block& b = block();
  for (unsigned& writer : b.unfenced)
    if (writer == self().number + 1) writer = 0;
  for (auto& [address, barrier] : b.barriers)
    if (barrier.owner == self().number) barrier.copies_see = true;
  if (b.shared_bytes > 0) std::memcpy(b.async_view.data(), b.shared, b.shared_bytes);
}

inline void check_stores(const Block& b, std::uint32_t address, std::size_t bytes, const char* name) {
  const std::size_t offset = address - kSharedBase;
  if (std::memcmp(b.shared + offset, b.async_view.data() + offset, bytes) != 0)
    fail("%s: of bytes %zu to %zu some were stored to without a fence.proxy.async since", name, offset,
         offset + bytes);
}

// Before the async proxy reads 16 bytes.
inline void check_read(Block& b, std::uint32_t address, const char* name) {
  shared(b, address, 16, 16, name);
  const unsigned writer = b.unfenced[(address - kSharedBase) / 16];
  if (writer == kBulkCopy) fail("%s: reads what no wait has seen a copy bring", name);
  if (writer != 0) fail("%s: reads what thread %u wrote with cp.async and never fenced", name, writer - 1);
  check_stores(b, address, 16, name);
}

// Of rows of 128 bytes, 16-byte chunk c of row r lies where chunk c ^ (r % 8) would.
inline std::uint32_t swizzle_128(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Of `bytes` in all.
inline void land(Block& b, std::uint32_t to, const CUtensorMap& map, int column, int row,
                 std::uint32_t bytes) {
  check_alive(b, "TMA");
  check_stores(b, to, bytes, "TMA");
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
  const std::uint32_t offset = to - kSharedBase;
  std::memcpy(b.async_view.data() + offset, b.shared + offset, bytes);
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
    unsigned char* const at = shared(b, to, bytes, map.swizzled ? 1024 : 128, "TMA");
    MBarrier& told = at_barrier(b, barrier, "TMA");
    if (!told.copies_see) fail("TMA: its barrier was initialised without a fence for copies");
    check_alive(b, "TMA");
    const std::uint32_t offset = to - kSharedBase;
    const auto chunks = b.unfenced.begin() + offset / 16;
    if (std::find(chunks, chunks + bytes / 16, kBulkCopy) != chunks + bytes / 16)
      fail("TMA: writes where another copy does that no wait has seen land");
    check_stores(b, to, bytes, "TMA");
    std::memset(at, kPoison, bytes);
    std::memset(b.async_view.data() + offset, kPoison, bytes);
    std::fill_n(chunks, bytes / 16, kBulkCopy);
    machine->bulk_copies.push_back([&b, &told, to, map, column, row, bytes] {
      land(b, to, map, column, row, bytes);
      told.landed.push_back({told.phase, to, bytes});
      mbarrier_complete_tx(told, int(bytes));
    });
  }
}

}  // namespace madtp::simt
