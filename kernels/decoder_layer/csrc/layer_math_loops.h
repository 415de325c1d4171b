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

void rotate(float* x, const float* cosine, const float* sine, int width) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[half + i];
    x[i] = first * cosine[i] - second * sine[i];
    x[half + i] = second * cosine[half + i] + first * sine[half + i];
  }
}

inline Vec silu_times(Vec gate, Vec up) {
  const Vec falling = exponential2(multiply(gate, broadcast(-kLog2E)));
  return multiply(divide(gate, add(broadcast(1.0f), falling)), up);
}

void swiglu(const float* gate, const float* up, int width, float* out) {
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, silu_times(load(gate + i), load(up + i)));
  if (i == width) return;
  float last[3][kLanes] = {};
  const size_t left = static_cast<size_t>(width - i) * sizeof(float);
  std::memcpy(last[0], gate + i, left);
  std::memcpy(last[1], up + i, left);
  store(last[2], silu_times(load(last[0]), load(last[1])));
  std::memcpy(out + i, last[2], left);
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
