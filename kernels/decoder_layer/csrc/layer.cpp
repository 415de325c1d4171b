// One decoder layer (RMSNorm, grouped attention with rope over KV slots, SwiGLU) for the rows of several slots in one call.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "encode.h"
#include "layer_math.h"
#include "linear.h"

namespace dovetail {

struct Layer {
  Packed qkv;      // [heads * head_dim + 2 * kv_heads * head_dim, hidden]
  Packed output;   // [hidden, heads * head_dim]
  Packed gate_up;  // [2 * intermediate, hidden]
  Packed down;     // [hidden, intermediate]
  const float* input_norm;
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
  const float* cosine;  // [num_rows, rotary_dim]
  const float* sine;
  int64_t capacity;  // rows of a slot
  int32_t format;    // CacheFormat of the KV slots
};

// One layer's KV slots: keys and values [slots, kv_heads, capacity, head_dim], scales [slots, kv_heads, capacity] or null.
struct LayerSlots {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
};

namespace {

class Runner {
 public:
  void run(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots, float* hidden);
  void argmax(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t* ids, float* logits);

 private:
  void linear_with_bias(Pool& pool, const Packed& w, const float* x, int64_t stride, int rows, const float* bias, std::vector<float>& y);
  void place_rows(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots);
  void attend_rows(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots);

  Workspace workspace_;
  std::vector<float> normal_, qkv_, projected_, gate_up_, middle_;
  std::vector<AttendTask> tasks_;
  AlignedFloats partials_;
};

// Rows that a thread takes at a time, so that waking it is worth while.
int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

template <typename Body>
void for_rows(Pool& pool, int64_t rows, int64_t width, Body&& row) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  };
  pool.run(rows, row_grain(width), body);
}

void add(const float* x, int64_t width, float* to) {
  for (int64_t i = 0; i < width; ++i) to[i] += x[i];
}

void normalise_rows(Pool& pool, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out) {
  const LayerMath& math = layer_math();
  for_rows(pool, rows, width, [&](int64_t r) { math.normalise(x + r * width, weight, epsilon, static_cast<int>(width), out + r * width); });
}

uint8_t* row_at(void* rows, int64_t row, int width, CacheFormat format) { return static_cast<uint8_t*>(rows) + row * width * element_bytes(format); }

float* scale_at(float* scales, int64_t row) { return scales == nullptr ? nullptr : scales + row; }

// Where each row of the pass goes: its slot and its place there.
struct Place {
  int64_t slot;
  int64_t position;
};

std::vector<Place> places(const Pass& pass) {
  std::vector<Place> all;
  all.reserve(static_cast<size_t>(pass.num_rows));
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s)
    for (int row = 0; row < s->num_rows; ++row) all.push_back({s->slot, s->prefix + s->tail - s->num_rows + row});
  return all;
}

void Runner::linear_with_bias(Pool& pool, const Packed& w, const float* x, int64_t stride, int rows, const float* bias, std::vector<float>& y) {
  y.resize(static_cast<size_t>(rows * w.out));
  linear(pool, workspace_, w, x, stride, rows, y.data());
  if (bias == nullptr) return;
  for (int row = 0; row < rows; ++row) add(bias, w.out, y.data() + row * w.out);
}

// Norms and rotates queries and keys; writes keys and values to their slots. Queries stay in qkv_.
void Runner::place_rows(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots) {
  const LayerMath& math = layer_math();
  const int width = layer.head_dim;
  const CacheFormat format{pass.format};
  const std::vector<Place> place = places(pass);
  for_rows(pool, pass.num_rows, layer.qkv.out, [&](int64_t r) {
    float* row = qkv_.data() + r * layer.qkv.out;
    for (int head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
      float* x = row + head * width;
      const float* norm = head < layer.num_heads ? layer.query_norm : layer.key_norm;
      if (norm != nullptr) math.normalise(x, norm, layer.epsilon, width, x);
      math.rotate(x, pass.cosine + r * layer.rotary_dim, pass.sine + r * layer.rotary_dim, layer.rotary_dim);
    }
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (place[r].slot * layer.num_kv_heads + head) * pass.capacity + place[r].position;
      const float* key = row + (layer.num_heads + head) * width;
      math.store_row(key, width, format, row_at(slots.keys, at, width, format), scale_at(slots.key_scales, at));
      math.store_row(key + layer.num_kv_heads * width, width, format, row_at(slots.values, at, width, format), scale_at(slots.value_scales, at));
    }
  });
}

// A row's attended heads take the place of its queries.
void Runner::attend_rows(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots) {
  const int width = layer.head_dim;
  const int group = layer.num_heads / layer.num_kv_heads;
  const CacheFormat format{pass.format};
  tasks_.clear();
  float* rows = qkv_.data();
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s) {
    for (int64_t head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (s->slot * layer.num_kv_heads + head) * pass.capacity;
      float* queries = rows + head * group * width;
      tasks_.push_back({{row_at(slots.keys, at, width, format), scale_at(slots.key_scales, at)},
                        {row_at(slots.values, at, width, format), scale_at(slots.value_scales, at)},
                        format, width, s->prefix, s->tail, s->num_rows, s->mask, group, layer.scale, queries, queries, layer.qkv.out});
    }
    rows += int64_t{s->num_rows} * layer.qkv.out;
  }
  attend(pool, partials_, tasks_);
}

void Runner::run(Pool& pool, const Layer& layer, const Pass& pass, const LayerSlots& slots, float* hidden) {
  const LayerMath& math = layer_math();
  const int rows = pass.num_rows;
  const int64_t width = layer.qkv.in;
  const int64_t intermediate = layer.down.in;
  normal_.resize(static_cast<size_t>(rows * width));
  normalise_rows(pool, hidden, layer.input_norm, layer.epsilon, rows, width, normal_.data());
  linear_with_bias(pool, layer.qkv, normal_.data(), width, rows, layer.qkv_bias, qkv_);
  place_rows(pool, layer, pass, slots);
  attend_rows(pool, layer, pass, slots);
  linear_with_bias(pool, layer.output, qkv_.data(), layer.qkv.out, rows, layer.output_bias, projected_);
  for_rows(pool, rows, width, [&](int64_t r) {
    add(projected_.data() + r * width, width, hidden + r * width);
    math.normalise(hidden + r * width, layer.post_norm, layer.epsilon, static_cast<int>(width), normal_.data() + r * width);
  });
  linear_with_bias(pool, layer.gate_up, normal_.data(), width, rows, layer.gate_up_bias, gate_up_);
  middle_.resize(static_cast<size_t>(rows * intermediate));
  for_rows(pool, rows, intermediate, [&](int64_t r) {
    const float* gate = gate_up_.data() + r * 2 * intermediate;
    math.swiglu(gate, gate + intermediate, static_cast<int>(intermediate), middle_.data() + r * intermediate);
  });
  linear_with_bias(pool, layer.down, middle_.data(), intermediate, rows, layer.down_bias, projected_);
  for_rows(pool, rows, width, [&](int64_t r) { add(projected_.data() + r * width, width, hidden + r * width); });
}

// The best of the candidates in the order of torch.argmax: NaN first, then the largest, then the smallest id.
bool better(float logit, int64_t id, float best, int64_t best_id) {
  if (std::isnan(logit) != std::isnan(best)) return std::isnan(logit);
  return logit > best || ((logit == best || std::isnan(logit)) && id < best_id);
}

void Runner::argmax(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t* ids, float* logits) {
  std::fill(ids, ids + rows, head.out);
  std::fill(logits, logits + rows, -INFINITY);
  std::mutex merging;
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int block = static_cast<int>(std::min<int64_t>(kBlock, rows - first));
    const Activations activations = workspace_.activations(head, block);
    encode_rows(pool, head, x + first * head.in, head.in, block, activations);
    auto body = [&](int64_t begin, int64_t end) {
      float best[kBlock], panel_logits[kBlock * kPanel];
      int64_t best_ids[kBlock];
      std::fill(best, best + block, -INFINITY);
      std::fill(best_ids, best_ids + block, head.out);
      for (int64_t panel = begin; panel < end; ++panel) {
        multiply_panels(head, activations, block, panel, panel + 1, panel_logits, kPanel);
        const int64_t valid = std::min<int64_t>(kPanel, head.out - panel * kPanel);
        for (int row = 0; row < block; ++row) {
          for (int64_t i = 0; i < valid; ++i) {
            const float logit = panel_logits[row * kPanel + i];
            if (!better(logit, panel * kPanel + i, best[row], best_ids[row])) continue;
            best[row] = logit;
            best_ids[row] = panel * kPanel + i;
          }
        }
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (int row = 0; row < block; ++row) {
        if (!better(best[row], best_ids[row], logits[first + row], ids[first + row])) continue;
        logits[first + row] = best[row];
        ids[first + row] = best_ids[row];
      }
    };
    pool.run(head.panels(), panel_grain(head, pool.threads()), body);
  }
}

Runner& runner() {  // one for the process: calls are serialised by the pool's lock
  static Runner* const only = new Runner;
  return *only;
}

}  // namespace
}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// hidden [num_rows, hidden] is read and replaced.
void dovetail_decoder_layer(const Layer* layer, const Pass* pass, const LayerSlots* slots, float* hidden) {
  Pool& pool = Pool::instance();
  const std::lock_guard<std::mutex> lock(pool.caller());
  runner().run(pool, *layer, *pass, *slots, hidden);
}

// The id and value of the largest of each row's products, without the matrix of all of them.
void dovetail_argmax(const Packed* head, const float* x, int64_t rows, int64_t* ids, float* logits) {
  Pool& pool = Pool::instance();
  const std::lock_guard<std::mutex> lock(pool.caller());
  runner().argmax(pool, *head, x, rows, ids, logits);
}
}
#pragma GCC visibility pop
