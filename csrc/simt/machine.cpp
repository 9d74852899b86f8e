// SPDX-License-Identifier: Apache-2.0
#include "simt/machine.h"

#include <sys/time.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

thread_local dim3 gridDim, blockDim;

namespace madtp::simt {

thread_local Machine* machine = nullptr;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

// Kept from launch to launch: mapping them is slow.
struct Stacks {
  std::vector<GuardedPages> all;
  unsigned char* at(std::size_t i) {
    while (all.size() <= i) all.emplace_back(kStackBytes);
    return all[i].data();
  }
  // After an error threads stay in the middle of their functions, whose frames AddressSanitizer has marked.
  void unmark() {
#ifdef __SANITIZE_ADDRESS__
    for (const GuardedPages& stack : all) ASAN_UNPOISON_MEMORY_REGION(stack.data(), stack.bytes());
#endif
  }
};
thread_local Stacks stacks;

std::string text(const char* format, va_list arguments) {
  char buffer[512];
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

std::string name_of(const Thread& thread) {
  const uint3 b = thread.block->index;
  char buffer[96];
  std::snprintf(buffer, sizeof buffer, "block (%u, %u, %u) thread %u (warp %u, lane %u)", b.x, b.y, b.z,
                thread.number, thread.warp(), thread.lane());
  return buffer;
}

// Where every fiber begins and ends.
void enter() {
  Machine& m = *machine;
  has_switched(nullptr, m.scheduler);
  try {
    (*m.kernel)();
  } catch (const Error& error) {
    m.error = error.what();
  }
  --block().live;
  m.running->done = true;
  m.running->waits_for = "has returned";
  switch_to(m.running->context, m.scheduler);
}

// A thread that runs on and on waits for what no other thread can do meanwhile. This interrupts it and leaves
// it where it is.
void tick(int) {
  Machine* const m = machine;
  if (m == nullptr || m->running == nullptr) return;
  if (std::exchange(m->switches_before, m->switches) != m->switches) return;
  m->error =
      name_of(*m->running) +
      ": has run for long and never waited; a loop until another thread or block writes is not modelled";
  switch_to(m->running->context, m->scheduler);
}

// Ticks of the CPU time of this process, as long as it lives.
class Ticks {
 public:
  Ticks() {
    struct sigaction action = {};
    action.sa_handler = tick;
    action.sa_flags = SA_RESTART | SA_NODEFER;  // the handler does not return where it switches
    sigaction(SIGVTALRM, &action, &before_);
    set(options.patience);
  }
  ~Ticks() {
    set(0);
    sigaction(SIGVTALRM, &before_, nullptr);
  }
  Ticks(const Ticks&) = delete;

 private:
  static void set(double seconds) {
    const timeval period{time_t(seconds), suseconds_t((seconds - double(time_t(seconds))) * 1e6)};
    const itimerval timer{period, period};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
  struct sigaction before_;
};

// Without a seed, a thread of the warp that ran last while it has one; else one of the warp that is first in
// an order drawn now and then, so that some run far ahead of others.
Thread& next(Machine& m) {
  std::size_t warp = m.warp;
  if (is_random()) {
    if (m.random() % 2048 == 0)
      for (std::uint32_t& p : m.priority) p = std::uint32_t(m.random());
    warp = m.ready.size();
    for (std::size_t i = 0; i < m.ready.size(); ++i)
      if (!m.ready[i].empty() && (warp == m.ready.size() || m.priority[i] > m.priority[warp])) warp = i;
    std::deque<Thread*>& queue = m.ready[warp];
    std::swap(queue.front(), queue[m.random() % queue.size()]);
  } else {
    while (m.ready[warp].empty()) warp = (warp + 1) % m.ready.size();
    m.warp = warp;
  }
  Thread& thread = *m.ready[warp].front();
  m.ready[warp].pop_front();
  --m.ready_count;
  return thread;
}

std::string everyone(const Machine& m) {
  std::string lines;
  for (const Block& b : m.blocks) {
    const char* before = nullptr;
    for (const Thread& t : b.threads) {
      if (before != nullptr && std::strcmp(before, t.waits_for) == 0) continue;
      before = t.waits_for;
      lines += "\n  from " + name_of(t) + ": " + before;
    }
  }
  return lines;
}

void prepare(Machine& m, std::size_t shared_bytes, std::size_t first_block) {
  const dim3 size = blockDim;
  const unsigned threads = size.x * size.y * size.z, warps = (threads + kWarpSize - 1) / kWarpSize;
  m.ready.assign(m.blocks.size() * warps, {});
  m.priority.resize(m.ready.size());
  for (std::uint32_t& p : m.priority) p = std::uint32_t(m.random());
  m.ready_count = m.warp = 0;
  m.cluster = {};
  m.bulk_copies.clear();
  for (std::size_t i = 0; i < m.blocks.size(); ++i) {
    Block& b = m.blocks[i];
    const unsigned number = unsigned(first_block + i);
    b.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / (gridDim.x * gridDim.y)};
    b.rank = int(i);
    if (b.pages.data() == nullptr || b.pages.bytes() < shared_bytes) b.pages = GuardedPages(shared_bytes);
    b.shared_bytes = shared_bytes;
    b.shared = b.pages.end() - (shared_bytes + 15) / 16 * 16;
    if (shared_bytes > 0) std::memset(b.shared, kPoison, shared_bytes);
    b.unfenced.assign(shared_bytes / 16 + 1, 0);
    b.async_view.assign(shared_bytes, kPoison);
    b.barriers.clear();
    b.live = threads;
    b.threads.clear();
    b.threads.resize(threads);
    b.warps.assign(warps, {});
    b.warpgroups.assign((threads + kWarpgroupSize - 1) / kWarpgroupSize, {});
    b.barrier = {};
    b.matrices.assign(b.warpgroups.size(), {});
    // What ptxas may give each thread of one block of a multiprocessor; instructions move this and no more.
    b.registers.assign(b.warpgroups.size(), std::min(kRegisters / int(threads) / 8 * 8, 256));
    b.free_registers = 0;
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = b.threads[t];
      thread.block = &b;
      thread.number = t;
      thread.index = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
      start_at(thread.context, stacks.at(i * threads + t), kStackBytes, enter);
      wake(thread);
    }
  }
}

// Nothing may be under way when a block is over.
void check_end(Machine& m) {
  for (Block& b : m.blocks) {
    for (Thread& t : b.threads) {
      m.running = &t;
      if (!t.open_copies.empty() || !t.copies.empty()) fail("returned with cp.async under way");
    }
    for (const MatrixQueue& queue : b.matrices)
      if (!queue.open.empty() || !queue.groups.empty()) fail("returned with wgmma under way");
  }
  if (!m.bulk_copies.empty()) fail("returned with bulk copies under way");
  m.running = nullptr;
}

void run_cluster(Machine& m) {
  std::size_t live = 0;
  for (const Block& b : m.blocks) live += b.threads.size();
  while (live > 0) {
    const bool idle = m.ready_count == 0;
    m.running = nullptr;
    if (!m.bulk_copies.empty() && (idle || chance(64))) {
      const auto copy = std::move(m.bulk_copies.front());
      m.bulk_copies.pop_front();
      copy();
      continue;
    }
    if (idle) throw Error("deadlock:" + everyone(m));
    Thread& thread = next(m);
    m.running = &thread;
    ++m.switches;
    switch_to(m.scheduler, thread.context);
    m.running = nullptr;
    if (!m.error.empty()) throw Error(m.error);
    if (thread.done) --live;
  }
  check_end(m);
}

}  // namespace

bool operator==(Site a, Site b) {
  return a.line == b.line &&
         (a.file == b.file || (a.file != nullptr && b.file != nullptr && std::strcmp(a.file, b.file) == 0));
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string message = text(format, arguments);
  va_end(arguments);
  if (machine != nullptr && machine->running != nullptr)
    message = name_of(*machine->running) + ": " + message;
  throw Error(message);
}

void wake(Thread& thread) {
  thread.waits_for = "runs";
  thread.object = nullptr;
  const std::size_t warps = thread.block->warps.size();
  machine->ready[std::size_t(thread.block->rank) * warps + thread.warp()].push_back(&thread);
  ++machine->ready_count;
}

void wake_all(const void* object) {
  for (Block& b : machine->blocks)
    for (Thread& t : b.threads)
      if (t.object == object) wake(t);
}

void wait(const char* what, const void* object) {
  Thread& thread = self();
  thread.waits_for = what;
  thread.object = object;
  switch_to(thread.context, machine->scheduler);
}

void meet(Meeting& meeting, unsigned size, unsigned place, const char* name, void* argument,
          const std::function<void(const std::vector<void*>&)>& operation) {
  const Site site = std::exchange(self().site, Site{});
  if (meeting.arrived.empty()) {
    meeting.operation = name;
    meeting.site = site;
    meeting.size = size;
    meeting.arguments.assign(size, nullptr);
  }
  if (std::strcmp(meeting.operation, name) != 0 || meeting.size != size)
    fail("diverged: comes to %s of %u, where others are in %s of %u", name, size, meeting.operation,
         meeting.size);
  if (!(meeting.site == site))
    fail("diverged: comes to %s at %s:%d, where others are at %s:%d", name, site.file, site.line,
         meeting.site.file, meeting.site.line);
  if (place >= size) fail("%s has %u threads, this one is number %u", name, size, place);
  meeting.arguments[place] = argument;
  meeting.arrived.push_back(&self());
  if (meeting.arrived.size() < size) {
    wait(name, &meeting);
    return;
  }
  const std::vector<Thread*> others = std::move(meeting.arrived);
  meeting.arrived.clear();
  operation(meeting.arguments);
  for (Thread* thread : others)
    if (thread != &self()) wake(*thread);
}

unsigned char* shared(Block& b, std::uint32_t address, std::size_t bytes, std::size_t alignment,
                      const char* name) {
  const std::int64_t offset = std::int64_t(address) - kSharedBase;
  if (offset < 0 || offset + std::int64_t(bytes) > std::int64_t(b.shared_bytes))
    fail("%s: bytes %lld to %lld are not in the %zu of shared memory", name, (long long)offset,
         (long long)(offset + std::int64_t(bytes)), b.shared_bytes);
  if (address % alignment != 0)
    fail("%s: shared address %lld is no multiple of %zu", name, (long long)offset, alignment);
  return b.shared + offset;
}

void run(dim3 grid, dim3 threads, std::size_t shared_bytes, int cluster,
         const std::function<void()>& kernel) {
  const std::size_t count = std::size_t(grid.x) * grid.y * grid.z;
  const unsigned size = threads.x * threads.y * threads.z;
  if (size == 0 || size > 1024 || shared_bytes > kMaxShared || cluster < 1 || cluster > 8 ||
      count % std::size_t(cluster) != 0)
    fail("cannot launch %zu blocks of %u threads, %zu bytes of shared memory, clusters of %d", count, size,
         shared_bytes, cluster);
  Machine m;
  gridDim = grid;
  blockDim = threads;
  m.kernel = &kernel;
  m.random.seed(options.seed);
  m.blocks.resize(std::size_t(cluster));
  struct Installed {
    Machine* const before = machine;
    explicit Installed(Machine* m) { machine = m; }
    ~Installed() { machine = before; }
  } installed(&m);
  const Ticks ticks;
  std::vector<std::size_t> order(count / std::size_t(cluster));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i * std::size_t(cluster);
  if (is_random()) std::shuffle(order.begin(), order.end(), m.random);
  try {
    for (std::size_t first : order) {
      m.running = nullptr;
      prepare(m, shared_bytes, first);
      run_cluster(m);
    }
  } catch (const Error&) {
    stacks.unmark();
    throw;
  }
}

}  // namespace madtp::simt
