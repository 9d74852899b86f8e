// SPDX-License-Identifier: Apache-2.0
#pragma once

// mbarrier objects, in their own 8 bytes of shared memory, and clusters.

#include "simt/builtins.h"

namespace madtp::simt {

struct MBarrier {
  std::uint64_t phase : 1, expected : 15, pending : 16;
  std::int64_t bytes : 32;  // that are still to come
};
static_assert(sizeof(MBarrier) == 8);

inline MBarrier& at_barrier(Block& b, std::uint32_t address, const char* name) {
  return *reinterpret_cast<MBarrier*>(shared(b, address, 8, 8, name));
}

inline void advance(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase = barrier.phase ^ 1;
  barrier.pending = barrier.expected;
  wake_all(&barrier);
}

inline void mbarrier_init(std::uint32_t address, int arrivals) {
  if (arrivals < 1 || arrivals >= 1 << 15) fail("mbarrier.init: %d arrivals", arrivals);
  MBarrier& barrier = at_barrier(block(), address, "mbarrier.init");
  barrier.phase = 0;
  barrier.expected = std::uint64_t(arrivals) & 0x7fff;
  barrier.pending = std::uint64_t(arrivals) & 0x7fff;
  barrier.bytes = 0;
}

inline void check_initialised(const MBarrier& barrier, const char* name) {
  if (barrier.expected == 0x7fff || barrier.expected == 0) fail("%s: the barrier was not initialised", name);
}

// One arrival, and `bytes` more to come.
inline void mbarrier_arrive(Block& b, std::uint32_t address, int bytes) {
  MBarrier& barrier = at_barrier(b, address, "mbarrier.arrive");
  check_initialised(barrier, "mbarrier.arrive");
  if (barrier.pending == 0)
    fail("mbarrier.arrive: more arrivals than the %d expected", int(barrier.expected));
  barrier.bytes = barrier.bytes + bytes;
  barrier.pending = barrier.pending - 1;
  advance(barrier);
}

inline void mbarrier_complete_tx(Block& b, std::uint32_t address, int bytes) {
  MBarrier& barrier = at_barrier(b, address, "complete_tx");
  check_initialised(barrier, "complete_tx");
  barrier.bytes = barrier.bytes - bytes;
  advance(barrier);
}

inline bool mbarrier_try_wait(std::uint32_t address, int parity) {
  MBarrier& barrier = at_barrier(block(), address, "mbarrier.try_wait");
  check_initialised(barrier, "mbarrier.try_wait");
  const auto complete = [&] { return int(barrier.phase) != (parity & 1); };
  if (chance(8)) return false;  // it may give up early
  if (!complete()) wait("mbarrier.try_wait", &barrier);
  return complete();
}

inline Block& block_of_cluster(int rank) {
  if (rank < 0 || std::size_t(rank) >= machine->blocks.size())
    fail("mapa: block %d of a cluster of %zu", rank, machine->blocks.size());
  return machine->blocks[std::size_t(rank)];
}

inline void cluster_sync() {
  const std::size_t threads = machine->blocks.size() * block().threads.size();
  Meeting& meeting = machine->cluster;
  meet(meeting, unsigned(threads), unsigned(meeting.arrived.size()), "barrier.cluster", nullptr,
       [](const std::vector<void*>&) {});
}

}  // namespace madtp::simt
