// Decoder layers (RMSNorm, grouped attention with rope over KV slots, SwiGLU) for the rows of several slots in one call.
#include "layer.h"

#include "layer_math.h"

namespace dovetail {
namespace {

constexpr int64_t kExponentials = 8;  // an exponential costs about as much as copying so many floats

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

// A product's row with its bias, where it has one.
void add_with_bias(const float* x, const float* bias, int64_t width, float* to) {
  if (bias == nullptr) return add(x, width, to);
  for (int64_t i = 0; i < width; ++i) to[i] += x[i] + bias[i];
}

// y = W x by the parts of W: the first makes the rows' input with x(row), the others find it there with again(row).
template <typename Input, typename Again>
void joined_of(Pool& pool, Workspace& workspace, const Joined& w, int64_t rows, int64_t grain, Input&& x, Again&& again, float* y) {
  const int64_t stride = w.out();
  linear_of(pool, workspace, w.parts[0], rows, grain, x, y, stride);
  for (int64_t i = 1, at = w.parts[0].out; i < w.count; at += w.parts[i].out, ++i)
    linear_of(pool, workspace, w.parts[i], rows, grain, again, y + at, stride);
}

uint8_t* row_at(uint8_t* rows, int64_t row, int width, CacheFormat format) { return rows + row * width * element_bytes(format); }

float* scale_at(float* scales, int64_t row) { return scales == nullptr ? nullptr : scales + row; }

}  // namespace

void Runner::find_places(const Pass& pass) {
  places_.clear();
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s)
    for (int row = 0; row < s->num_rows; ++row) places_.push_back({s->slot, s->prefix + s->tail - s->num_rows + row});
}

// Norms and rotates queries and keys; writes keys and values to their slots. Queries stay in qkv_.
void Runner::place_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots) {
  const LayerMath& math = layer_math();
  const int width = layer.head_dim;
  const CacheFormat format = pass.format;
  for_rows(pool, pass.num_rows, layer.qkv.out(), [&](int64_t r) {
    float* row = qkv_.data() + r * layer.qkv.out();
    const int64_t angles = int64_t{pass.positions[r]} * layer.rotary_dim;
    if (layer.qkv_bias != nullptr) add(layer.qkv_bias, layer.qkv.out(), row);
    for (int head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
      float* x = row + head * width;
      const float* norm = head < layer.num_heads ? layer.query_norm : layer.key_norm;
      if (norm != nullptr) math.normalise(x, norm, layer.epsilon, width, x);
      math.rotate(x, pass.cosine + angles, pass.sine + angles, layer.rotary_dim);
    }
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (places_[r].slot * layer.num_kv_heads + head) * pass.capacity + places_[r].position;
      const float* key = row + (layer.num_heads + head) * width;
      const float* value = key + layer.num_kv_heads * width;
      math.store_row(key, width, format, row_at(slots.keys, at, width, format), scale_at(slots.key_scales, at));
      math.store_row(value, width, format, row_at(slots.values, at, width, format), scale_at(slots.value_scales, at));
    }
    lap(Part::kRope);
  });
}

// A row's attended heads take the place of its queries.
void Runner::attend_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots) {
  const int width = layer.head_dim;
  const int group = layer.num_heads / layer.num_kv_heads;
  const CacheFormat format = pass.format;
  tasks_.clear();
  float* rows = qkv_.data();
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s) {
    for (int64_t head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (s->slot * layer.num_kv_heads + head) * pass.capacity;
      float* queries = rows + head * group * width;
      tasks_.push_back({{row_at(slots.keys, at, width, format), scale_at(slots.key_scales, at)},
                        {row_at(slots.values, at, width, format), scale_at(slots.value_scales, at)},
                        format, width, s->prefix, s->tail, s->num_rows, s->mask, group, layer.scale, queries, queries, layer.qkv.out()});
    }
    rows += int64_t{s->num_rows} * layer.qkv.out();
  }
  attend(pool, partials_, tasks_);
}

void Runner::run_layer(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots, float* hidden) {
  const LayerMath& math = layer_math();
  const int64_t rows = pass.num_rows;
  const int64_t width = layer.qkv.in();
  const int64_t intermediate = layer.down.in;
  auto normal = [&](int64_t r, const float* norm) {
    float* out = normal_.data() + r * width;
    math.normalise(hidden + r * width, norm, layer.epsilon, static_cast<int>(width), out);
    lap(Part::kNorms);
    return out;
  };
  auto attention_input = [&](int64_t r) { return layer.input_norm == nullptr ? hidden + r * width : normal(r, layer.input_norm); };
  auto normal_again = [&](int64_t r) { return normal_.data() + r * width; };
  auto attention_again = [&](int64_t r) { return layer.input_norm == nullptr ? hidden + r * width : normal_again(r); };
  joined_of(pool, workspace_, layer.qkv, rows, row_grain(2 * width), attention_input, attention_again, qkv_.data());
  place_rows(pool, layer, pass, slots);
  attend_rows(pool, layer, pass, slots);
  auto attended = [&](int64_t r) { return qkv_.data() + r * layer.qkv.out(); };
  linear_of(pool, workspace_, layer.output, rows, row_grain(layer.output.in), attended, projected_.data(), width);
  auto mlp_input = [&](int64_t r) {
    add_with_bias(projected_.data() + r * width, layer.output_bias, width, hidden + r * width);
    return normal(r, layer.post_norm);
  };
  joined_of(pool, workspace_, layer.gate_up, rows, row_grain(2 * width), mlp_input, normal_again, gate_up_.data());
  auto activated = [&](int64_t r) {
    float* gate = gate_up_.data() + r * 2 * intermediate;
    float* out = middle_.data() + r * intermediate;
    if (layer.gate_up_bias != nullptr) add(layer.gate_up_bias, 2 * intermediate, gate);
    math.swiglu(gate, gate + intermediate, static_cast<int>(intermediate), out);
    lap(Part::kActivation);
    return out;
  };
  linear_of(pool, workspace_, layer.down, rows, row_grain(kExponentials * intermediate), activated, projected_.data(), width);
  for_rows(pool, rows, width, [&](int64_t r) {
    add_with_bias(projected_.data() + r * width, layer.down_bias, width, hidden + r * width);
    lap(Part::kNorms);
  });
}

void Runner::run(Pool& pool, const Layer* layers, int64_t num_layers, const Pass& pass, const Slots& slots, float* hidden) {
  if (num_layers == 0 || pass.num_rows == 0) return;
  const size_t rows = static_cast<size_t>(pass.num_rows);
  find_places(pass);
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    normal_.resize(rows * layer.qkv.in());
    qkv_.resize(rows * layer.qkv.out());
    projected_.resize(rows * layer.output.out);
    gate_up_.resize(rows * layer.gate_up.out());
    middle_.resize(rows * layer.down.in);
    run_layer(pool, layer, pass, slots.layer(i), hidden);
  }
}

}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// hidden [num_rows, hidden] is read and replaced; the slots begin with those of the first of these layers.
void dovetail_decoder_layers(const Layer* layers, int64_t num_layers, const Pass* pass, const Slots* slots, float* hidden) {
  static Runner* const runner = new Runner;
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("layers", num_layers, pass->num_rows));
  runner->run(pool, layers, num_layers, *pass, *slots, hidden);
}

// RMSNorm of rows [rows, width].
void dovetail_normalise(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) layer_math().normalise(x + r * width, weight, epsilon, static_cast<int>(width), out + r * width);
}
}
#pragma GCC visibility pop
