// Decoder layers over KV slots, and what lies around them: for callers in C++ and, by the same structures, in Python.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace dovetail {

// Matrices that share their input, their outputs behind one another: one where all have the same format, else several.
struct Joined {
  Packed parts[3];
  int64_t count;

  int64_t in() const { return parts[0].in; }
  int64_t out() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += parts[i].out;
    return sum;
  }
};

struct Layer {
  Joined qkv;      // [heads * head_dim + 2 * kv_heads * head_dim, hidden]
  Joined gate_up;  // [2 * intermediate, hidden]
  Packed output;   // [hidden, heads * head_dim]
  Packed down;     // [hidden, intermediate]
  const float* input_norm;  // null: attention reads the residual stream as it is
  const float* post_norm;
  const float* query_norm;  // [head_dim], or null
  const float* key_norm;
  const float* qkv_bias;  // or null, as the three below
  const float* output_bias;
  const float* gate_up_bias;
  const float* down_bias;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;
  float epsilon;
  float scale;
};

struct Segment {
  int32_t slot;
  int32_t prefix;
  int32_t num_rows;
  int32_t tail;
  const uint8_t* mask;  // [num_rows, tail], or null for causal rows
};

struct Pass {
  const Segment* segments;
  int32_t num_segments;
  int32_t num_rows;
  const int32_t* positions;  // [num_rows]: the row of cosine and sine that turns each row
  const float* cosine;       // [positions, rotary_dim]
  const float* sine;
  int64_t capacity;    // rows of a slot
  CacheFormat format;  // of the KV slots
};

// The slots [layers, slots, kv_heads, capacity, head_dim] of keys and of values; with int8 the scales [layers, slots, kv_heads,
// capacity] of either, else null. The steps lead from one layer to the next.
struct Slots {
  uint8_t* keys;
  uint8_t* values;
  float* key_scales;
  float* value_scales;
  int64_t layer_bytes;   // of keys and of values
  int64_t layer_scales;  // floats, of either's scales

  Slots layer(int64_t i) const {
    const auto scales = [&](float* first) { return first == nullptr ? nullptr : first + i * layer_scales; };
    return {keys + i * layer_bytes, values + i * layer_bytes, scales(key_scales), scales(value_scales), layer_bytes, layer_scales};
  }
};

// Runs layers one behind the other; its memory is kept from call to call. One call at a time.
class Runner {
 public:
  // hidden [num_rows, hidden] is read and replaced.
  void run(Pool& pool, const Layer* layers, int64_t num_layers, const Pass& pass, const Slots& slots, float* hidden);

 private:
  // Where each row of the pass goes: its slot and its place there.
  struct Place {
    int64_t slot;
    int64_t position;
  };

  // `slots` begin with those of the layer.
  void run_layer(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots, float* hidden);
  void find_places(const Pass& pass);
  void place_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots);
  void attend_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots);

  Workspace workspace_;
  std::vector<float> normal_, qkv_, projected_, gate_up_, middle_;
  std::vector<Place> places_;
  std::vector<AttendTask> tasks_;
  AlignedFloats partials_;
};

// Rows that a thread takes at a time where each costs as much as copying `values` floats a few times over.
inline int64_t row_grain(int64_t values) { return values < 4096 ? 4096 / values : 1; }

}  // namespace dovetail
