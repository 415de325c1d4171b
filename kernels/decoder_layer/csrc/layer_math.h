// What a decoder layer does between its products, one activation row at a time or one key head at a time.
//
// Every result depends on its own row and on the keys it sees, in the order of their positions: never on the rows beside it.
#pragma once

#include <cstdint>

namespace dovetail {

constexpr int kKeyBlock = 64;  // keys of one step of the online softmax, counted from position 0 of the row's own path
constexpr int kLanes = 16;     // partial sums of a row's reductions: fixed, whatever the vector width

// One key head of one segment: `num_rows` new rows times the query heads that share the key head.
struct AttendTask {
  const void* keys;      // [capacity, head_dim] of this slot and key head, bf16 or fp32
  const void* values;    // the same
  bool bf16;
  int head_dim;          // a multiple of 16
  int prefix;            // keys that every row sees
  int tail;              // keys behind them, the new rows last
  int num_rows;
  const uint8_t* mask;   // [num_rows, tail]: nonzero where the row sees that key of the tail; null for causal rows
  int group;             // query heads
  const float* query;    // row r, head h of the group: query + r * row_stride + h * head_dim; scaled already
  float* output;         // the same places
  int64_t row_stride;
};

// Floats of scratch memory that `attend` wants.
inline int64_t attend_scratch(const AttendTask& task) {
  const int64_t heads = int64_t{task.num_rows} * task.group;
  const int64_t open = task.tail + 2 * kKeyBlock;  // keys behind the last whole block of the prefix, rounded up
  return heads * (task.head_dim + 8 + open) + (2 * kKeyBlock + open) * task.head_dim + open + kKeyBlock;
}

struct LayerMath {
  // out = x / rms(x) * weight
  void (*normalise)(const float* x, const float* weight, float epsilon, int width, float* out);
  // x[i] = x[i] * cos[i] + rotated(x)[i] * sin[i] over the first `width` values, halves rotated against each other
  void (*rotate)(float* x, const float* cosine, const float* sine, int width);
  // out[i] = silu(gate[i]) * up[i]
  void (*swiglu)(const float* gate, const float* up, int width, float* out);
  // x[i] = silu(x[i])
  void (*silu)(float* x, int width);
  // out[i] = second[i] + sigmoid(gate[i]) * (first[i] - second[i])
  void (*blend)(const float* gate, const float* first, const float* second, int width, float* out);
  // log(sum of exp(x[i])), count at least 1; NaN where any value is
  float (*log_sum_exp)(const float* x, int64_t count);
  void (*attend)(const AttendTask& task, float* scratch);
};

// The variant that goes with the instruction set in use.
const LayerMath& layer_math();

}  // namespace dovetail
