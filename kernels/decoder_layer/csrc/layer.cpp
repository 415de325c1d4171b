// Decoder layers (norms, grouped attention with rope over KV slots, a gated feed-forward) for the rows of several slots in one call.
#include "layer.h"

#include <algorithm>

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

void add_scaled(const float* x, float scale, int64_t width, float* to) {
  if (scale == 1.0f) return add(x, width, to);
  for (int64_t i = 0; i < width; ++i) to[i] += x[i] * scale;
}

// A product's row goes to the stream, with what the layer does to it before: bias, norm, scale.
void add_product(const Layer& layer, float* x, const float* bias, const float* norm, int width, float* to) {
  if (bias != nullptr) add(bias, width, x);
  if (norm != nullptr) layer_math().normalise(x, norm, layer.epsilon, width, x);
  add_scaled(x, layer.residual_scale, width, to);
}

// A norm of the stream.
void normalise_stream(const Layer& layer, const float* x, const float* norm, const float* bias, int width, float* out) {
  const LayerMath& math = layer_math();
  layer.centred ? math.centre(x, norm, bias, layer.epsilon, width, out) : math.normalise(x, norm, layer.epsilon, width, out);
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
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s) {
    for (int row = 0; row < s->num_rows; ++row) {
      const int32_t place = s->prefix + s->tail - s->num_rows + row;
      const uint8_t* seen = s->mask + (s->mask == nullptr ? 0 : int64_t{row} * s->tail);
      const auto path = [&] { return static_cast<int32_t>(s->tail - std::count(seen, seen + s->tail, uint8_t{0})); };
      places_.push_back({s->slot, place, s->mask == nullptr ? place : s->prefix + path() - 1});
    }
  }
}

// What the layer's window leaves of the keys for rows from `first_row` on, which are of one segment.
Window Runner::window_of(const Layer& layer, int64_t first_row, int num_rows) {
  if (layer.window == 0) return {};
  int32_t* const first = first_keys_.data() + first_row;
  for (int row = 0; row < num_rows; ++row) first[row] = std::max(0, places_[first_row + row].position - layer.window + 1);
  const auto [lowest, highest] = std::minmax_element(first, first + num_rows);
  return *highest == 0 ? Window{} : Window{first, *lowest, *highest};
}

// Norms and rotates queries and keys; writes keys and values to their slots. Queries stay in qkv_.
void Runner::place_rows(Pool& pool, const Layer& layer, const Pass& pass, const Slots& slots) {
  const LayerMath& math = layer_math();
  const int width = layer.head_dim;
  const CacheFormat format = pass.format;
  for_rows(pool, pass.num_rows, layer.qkv.out(), [&](int64_t r) {
    float* row = qkv_.data() + r * layer.qkv.out();
    const int64_t angles = (int64_t{layer.angles} * pass.num_positions + pass.positions[r]) * pass.rotary_dim;
    const int queries = layer.num_heads * width;
    if (layer.qkv_bias != nullptr) add(layer.qkv_bias, layer.qkv.out(), row);
    if (layer.whole_norms) {
      math.normalise(row, layer.query_norm, layer.epsilon, queries, row);
      math.normalise(row + queries, layer.key_norm, layer.epsilon, layer.num_kv_heads * width, row + queries);
    }
    for (int head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
      float* x = row + head * width;
      const float* norm = head < layer.num_heads ? layer.query_norm : layer.key_norm;
      if (norm != nullptr && !layer.whole_norms) math.normalise(x, norm, layer.epsilon, width, x);
      if (layer.angles >= 0) math.rotate(x, pass.cosine + angles, pass.sine + angles, pass.rotary_dim);
    }
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (places_[r].slot * layer.num_kv_heads + head) * pass.capacity + places_[r].place;
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
  first_keys_.resize(places_.size());
  float* rows = qkv_.data();
  int64_t first_row = 0;
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; first_row += s->num_rows, ++s) {
    const Window window = window_of(layer, first_row, s->num_rows);
    for (int64_t head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = (s->slot * layer.num_kv_heads + head) * pass.capacity;
      float* queries = rows + head * group * width;
      tasks_.push_back({{row_at(slots.keys, at, width, format), scale_at(slots.key_scales, at)},
                        {row_at(slots.values, at, width, format), scale_at(slots.value_scales, at)},
                        format, width, s->prefix, s->tail, s->num_rows, s->mask, group, layer.scale, layer.score_cap, window,
                        queries, queries, layer.qkv.out()});
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
  auto normal = [&](int64_t r, const float* norm, const float* bias) {
    if (norm == nullptr) return hidden + r * width;
    float* out = normal_.data() + r * width;
    normalise_stream(layer, hidden + r * width, norm, bias, static_cast<int>(width), out);
    lap(Part::kNorms);
    return out;
  };
  auto again = [&](int64_t r, const float* norm) { return (norm == nullptr ? hidden : normal_.data()) + r * width; };
  auto attention_input = [&](int64_t r) { return normal(r, layer.input_norm, layer.input_norm_bias); };
  auto attention_again = [&](int64_t r) { return again(r, layer.input_norm); };
  joined_of(pool, workspace_, layer.qkv, rows, row_grain(2 * width), attention_input, attention_again, qkv_.data());
  place_rows(pool, layer, pass, slots);
  attend_rows(pool, layer, pass, slots);
  auto attended = [&](int64_t r) { return qkv_.data() + r * layer.qkv.out(); };
  linear_of(pool, workspace_, layer.output, rows, row_grain(layer.output.in), attended, projected_.data(), width);
  auto add_row = [&](int64_t r, const float* bias, const float* norm) {
    add_product(layer, projected_.data() + r * width, bias, norm, static_cast<int>(width), hidden + r * width);
  };
  auto mlp_input = [&](int64_t r) {
    add_row(r, layer.output_bias, layer.attention_out_norm);
    return normal(r, layer.post_norm, layer.post_norm_bias);
  };
  auto mlp_again = [&](int64_t r) { return again(r, layer.post_norm); };
  joined_of(pool, workspace_, layer.gate_up, rows, row_grain(2 * width), mlp_input, mlp_again, gate_up_.data());
  const auto gated = layer.activation == Activation::kSilu ? math.swiglu : math.geglu;
  auto activated = [&](int64_t r) {
    float* gate = gate_up_.data() + r * 2 * intermediate;
    float* out = middle_.data() + r * intermediate;
    if (layer.gate_up_bias != nullptr) add(layer.gate_up_bias, 2 * intermediate, gate);
    gated(gate, gate + intermediate, static_cast<int>(intermediate), out);
    lap(Part::kActivation);
    return out;
  };
  linear_of(pool, workspace_, layer.down, rows, row_grain(kExponentials * intermediate), activated, projected_.data(), width);
  for_rows(pool, rows, width, [&](int64_t r) {
    add_row(r, layer.down_bias, layer.mlp_out_norm);
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

// RMSNorm of rows [rows, width], or LayerNorm where `centred`; bias may be null, and is where not centred.
void dovetail_normalise(const float* x, const float* weight, const float* bias, int centred, float epsilon, int64_t rows, int64_t width, float* out) {
  const LayerMath& math = layer_math();
  const int count = static_cast<int>(width);
  for (const float* const end = x + rows * width; x < end; x += width, out += width)
    centred ? math.centre(x, weight, bias, epsilon, count, out) : math.normalise(x, weight, epsilon, count, out);
}
}
#pragma GCC visibility pop
