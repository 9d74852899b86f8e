// SPDX-License-Identifier: Apache-2.0
#pragma once

// mbarrier objects, and clusters.

#include "simt/builtins.h"

namespace madtp::simt {

constexpr std::uint64_t kBarrierMark = 0x6d62617272696572;

inline MBarrier& at_barrier(Block& b, std::uint32_t address, const char* name) {
  const unsigned char* const at = shared(b, address, 8, 8, name);
  const auto found = b.barriers.find(address);
  if (found == b.barriers.end()) fail("%s: the barrier was not initialised", name);
  if (std::memcmp(at, &kBarrierMark, 8) != 0) fail("%s: the barrier was written over", name);
  if (&b != &block() && !found->second.cluster_sees)
    fail("%s: the barrier of block %d was initialised without a fence for the cluster", name, b.rank);
  return found->second;
}

inline void check_count(std::int64_t count, const char* name, const char* what) {
  if (count < -MBarrier::kMaxCount || count > MBarrier::kMaxCount)
    fail("%s: %lld %s are more than 2^20 - 1", name, (long long)count, what);
}

// A parity tells a phase from the next one alone: so nothing may complete a phase before a wait has seen the
// one before.
inline void advance(MBarrier& barrier, const char* name) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  if (barrier.seen < barrier.phase)
    fail("%s: completes a phase, but no wait has seen the one before it complete", name);
  ++barrier.phase;
  barrier.pending = barrier.expected;
  wake_all(&barrier);
}

inline void mbarrier_init(std::uint32_t address, int arrivals) {
  if (arrivals < 1 || arrivals > MBarrier::kMaxCount) fail("mbarrier.init: %d arrivals", arrivals);
  std::memcpy(shared(block(), address, 8, 8, "mbarrier.init"), &kBarrierMark, 8);
  MBarrier barrier;
  barrier.owner = self().number;
  barrier.expected = barrier.pending = arrivals;
  if (!block().barriers.emplace(address, barrier).second) fail("mbarrier.init: there is a barrier already");
}

// What this thread initialised is seen from now on.
inline void fence_mbarrier_init() {
  for (auto& [address, barrier] : block().barriers)
    if (barrier.owner == self().number) barrier.copies_see = barrier.cluster_sees = true;
}

// One arrival, and `bytes` more to come.
inline void mbarrier_arrive(Block& b, std::uint32_t address, int bytes) {
  MBarrier& barrier = at_barrier(b, address, "mbarrier.arrive");
  if (barrier.pending == 0) fail("mbarrier.arrive: more arrivals than the %d expected", barrier.expected);
  if (bytes < 0) fail("mbarrier.arrive: expects %d bytes", bytes);
  barrier.bytes += bytes;
  check_count(barrier.bytes, "mbarrier.arrive", "bytes to come");
  --barrier.pending;
  advance(barrier, "mbarrier.arrive");
}

inline void mbarrier_complete_tx(MBarrier& barrier, int bytes) {
  barrier.bytes -= bytes;
  check_count(barrier.bytes, "complete_tx", "bytes to come");
  advance(barrier, "complete_tx");
}

// All phases that are complete, and what copies brought in them.
inline void see(Block& b, MBarrier& barrier) {
  barrier.seen = barrier.phase;
  const auto is_seen = [&](const MBarrier::Box& box) {
    if (box.phase >= barrier.seen) return false;
    std::fill_n(b.unfenced.begin() + (box.address - kSharedBase) / 16, box.bytes / 16, 0u);
    return true;
  };
  barrier.landed.erase(std::remove_if(barrier.landed.begin(), barrier.landed.end(), is_seen),
                       barrier.landed.end());
}

inline bool mbarrier_try_wait(std::uint32_t address, int parity) {
  MBarrier& barrier = at_barrier(block(), address, "mbarrier.try_wait");
  Thread& thread = self();
  const auto is_complete = [&] { return (barrier.phase & 1) != (parity & 1); };
  if (thread.polled != &barrier || (thread.polled_phase & 1) != (parity & 1)) {
    thread.polled = &barrier;
    thread.polled_phase = is_complete() ? barrier.phase - 1 : barrier.phase;
  }
  if (chance(8)) return false;  // it may give up early
  if (!is_complete()) wait("mbarrier.try_wait", &barrier);
  if (barrier.phase > thread.polled_phase + 1)
    fail("mbarrier.try_wait: while it waited for a phase the next one came to its end too");
  thread.polled = nullptr;
  see(block(), barrier);
  return true;
}

// One whose threads have returned has no memory any more.
inline void check_alive(const Block& b, const char* name) {
  if (b.live == 0) fail("%s: block %d of the cluster has returned", name, b.rank);
}

inline Block& block_of_cluster(int rank) {
  if (rank < 0 || std::size_t(rank) >= machine->blocks.size())
    fail("mapa: block %d of a cluster of %zu", rank, machine->blocks.size());
  Block& b = machine->blocks[std::size_t(rank)];
  check_alive(b, "mapa");
  return b;
}

// The lanes of a warp come together, warps from wherever they are.
inline void cluster_sync(Site site) {
  Block& b = block();
  const unsigned threads = unsigned(b.threads.size()), first = self().warp() * kWarpSize;
  aligned(site);
  meet(b.warps[self().warp()], std::min(unsigned(kWarpSize), threads - first), self().lane(),
       "barrier.cluster", nullptr, [](const std::vector<void*>&) {});
  Meeting& meeting = machine->cluster;
  meet(meeting, unsigned(machine->blocks.size()) * threads, unsigned(meeting.arrived.size()),
       "barrier.cluster", nullptr, [](const std::vector<void*>&) {
         for (Block& other : machine->blocks)
           for (auto& [address, barrier] : other.barriers) barrier.cluster_sees = true;
       });
}

}  // namespace madtp::simt
