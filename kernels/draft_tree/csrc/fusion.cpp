#include "fusion.h"

#include <cstring>

#include "layer.h"
#include "layer_math.h"

namespace dovetail {

// z h1 + (1 - z) h2 with h1 = W1 f, h2 = silu(W2 norm(e)), z = sigmoid(Wz [h1; h2]).
void Fuser::gated(Pool& pool, const Fusion& fusion, const float* features, const float* embeddings, int64_t rows, float* out) {
  const LayerMath& math = layer_math();
  const int64_t width = fusion.feature.in;
  const int narrow = static_cast<int>(width);
  normal_.resize(static_cast<size_t>(rows * width));
  joined_.resize(static_cast<size_t>(2 * rows * width));
  gate_.resize(static_cast<size_t>(rows * width));
  float* joined = joined_.data();
  auto feature = [&](int64_t r) { return features + r * width; };
  linear_of(pool, workspace_, fusion.feature, rows, row_grain(width), feature, joined, 2 * width);
  auto token = [&](int64_t r) {
    math.normalise(embeddings + r * width, fusion.token_norm, fusion.epsilon, narrow, normal_.data() + r * width);
    return normal_.data() + r * width;
  };
  linear_of(pool, workspace_, fusion.token, rows, row_grain(width), token, joined + width, 2 * width);
  auto branches = [&](int64_t r) {
    math.silu(joined + r * 2 * width + width, narrow);
    return joined + r * 2 * width;
  };
  linear_of(pool, workspace_, fusion.gate, rows, row_grain(4 * width), branches, gate_.data(), width);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = joined + r * 2 * width;
    math.blend(gate_.data() + r * width, row, row + width, narrow, out + r * width);
  }
}

void Fuser::run(Pool& pool, const Fusion& fusion, const float* features, const float* embeddings, int64_t rows, float* out) {
  if (fusion.gated != 0) return gated(pool, fusion, features, embeddings, rows, out);
  const int64_t width = fusion.feature.out;
  joined_.resize(static_cast<size_t>(2 * rows * width));
  auto joined = [&](int64_t r) {
    float* row = joined_.data() + r * 2 * width;
    std::memcpy(row, embeddings + r * width, static_cast<size_t>(width) * sizeof(float));
    std::memcpy(row + width, features + r * width, static_cast<size_t>(width) * sizeof(float));
    return row;
  };
  linear_of(pool, workspace_, fusion.feature, rows, row_grain(2 * width), joined, out, width);
  for (int64_t i = 0; i < rows * width; ++i) out[i] += fusion.bias[i % width];
}

}  // namespace dovetail
