// What a decoder layer does between its products, one activation row at a time or one key head at a time: once for each
// instruction set. Every result depends on its own row and on the keys it sees, never on the rows beside it.
#pragma once

#include <cstdint>

#include "attention.h"

namespace dovetail {

constexpr float kTiny = 1e-30f;  // a row of int8 whose largest magnitude is below counts as zero: 127 / largest would overflow

struct LayerMath {
  // out = x / rms(x) * weight
  void (*normalise)(const float* x, const float* weight, float epsilon, int width, float* out);
  // out = (x - mean(x)) / deviation(x) * weight + bias; bias may be null
  void (*centre)(const float* x, const float* weight, const float* bias, float epsilon, int width, float* out);
  // x[i] = x[i] * cos[i] + rotated(x)[i] * sin[i] over the first `width` values, halves rotated against each other
  void (*rotate)(float* x, const float* cosine, const float* sine, int width);
  // out[i] = silu(gate[i]) * up[i]
  void (*swiglu)(const float* gate, const float* up, int width, float* out);
  // out[i] = gelu(gate[i]) * up[i], by the approximation with tanh
  void (*geglu)(const float* gate, const float* up, int width, float* out);
  // x[i] = silu(x[i])
  void (*silu)(float* x, int width);
  // out[i] = second[i] + sigmoid(gate[i]) * (first[i] - second[i])
  void (*blend)(const float* gate, const float* first, const float* second, int width, float* out);
  // log(sum of exp(x[i])), count at least 1; NaN where any value is
  float (*log_sum_exp)(const float* x, int64_t count);
  // One row of one key head to its place in the cache; int8 rows also leave their scale.
  void (*store_row)(const float* from, int width, CacheFormat format, void* to, float* scale);
  // A whole task; its partials count as the first chunks.
  void (*attend_task)(const AttendTask& task, float* scratch);
  // The softmax of one chunk that lies in the closed keys; `partial` holds partial_floats.
  void (*attend_chunk)(const AttendTask& task, int chunk, float* partial, float* scratch);
};

// The variant that goes with the instruction set in use.
const LayerMath& layer_math();

}  // namespace dovetail
