// SPDX-License-Identifier: Apache-2.0
#pragma once

// The machine that runs kernels: blocks one after another, or a cluster of them at a time, each thread a
// fiber.
//
// A fiber runs until it must wait: in a collective for the other lanes, at a barrier, or for what an
// asynchronous instruction will bring. Such work lands as late as is legal, when a wait covers it or nothing
// else can run, unless `options.seed` makes it land at random moments; the seed also decides who runs next,
// thread and cluster.
// Whatever breaks a rule throws an Error out of the launch, which names the block and the thread.

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_config.h"
#include "simt/fiber.h"
#include "simt/language.h"

extern thread_local dim3 gridDim, blockDim;  // those of the kernel that runs

namespace madtp::simt {

constexpr int kWarpSize = 32, kWarpgroupSize = 128;
constexpr std::size_t kMaxShared = 227 * 1024;  // bytes that a block may have
constexpr std::uint32_t kSharedBase = 1024;     // the address of the first byte of dynamic shared memory
constexpr unsigned char kPoison = 0xff;         // NaN in every format
constexpr int kRegisters = 64 * 1024;           // of a multiprocessor

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the machine pretends to be.
struct Options {
  unsigned seed = 0;  // 0: warps run as far as they can, work lands as late as it may
  int capability = 90;
  const char* archs = MADTP_ALL_ARCHS;  // what the kernels are compiled for, as in MADTP_CUDA_ARCHS
  int multiprocessors = 4;
  int error = 0;         // the cudaError_t of every launch
  int device_error = 0;  // the cudaError_t of every question about the device
  double patience = 10;  // seconds of CPU time that a thread may run without waiting
};
inline Options options;
inline int questions = 0;  // how many about the device were answered

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Block;
struct Thread;

// Where a kernel calls an instruction; a default argument of that.
struct Site {
  const char* file = nullptr;
  int line = 0;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
bool operator==(Site a, Site b);

// Threads that meet: a warp, a warpgroup, those of a barrier. The last one that comes runs the operation for
// all.
struct Meeting {
  const char* operation = nullptr;
  Site site;
  unsigned size = 0;
  std::vector<Thread*> arrived;
  std::vector<void*> arguments;  // by the place of their threads
};

// An mbarrier object. The 8 bytes of shared memory that it has hold a mark.
struct MBarrier {
  static constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes

  unsigned owner = 0;  // the thread that initialised it
  int expected = 0, pending = 0;
  std::int64_t bytes = 0;                         // that are still to come
  std::int64_t phase = 0;                         // how many are complete
  std::int64_t seen = 0;                          // how many of them a wait has seen
  bool copies_see = false, cluster_sees = false;  // that it was initialised
  struct Box {
    std::int64_t phase;
    std::uint32_t address, bytes;
  };
  std::vector<Box> landed;  // by bulk copies of phases that no wait has seen
};

// One cp.async: bytes from `bytes` on are zeros.
struct AsyncCopy {
  std::uint32_t to;
  const void* from;
  int bytes;
};

struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index{};
  unsigned number = 0;  // its number in its block
  bool done = false;
  const char* waits_for = nullptr;
  const void* object = nullptr;      // what it waits for
  Site site;                         // of the `.aligned` instruction that it is in
  const MBarrier* polled = nullptr;  // what it has not yet seen complete, and the phase of that
  std::int64_t polled_phase = 0;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copies;

  unsigned lane() const { return number % kWarpSize; }
  unsigned warp() const { return number / kWarpSize; }
};

// The wgmma instructions of a warpgroup: those that were issued, and those of groups that were committed.
struct MatrixQueue {
  using Operation = std::function<void()>;
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;
  std::map<const void*, std::vector<unsigned char>>
      accumulators;     // the sums of those under way: as they must stay
  bool fenced = false;  // since the last commit
};

struct Block {
  uint3 index{};
  int rank = 0;  // its number in its cluster
  GuardedPages pages;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<unsigned> unfenced;  // for 16 bytes each: 1 + the thread whose cp.async wrote them, 0: none,
                                   // kBulkCopy: a bulk copy, and no wait has seen it land
  std::vector<unsigned char> async_view;       // shared memory as the async proxy sees it
  std::map<std::uint32_t, MBarrier> barriers;  // by address
  std::size_t live = 0;                        // threads that have not returned
  std::vector<int> registers;                  // of a thread, by warpgroup
  int free_registers = 0;                      // that setmaxnreg has given back
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  Meeting barrier;
  std::vector<MatrixQueue> matrices;  // one for each warpgroup
};

constexpr unsigned kBulkCopy = 0xffffffff;

// The blocks that run together, and who of them can.
struct Machine {
  std::vector<Block> blocks;
  Meeting cluster;
  std::deque<std::function<void()>> bulk_copies;
  const std::function<void()>* kernel = nullptr;
  Thread* running = nullptr;
  Context scheduler;
  std::string error;
  std::vector<std::deque<Thread*>> ready;  // by warp
  std::vector<std::uint32_t> priority;
  std::size_t ready_count = 0, warp = 0;
  std::uint64_t switches = 0, switches_before = 0;  // to a thread; at the tick before
  std::mt19937 random;
};

extern thread_local Machine* machine;

inline Thread& self() { return *machine->running; }
inline Block& block() { return *self().block; }
inline bool is_random() { return options.seed != 0; }
// At random, once in `times`; never without a seed.
inline bool chance(unsigned times) { return is_random() && machine->random() % times == 0; }

void wake(Thread& thread);
void wake_all(const void* object);
// Leaves the thread until it is woken.
void wait(const char* what, const void* object = nullptr);

// Before a meeting for an `.aligned` instruction, whose threads must all come from the same call.
inline void aligned(Site site) { self().site = site; }

// Runs `operation(arguments)` once all of the meeting are here, arguments by place.
void meet(Meeting& meeting, unsigned size, unsigned place, const char* name, void* argument,
          const std::function<void(const std::vector<void*>&)>& operation);

// The same for the warp, or the warpgroup, of the running thread, arguments by lane.
template <typename Argument, typename Operation>
void with_warp(const char* name, Argument& argument, Operation&& operation) {
  meet(block().warps[self().warp()], kWarpSize, self().lane(), name, &argument,
       [&](const std::vector<void*>& all) {
         operation([&](unsigned lane) -> Argument& { return *static_cast<Argument*>(all[lane]); });
       });
}

template <typename Argument, typename Operation>
void with_warpgroup(const char* name, Argument& argument, Operation&& operation) {
  meet(block().warpgroups[self().number / kWarpgroupSize], kWarpgroupSize, self().number % kWarpgroupSize,
       name, &argument, [&](const std::vector<void*>& all) {
         operation([&](unsigned i) -> Argument& { return *static_cast<Argument*>(all[i]); });
       });
}

// The memory at a shared address of `block`, checked.
unsigned char* shared(Block& block, std::uint32_t address, std::size_t bytes, std::size_t alignment,
                      const char* name);

void run(dim3 grid, dim3 threads, std::size_t shared_bytes, int cluster, const std::function<void()>& kernel);

}  // namespace madtp::simt
