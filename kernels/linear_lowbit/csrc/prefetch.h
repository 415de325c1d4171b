// Lines of weights asked for before they are read.
#pragma once

#include <cstdint>

namespace dovetail {

// The hardware's prefetchers stop at every page and fall behind between spans: two pages ahead, into L2, which keeps more lines in
// flight than L1 can.
constexpr int kAhead = 8192;

inline __attribute__((always_inline)) void prefetch_ahead(const uint8_t* from, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + kAhead + at, 0, 2);
}

}  // namespace dovetail
