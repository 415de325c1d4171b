// The loops of layer_math.h over Vec. Included by layer_math.cpp once for each instruction set, after vec16.h.

inline float add_lanes(const float* lanes) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the low bits.
inline int8_t nearest(float x) { return static_cast<int8_t>(static_cast<int32_t>(float_bits(x + 12582912.0f)) - 0x4b400000); }

void normalise(const float* x, const float* weight, float epsilon, int width, float* out) {
  float squares[kLanes] = {};
  int i = 0;
  Vec sum = load(squares);
  for (; i + kLanes <= width; i += kLanes) sum = multiply_add(load(x + i), load(x + i), sum);
  store(squares, sum);
  for (int lane = 0; i + lane < width; ++lane) squares[lane] = multiply_add(x[i + lane], x[i + lane], squares[lane]);
  const float inverse = 1.0f / std::sqrt(add_lanes(squares) / static_cast<float>(width) + epsilon);
  for (int j = 0; j < width; ++j) out[j] = weight[j] * (x[j] * inverse);
}

void centre(const float* x, const float* weight, const float* bias, float epsilon, int width, float* out) {
  float sums[kLanes] = {};
  for (int i = 0; i < width; ++i) sums[i % kLanes] += x[i];
  const float mean = add_lanes(sums) / static_cast<float>(width);
  for (int i = 0; i < width; ++i) out[i] = x[i] - mean;
  normalise(out, weight, epsilon, width, out);
  for (int i = 0; bias != nullptr && i < width; ++i) out[i] += bias[i];
}

void rotate(float* x, const float* cosine, const float* sine, int width) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[half + i];
    x[i] = first * cosine[i] - second * sine[i];
    x[half + i] = second * cosine[half + i] + first * sine[half + i];
  }
}

// Up to kLanes floats of the `left` that remain; `rest` stands for what is missing.
inline Vec load_some(const float* p, int64_t left, float rest = 0.0f) {
  if (left >= kLanes) return load(p);
  float lanes[kLanes];
  store(lanes, broadcast(rest));
  std::memcpy(lanes, p, static_cast<size_t>(left) * sizeof(float));
  return load(lanes);
}

inline void store_some(float* p, int64_t left, Vec a) {
  if (left >= kLanes) return store(p, a);
  float lanes[kLanes];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(left) * sizeof(float));
}

// x * sigmoid(gate)
inline Vec gated(Vec x, Vec gate) { return divide(x, add(broadcast(1.0f), exponential2(multiply(gate, broadcast(-kLog2E))))); }

void swiglu(const float* gate, const float* up, int width, float* out) {
  for (int i = 0; i < width; i += kLanes) {
    const Vec x = load_some(gate + i, width - i);
    store_some(out + i, width - i, multiply(gated(x, x), load_some(up + i, width - i)));
  }
}

// gelu(x) = x / 2 * (1 + tanh(z)) = x * sigmoid(2 z) with z = sqrt(2 / pi) * (x + 0.044715 x^3).
void geglu(const float* gate, const float* up, int width, float* out) {
  constexpr float kTwoRootTwoOverPi = 1.59576912f;
  for (int i = 0; i < width; i += kLanes) {
    const Vec x = load_some(gate + i, width - i);
    const Vec bent = multiply_add(multiply(multiply(x, x), x), broadcast(0.044715f), x);
    store_some(out + i, width - i, multiply(gated(x, multiply(bent, broadcast(kTwoRootTwoOverPi))), load_some(up + i, width - i)));
  }
}

void silu(float* x, int width) {
  for (int i = 0; i < width; i += kLanes) {
    const Vec part = load_some(x + i, width - i);
    store_some(x + i, width - i, gated(part, part));
  }
}

void blend(const float* gate, const float* first, const float* second, int width, float* out) {
  for (int i = 0; i < width; i += kLanes) {
    const Vec base = load_some(second + i, width - i);
    const Vec change = subtract(load_some(first + i, width - i), base);
    store_some(out + i, width - i, add(base, gated(change, load_some(gate + i, width - i))));
  }
}

float log_sum_exp(const float* x, int64_t count) {
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  Vec highest = broadcast(nothing);
  for (int64_t i = 0; i < count; i += kLanes) highest = maximum(load_some(x + i, count - i, nothing), highest);
  const float largest = largest_lane(highest);
  Vec sum = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec below = subtract(load_some(x + i, count - i, nothing), broadcast(largest));
    sum = add(sum, exponential2(multiply(below, broadcast(kLog2E))));
  }
  float sums[kLanes];
  store(sums, sum);
  return largest + std::log(add_lanes(sums));
}

void store_row(const float* from, int width, CacheFormat format, void* to, float* scale) {
  if (format == CacheFormat::kFp32) {
    std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
  } else if (format == CacheFormat::kBf16) {
    for (int i = 0; i < width; ++i) static_cast<uint16_t*>(to)[i] = round_bf16(from[i]);
  } else {
    const uint32_t bits = largest_magnitude(from, width);
    const float largest = bits_float(bits);
    const bool finite = bits < 0x7f800000u;
    const float inverse = finite && largest > kTiny ? 127.0f / largest : 0.0f;
    *scale = finite ? (largest > kTiny ? largest / 127.0f : 0.0f) : bits_float(0x7fc00000u);
    for (int i = 0; i < width; ++i) static_cast<int8_t*>(to)[i] = inverse == 0.0f ? int8_t{0} : nearest(from[i] * inverse);
  }
}
