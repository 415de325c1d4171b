// A persistent pool of threads for many short parallel loops, on a machine that other work shares.
//
// The caller works too, items are claimed one by one, and a loop ends when its items are done, not when every thread has been
// there: a worker that the operating system keeps off the processor delays nobody unless it holds an item, and then only by that
// item. Each thread begins with a run of items of its own, the same ones in every loop of as many, and helps the others when it is
// through: so it reads memory onwards, where what was asked for ahead is its own to use.
//
// Whoever waits spins for about as long as an item takes and then sleeps in the kernel: a thread that spins while its partner is
// off the processor uses up its own share of it for nothing, one that sleeps is let in as soon as there is work.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace dovetail {

class Pool {
 public:
  // The process's pool; replaced in the child of a fork, where the parent's threads do not exist.
  static Pool& instance();

  // Held by whoever runs a sequence of loops, for as long as the sequence lasts; `kind` is the same for sequences that do the same
  // work. Starts what workers are missing, and settles how many threads take part: at most as many as the caller's affinity mask
  // has processors at the time, and fewer while sequences were measured to end sooner so.
  class Turn {
   public:
    Turn(Pool& pool, uint64_t kind);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Pool& pool_;
    std::lock_guard<std::mutex> lock_;
    uint64_t kind_;
    std::chrono::steady_clock::time_point began_;
  };

  // Turns of one operation that do as much work are of one kind.
  static uint64_t kind(const char* operation, int64_t size, int64_t rows) {
    constexpr uint64_t odd = 0x9e3779b97f4a7c15u;
    return (reinterpret_cast<uintptr_t>(operation) * odd + static_cast<uint64_t>(size)) * odd + static_cast<uint64_t>(rows);
  }

  int size() const { return size_; }
  void resize(int threads);  // calling thread included; at least 1

  // What follows is for the holder of the turn.
  int threads() const { return active_; }  // that take part

  // Calls body(begin, end) over [0, items) in pieces of at most `grain`, on any threads, each item once.
  template <typename Body>
  void run(int64_t items, int64_t grain, Body& body) {
    if (active_ <= 1 || items <= grain) {
      if (items > 0) body(int64_t{0}, items);
      return;
    }
    start(items, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }

 private:
  using Call = void (*)(void*, int64_t, int64_t);
  using Clock = std::chrono::steady_clock;

  // gate_: loop number (20 bits) | open (1 bit) | caller asleep (1 bit) | workers inside (10 bits)
  static constexpr uint32_t kWaiting = 1u << 10;
  static constexpr uint32_t kOpen = 1u << 11;
  static constexpr uint32_t kLoop = 1u << 12;
  static constexpr uint32_t kInside = kWaiting - 1;

  static constexpr int kKinds = 64;
  static constexpr int kShares = 64;  // more threads than that share shares

  // A run of items that one thread begins with.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // The shortest time that turns of a kind have taken lately.
  struct Expected {
    uint64_t kind = 0;
    Clock::duration best{0};
  };

  // Turns since the number of threads last changed: the time they took, and the time they were expected to take.
  struct Window {
    Clock::duration took{0};
    Clock::duration expected{0};
  };

  void start(int64_t items, int64_t grain, Call call, void* context);
  void work(int thread);
  void wait_for_workers();
  void serve(int index, uint32_t generation);
  uint32_t await(uint32_t seen);
  void start_workers();
  void settle(int usable);
  void account(uint64_t kind, Clock::duration took);

  alignas(64) std::atomic<uint32_t> gate_{0};
  Share shares_[kShares];
  alignas(64) std::atomic<int> parked_{0};
  std::atomic<uint32_t> generation_{0};  // a resize ends the workers of the generation before
  std::atomic<int> active_{1};
  int num_shares_ = 1;
  int64_t grain_ = 1;
  Call call_ = nullptr;
  void* context_ = nullptr;
  int size_ = 1;
  int started_ = 1;
  int usable_ = 1;  // threads that have a processor
  int held_ = 1;    // the number in force; active_ differs from it during a trial
  double held_slowdown_ = 1.0;
  bool up_ = false;  // trials of more and of fewer threads take turns
  Window window_;
  Expected expected_[kKinds];
  std::mutex turn_;
};

}  // namespace dovetail
