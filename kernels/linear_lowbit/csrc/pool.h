// A persistent pool of threads for many short parallel loops.
//
// The caller works too, and a loop ends when its items are done, not when every thread has been there: a worker that the
// operating system keeps off the processor delays nobody unless it holds items. Between loops workers spin briefly (the next
// loop of a forward pass follows within microseconds), then sleep in the kernel: an idle process uses no processor time.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace dovetail {

class Pool {
 public:
  // The process's pool; replaced in the child of a fork, where the parent's threads do not exist.
  static Pool& instance();

  int threads() const { return threads_; }
  void resize(int threads);  // calling thread included; at least 1

  // Calls body(begin, end) over [0, items) in pieces of `grain`, on any threads, each item once.
  template <typename Body>
  void run(int64_t items, int64_t grain, Body& body) {
    if (threads_ <= 1 || items <= grain) {
      if (items > 0) body(int64_t{0}, items);
      return;
    }
    start(items, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }

  std::mutex& caller() { return caller_; }  // held by whoever runs a sequence of loops

 private:
  using Call = void (*)(void*, int64_t, int64_t);

  // gate_: loop number (20 bits) | open (1 bit) | workers inside (11 bits)
  static constexpr uint32_t kOpen = 1u << 11;
  static constexpr uint32_t kLoop = 1u << 12;

  void start(int64_t items, int64_t grain, Call call, void* context);
  void work();
  void serve(uint32_t generation);
  uint32_t await(uint32_t seen);

  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> parked_{0};
  std::atomic<uint32_t> generation_{0};  // a resize ends the workers of the generation before
  int64_t items_ = 0;
  int64_t grain_ = 1;
  Call call_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 1;
  std::mutex caller_;
};

}  // namespace dovetail
