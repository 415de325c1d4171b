#include "pool.h"

#include "profile.h"

#include <pthread.h>

#include <algorithm>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

namespace dovetail {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Who waits spins for longer than an item takes, then lets others have its core at every look (the one it waits for may want just
// this one), and only then sleeps. Not sooner: a sleeper is often woken on the core of the thread that wakes it, and then both share
// one (two cores beside much other work: 19 passes/s asleep after 0.3 ms of spinning, 27 so).
constexpr microseconds kSpin{50};

// The caller waits for an item whose worker lost its core: a time slice of the operating system.
constexpr microseconds kCallerPatience{4000};

// Workers wait longer than what a decoding step does between two calls (some 0.1 ms of Python): on a virtual machine waking a
// sleeping worker takes as long again, and the draft and verify calls of a step would all begin with it (measured on two cores,
// small model: 2150 tokens/s at 50 microseconds, 2460 at 300). An idle process still sleeps.
constexpr microseconds kWorkerPatience{300};

// Beside other work: a number of threads is held for so long, then another is tried for a shorter time. Fewer are tried only
// while turns take longer than they were seen to take; so an idle machine pays nothing.
constexpr milliseconds kHold{150};
constexpr milliseconds kTrial{30};
constexpr double kDisturbed = 1.25;

Pool* g_pool = nullptr;  // never destroyed: its detached threads may outlive static destruction

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at a word until `done` holds for it or the patience is over; the value seen last.
template <typename Done>
uint32_t look(const std::atomic<uint32_t>& word, microseconds patience, Done&& done) {
  const auto begin = std::chrono::steady_clock::now();
  uint32_t value = word.load(std::memory_order_acquire);
  for (auto now = begin; !done(value) && now < begin + patience; now = std::chrono::steady_clock::now()) {
    if (now > begin + kSpin) std::this_thread::yield();
    for (int i = 0; i < 16 && !done(value); ++i) {
      relax();
      value = word.load(std::memory_order_acquire);
    }
  }
  return value;
}

// Workers and the caller sleep on the same word and are woken apart. std::atomic::wait, which knows no
// such masks, wakes all.
enum Sleeper : uint32_t { kWorkers = 1, kCaller = 2 };

void sleep_while(std::atomic<uint32_t>& word, uint32_t value, Sleeper who) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_BITSET_PRIVATE, value, nullptr, nullptr, who);
#else
  (void)who;
  word.wait(value);
#endif
}

void wake(std::atomic<uint32_t>& word, Sleeper who) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, nullptr, nullptr, who);
#else
  (void)who;
  word.notify_all();
#endif
}

// Processors that the calling thread may run on now, at most `limit`.
int usable_processors(int limit) {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) return std::clamp(CPU_COUNT(&mask), 1, limit);
#endif
  return limit;
}

}  // namespace

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = g_pool->size_;
      g_pool = new Pool;
      g_pool->size_ = threads;  // its first turn starts them: little is allowed here
    });
  });
  return *g_pool;
}

void Pool::resize(int threads) {
  const std::lock_guard<std::mutex> lock(turn_);
  threads = std::clamp(threads, 1, static_cast<int>(kInside));
  if (threads == size_) return;
  generation_.fetch_add(1);
  gate_.fetch_add(kLoop);  // wakes the old workers, who see that they belong to no generation
  wake(gate_, kWorkers);
  size_ = threads;
  started_ = 1;
}

void Pool::start_workers() {
  const uint32_t generation = generation_.load();
  try {
    for (; started_ < size_; ++started_) std::thread(&Pool::serve, this, started_, generation).detach();
  } catch (const std::system_error&) {
    size_ = started_;  // the system grants no more threads: these do all
  }
}

Pool::Turn::Turn(Pool& pool, uint64_t kind) : pool_(pool), lock_(pool.turn_), kind_(kind), began_(Clock::now()) {
  if (pool.started_ < pool.size_) pool.start_workers();
  const int usable = pool.size_ == 1 ? 1 : usable_processors(pool.size_);
  if (usable != pool.usable_) pool.settle(usable);
  lap(Part::kOutside);
}

Pool::Turn::~Turn() {
  if (pool_.usable_ > 1) pool_.account(kind_, Clock::now() - began_);
}

void Pool::settle(int usable) {
  usable_ = usable;
  active_ = held_ = usable;
  window_ = {};
}

void Pool::account(uint64_t kind, Clock::duration took) {
  Expected& expected = expected_[kind % kKinds];
  if (expected.kind != kind) expected = {kind, took};
  expected.best = std::min(expected.best + expected.best / 256, took);  // forgets slowly: contexts grow
  window_.took += took;
  window_.expected += expected.best;
  const bool trial = active_ != held_;
  if (window_.took < (trial ? kTrial : kHold)) return;
  const double slowdown = static_cast<double>(window_.took.count()) / static_cast<double>(std::max<int64_t>(1, window_.expected.count()));
  window_ = {};
  if (!trial) {
    held_slowdown_ = slowdown;
    up_ = !up_;
    if (up_ && held_ < usable_) {
      active_ = std::min(2 * held_, usable_);
    } else if (held_ > 1 && slowdown > kDisturbed) {
      active_ = held_ / 2;
    }
  } else {
    if (slowdown < held_slowdown_) held_ = active_;
    active_ = held_;
  }
}

void Pool::start(int64_t items, int64_t grain, Call call, void* context) {
  grain_ = grain;
  call_ = call;
  context_ = context;
  num_shares_ = std::min<int>(active_, kShares);
  for (int i = 0; i < num_shares_; ++i) {
    shares_[i].next.store(items * i / num_shares_, std::memory_order_relaxed);
    shares_[i].end = items * (i + 1) / num_shares_;
  }
  gate_.store(((gate_.load(std::memory_order_relaxed) & ~(kLoop - 1)) + kLoop) | kOpen);  // sequentially consistent: against parked_
  if (parked_.load() > 0) wake(gate_, kWorkers);
  work(0);
  if ((gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & kInside) != 0) wait_for_workers();
  lap(Part::kWaiting);
}

void Pool::wait_for_workers() {
  uint32_t gate = look(gate_, kCallerPatience, [](uint32_t value) { return (value & kInside) == 0; });
  if ((gate & kInside) == 0) return;
  gate = gate_.fetch_or(kWaiting, std::memory_order_acq_rel) | kWaiting;
  while ((gate & kInside) != 0) {
    sleep_while(gate_, gate, kCaller);
    gate = gate_.load(std::memory_order_acquire);
  }
  gate_.fetch_and(~kWaiting, std::memory_order_relaxed);
}

void Pool::work(int thread) {
  lap(Part::kWaiting);
  for (int i = 0; i < num_shares_; ++i) {
    Share& share = shares_[(thread + i) % num_shares_];
    for (;;) {
      const int64_t begin = share.next.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= share.end) break;
      call_(context_, begin, std::min(begin + grain_, share.end));
    }
  }
}

// Waits for a loop other than `seen`, awake at first, then asleep.
uint32_t Pool::await(uint32_t seen) {
  uint32_t gate = look(gate_, kWorkerPatience, [seen](uint32_t value) { return value / kLoop != seen; });
  if (gate / kLoop != seen) return gate;
  parked_.fetch_add(1);
  while ((gate = gate_.load()) / kLoop == seen) sleep_while(gate_, gate, kWorkers);
  parked_.fetch_sub(1);
  return gate;
}

void Pool::serve(int index, uint32_t generation) {
  uint32_t seen = gate_.load() / kLoop;
  while (generation_.load() == generation) {
    uint32_t gate = await(seen);
    seen = gate / kLoop;
    if (index >= active_.load(std::memory_order_relaxed)) continue;
    while ((gate & kOpen) != 0 && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
    }
    seen = gate / kLoop;
    if ((gate & kOpen) == 0) continue;
    work(index);
    const uint32_t before = gate_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kWaiting) != 0 && (before & kInside) == 1) wake(gate_, kCaller);
  }
}

}  // namespace dovetail
