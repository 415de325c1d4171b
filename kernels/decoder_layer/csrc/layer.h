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

enum class Activation : int32_t { kSilu, kGeluTanh };

struct Layer {
  Joined qkv;      // [heads * head_dim + 2 * kv_heads * head_dim, hidden]
  Joined gate_up;  // [2 * intermediate, hidden]
  Packed output;   // [hidden, heads * head_dim]
  Packed down;     // [hidden, intermediate]
  const float* input_norm;  // null: attention reads the residual stream as it is
  const float* post_norm;   // the same of the feed-forward
  const float* attention_out_norm;  // of what attention gives, before it is added to the stream; or null
  const float* mlp_out_norm;
  const float* input_norm_bias;  // or null, as is every bias
  const float* post_norm_bias;
  const float* query_norm;  // [head_dim], or of all heads where whole_norms; or null
  const float* key_norm;
  const float* qkv_bias;
  const float* output_bias;
  const float* gate_up_bias;
  const float* down_bias;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t window;    // each row sees so many positions, its own the last; 0: all
  int32_t angles;    // which of the pass's tables turns queries and keys; -1: none
  Activation activation;
  int32_t whole_norms;  // query_norm and key_norm are over all heads together
  int32_t centred;      // the norms of the stream take off the mean
  float epsilon;
  float scale;      // of the scores
  float score_cap;  // of the scores, 0: none
  float residual_scale;  // of what is added to the stream
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
  const float* cosine;       // [tables, num_positions, rotary_dim]
  const float* sine;
  int32_t rotary_dim;     // leading values of each head that are turned
  int32_t num_positions;  // of a table; of no account where there is one
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
  // Where each row of the pass goes, its slot and its place there; and where in its text it stands.
  struct Place {
    int64_t slot;
    int64_t place;
    int32_t position;
  };

  // `slots` begin with those of the layer.
  void run_layer(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots, float* hidden);
  void find_places(const Pass& pass);
  void place_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots);
  void attend_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots);
  Window window_of(const Layer& layer, int64_t first_row, int num_rows);

  Workspace workspace_;
  std::vector<float> normal_, qkv_, projected_, gate_up_, middle_;
  std::vector<Place> places_;
  std::vector<AttendTask> tasks_;
  std::vector<int32_t> first_keys_;  // of each row, under the window of the layer at hand
  AlignedFloats partials_;
};

// Rows that a thread takes at a time where each costs as much as copying `values` floats a few times over.
inline int64_t row_grain(int64_t values) { return values < 4096 ? 4096 / values : 1; }

}  // namespace dovetail
