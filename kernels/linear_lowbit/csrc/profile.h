// Where the threads spend their time, for the benchmark: off unless asked for, and then one clock read for each piece of work.
//
// A thread that ends a piece of work counts the time since it last did so to that piece's part.
#pragma once

#include <atomic>
#include <cstdint>

namespace dovetail {

// As the benchmark names them, in this order.
enum class Part : int32_t { kNorms, kQuantising, kProducts, kRope, kAttention, kActivation, kHead, kWaiting, kOutside };
constexpr int kParts = 9;

extern std::atomic<bool> g_profiling;

void count_lap(Part part);

inline void lap(Part part) {
  if (g_profiling.load(std::memory_order_relaxed)) count_lap(part);
}

}  // namespace dovetail
