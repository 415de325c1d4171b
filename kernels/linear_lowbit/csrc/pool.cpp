#include "pool.h"

#include <pthread.h>

#include <chrono>
#include <thread>

namespace dovetail {
namespace {

// Longer than what a decoding step does between two calls (some 0.1 ms of Python): on a virtual machine waking a sleeping
// worker takes as long again, and the draft and verify calls of a step would all begin with it (measured on two cores, small
// model: 2150 tokens/s at 50 microseconds, 2460 at 300). An idle process still sleeps.
constexpr std::chrono::microseconds kPatience{300};

Pool* g_pool = nullptr;  // never destroyed: its detached threads may outlive static destruction

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = g_pool->threads_;
      g_pool = new Pool;
      g_pool->resize(threads);
    });
  });
  return *g_pool;
}

void Pool::resize(int threads) {
  const std::lock_guard<std::mutex> lock(caller_);
  threads = threads < 1 ? 1 : threads;
  if (threads == threads_) return;
  const uint32_t generation = generation_.fetch_add(1) + 1;
  gate_.fetch_add(kLoop);  // wakes the old workers, who see that they belong to no generation
  gate_.notify_all();
  threads_ = threads;
  for (int i = 1; i < threads; ++i) std::thread(&Pool::serve, this, generation).detach();
}

void Pool::start(int64_t items, int64_t grain, Call call, void* context) {
  items_ = items;
  grain_ = grain;
  call_ = call;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  gate_.store(((gate_.load(std::memory_order_relaxed) & ~(kLoop - 1)) + kLoop) | kOpen);  // sequentially consistent: against parked_
  if (parked_.load() > 0) gate_.notify_all();
  work();
  uint32_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  for (int spins = 0; (gate & (kOpen - 1)) != 0; ++spins) {
    if (spins < 2000) {
      relax();
    } else {
      std::this_thread::yield();  // a worker with items in hand has lost its core: let it have this one
    }
    gate = gate_.load(std::memory_order_acquire);
  }
}

void Pool::work() {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= items_) return;
    call_(context_, begin, begin + grain_ < items_ ? begin + grain_ : items_);
  }
}

// Waits for a loop other than `seen`, awake for kPatience, then asleep.
uint32_t Pool::await(uint32_t seen) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + kPatience;
  uint32_t gate = gate_.load(std::memory_order_acquire);
  while (gate / kLoop == seen && Clock::now() < until) {
    for (int i = 0; i < 32 && gate / kLoop == seen; ++i) {
      relax();
      gate = gate_.load(std::memory_order_acquire);
    }
  }
  if (gate / kLoop != seen) return gate;
  parked_.fetch_add(1);
  while ((gate = gate_.load()) / kLoop == seen) gate_.wait(gate);
  parked_.fetch_sub(1);
  return gate;
}

void Pool::serve(uint32_t generation) {
  uint32_t seen = gate_.load() / kLoop;
  while (generation_.load() == generation) {
    uint32_t gate = await(seen);
    while ((gate & kOpen) != 0 && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
    }
    seen = gate / kLoop;
    if ((gate & kOpen) == 0) continue;
    work();
    gate_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace dovetail
