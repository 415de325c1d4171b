#include "profile.h"

#include <algorithm>
#include <chrono>

namespace dovetail {

std::atomic<bool> g_profiling{false};

namespace {

constexpr int kMostThreads = 256;  // those beyond are not counted

struct alignas(64) Laps {
  std::atomic<int64_t> spent[kParts];  // nanoseconds; written by one thread, read by another
  int64_t last = 0;
  int64_t run = 0;
};

Laps g_laps[kMostThreads];
std::atomic<int> g_threads{0};
std::atomic<int64_t> g_run{0};  // a new one begins with every start

int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void count_lap(Part part) {
  thread_local const int thread = g_threads.fetch_add(1);
  if (thread >= kMostThreads) return;
  Laps& laps = g_laps[thread];
  const int64_t time = now();
  const int64_t run = g_run.load(std::memory_order_relaxed);
  if (laps.run == run) {
    std::atomic<int64_t>& spent = laps.spent[static_cast<int>(part)];
    spent.store(spent.load(std::memory_order_relaxed) + time - laps.last, std::memory_order_relaxed);
  }
  laps.run = run;
  laps.last = time;
}

}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// Begins to count at zero, or ends counting.
void dovetail_profile(int on) {
  if (on != 0) {
    for (Laps& laps : g_laps)
      for (std::atomic<int64_t>& spent : laps.spent) spent = 0;
    ++g_run;
  }
  g_profiling = on != 0;
}

// Nanoseconds of each part [threads, parts] of the first `most` threads that ever counted; how many there are.
int dovetail_profile_times(int64_t* times, int most) {
  const int threads = std::min({g_threads.load(), kMostThreads, most});
  for (int thread = 0; thread < threads; ++thread)
    for (int part = 0; part < kParts; ++part) times[thread * kParts + part] = g_laps[thread].spent[part];
  return threads;
}
}
#pragma GCC visibility pop
