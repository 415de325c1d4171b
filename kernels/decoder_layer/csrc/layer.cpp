// Decoder layers (RMSNorm, grouped attention with rope over KV slots, SwiGLU) for the rows of several slots in one call.
#include "layer.h"

#include <algorithm>
#include <cstring>

#include "encode.h"

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

void store(const float* from, int width, bool bf16, void* to, int64_t at) {
  if (bf16) {
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    for (int i = 0; i < width; ++i) out[i] = round_bf16(from[i]);
  } else {
    std::memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace

// Notes where the rows go and which attend together. A thread takes whole segments and key heads; where there are fewer of
// those than threads, a segment's rows are shared out too, though each part then reads the keys for itself.
void Runner::cut(const Pass& pass, int num_kv_heads, int threads) {
  places_.clear();
  pieces_.clear();
  const int64_t tasks = int64_t{pass.num_segments} * num_kv_heads;
  const int64_t wanted = (threads + tasks - 1) / tasks;
  int64_t row_of_pass = 0;
  for (const Segment* s = pass.segments; s < pass.segments + pass.num_segments; ++s) {
    for (int row = 0; row < s->num_rows; ++row) places_.push_back({s->slot, s->prefix + s->tail - s->num_rows + row});
    const int parts = static_cast<int>(std::min<int64_t>(wanted, s->num_rows));
    for (int part = 0; part < parts; ++part) {
      const int first = s->num_rows * part / parts;
      const int rows = s->num_rows * (part + 1) / parts - first;
      Segment piece{s->slot, s->prefix, rows, s->tail, s->mask};
      if (s->mask == nullptr) {  // earlier rows count as prefix: all keys are written before any is read
        piece.prefix += s->tail - s->num_rows + first;
        piece.tail = rows;
      } else {
        piece.mask += int64_t{first} * s->tail;
      }
      pieces_.push_back({piece, row_of_pass + first});
    }
    row_of_pass += s->num_rows;
  }
}

// Norms and rotates queries and keys; writes keys and values to their slots. Queries stay in qkv_, scaled.
void Runner::place_rows(Pool& pool, const Layer& layer, const Pass& pass, void* keys, void* values) {
  const LayerMath& math = layer_math();
  const int width = layer.head_dim;
  for_rows(pool, pass.num_rows, layer.qkv.out, [&](int64_t r) {
    float* row = qkv_.data() + r * layer.qkv.out;
    const int64_t angles = int64_t{pass.positions[r]} * layer.rotary_dim;
    if (layer.qkv_bias != nullptr) add(layer.qkv_bias, layer.qkv.out, row);
    for (int head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
      float* x = row + head * width;
      const bool is_query = head < layer.num_heads;
      const float* norm = is_query ? layer.query_norm : layer.key_norm;
      if (norm != nullptr) math.normalise(x, norm, layer.epsilon, width, x);
      math.rotate(x, pass.cosine + angles, pass.sine + angles, layer.rotary_dim);
      for (int i = 0; is_query && i < width; ++i) x[i] *= layer.scale;
    }
    for (int head = 0; head < layer.num_kv_heads; ++head) {
      const int64_t at = ((places_[r].slot * layer.num_kv_heads + head) * pass.capacity + places_[r].position) * width;
      const float* key = row + (layer.num_heads + head) * width;
      store(key, width, pass.bf16 != 0, keys, at);
      store(key + layer.num_kv_heads * width, width, pass.bf16 != 0, values, at);
    }
  });
}

void Runner::attend(Pool& pool, const Layer& layer, const Pass& pass, const void* keys, const void* values) {
  const LayerMath& math = layer_math();
  const int group = layer.num_heads / layer.num_kv_heads;
  const int64_t stride = layer.qkv.out;
  // A row's attended heads take the place of its queries: a task reads all of its queries before it writes.
  auto body = [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    for (int64_t item = begin; item < end; ++item) {
      const auto& [s, first] = pieces_[item / layer.num_kv_heads];
      const int64_t head = item % layer.num_kv_heads;
      const int64_t at = (s.slot * layer.num_kv_heads + head) * pass.capacity * layer.head_dim * (pass.bf16 ? 2 : 4);
      float* rows = qkv_.data() + first * stride + head * group * layer.head_dim;
      const AttendTask task{static_cast<const uint8_t*>(keys) + at, static_cast<const uint8_t*>(values) + at, pass.bf16 != 0,
                            layer.head_dim, s.prefix, s.tail, s.num_rows, s.mask, group, rows, rows, stride};
      const size_t wanted = static_cast<size_t>(attend_scratch(task));
      if (scratch.size() < wanted) scratch.resize(wanted);
      math.attend(task, scratch.data());
    }
  };
  pool.run(static_cast<int64_t>(pieces_.size()) * layer.num_kv_heads, 1, body);
}

void Runner::run_layer(Pool& pool, const Layer& layer, const Pass& pass, uint8_t* keys, uint8_t* values, float* hidden) {
  const LayerMath& math = layer_math();
  const int64_t rows = pass.num_rows;
  const int64_t width = layer.qkv.in;
  const int64_t intermediate = layer.down.in;
  auto normal = [&](int64_t r, const float* norm) {
    float* out = normal_.data() + r * width;
    math.normalise(hidden + r * width, norm, layer.epsilon, static_cast<int>(width), out);
    return out;
  };
  auto attention_input = [&](int64_t r) { return layer.input_norm == nullptr ? hidden + r * width : normal(r, layer.input_norm); };
  linear_of(pool, workspace_, layer.qkv, rows, row_grain(2 * width), attention_input, qkv_.data(), layer.qkv.out);
  place_rows(pool, layer, pass, keys, values);
  attend(pool, layer, pass, keys, values);
  auto attended = [&](int64_t r) { return qkv_.data() + r * layer.qkv.out; };
  linear_of(pool, workspace_, layer.output, rows, row_grain(layer.output.in), attended, projected_.data(), width);
  auto mlp_input = [&](int64_t r) {
    add_with_bias(projected_.data() + r * width, layer.output_bias, width, hidden + r * width);
    return normal(r, layer.post_norm);
  };
  linear_of(pool, workspace_, layer.gate_up, rows, row_grain(2 * width), mlp_input, gate_up_.data(), 2 * intermediate);
  auto activated = [&](int64_t r) {
    float* gate = gate_up_.data() + r * 2 * intermediate;
    float* out = middle_.data() + r * intermediate;
    if (layer.gate_up_bias != nullptr) add(layer.gate_up_bias, 2 * intermediate, gate);
    math.swiglu(gate, gate + intermediate, static_cast<int>(intermediate), out);
    return out;
  };
  linear_of(pool, workspace_, layer.down, rows, row_grain(kExponentials * intermediate), activated, projected_.data(), width);
  for_rows(pool, rows, width, [&](int64_t r) { add_with_bias(projected_.data() + r * width, layer.down_bias, width, hidden + r * width); });
}

void Runner::run(Pool& pool, const Layer* layers, int64_t num_layers, const Pass& pass, const Slots& slots, float* hidden) {
  if (num_layers == 0 || pass.num_rows == 0) return;
  const size_t rows = static_cast<size_t>(pass.num_rows);
  cut(pass, layers[0].num_kv_heads, pool.threads());
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[i];
    normal_.resize(rows * layer.qkv.in);
    qkv_.resize(rows * layer.qkv.out);
    projected_.resize(rows * layer.output.out);
    gate_up_.resize(rows * layer.gate_up.out);
    middle_.resize(rows * layer.down.in);
    run_layer(pool, layer, pass, slots.keys + i * slots.layer_bytes, slots.values + i * slots.layer_bytes, hidden);
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
  const std::lock_guard<std::mutex> lock(pool.caller());
  runner->run(pool, layers, num_layers, *pass, *slots, hidden);
}

// RMSNorm of rows [rows, width].
void dovetail_normalise(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) layer_math().normalise(x + r * width, weight, epsilon, static_cast<int>(width), out + r * width);
}
}
#pragma GCC visibility pop
