// Sixteen floats, in whatever registers the instruction set has. Included by layer_math.cpp once for each instruction set,
// inside its namespace and its target pragma; DOVETAIL_VECTOR says which.
//
// maximum(a, b) gives b where either is NaN. kRowsTogether x kVectorsTogether sums fill the registers of a product.
#if DOVETAIL_VECTOR == 512
struct Vec {
  __m512 v;
};
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float largest_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec whole_part(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// y * 2^k for whole k
inline Vec scale_by_power(Vec y, Vec k) { return {_mm512_scalef_ps(y.v, k.v)}; }
constexpr int kRowsTogether = 4;
constexpr int kVectorsTogether = 4;
#elif DOVETAIL_VECTOR == 256
struct Vec {
  __m256 v[2];
};
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}; }
inline Vec subtract(Vec a, Vec b) { return {_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}; }
inline Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}; }
inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}; }
inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}; }
inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])};
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float largest_lane(Vec a) {
  const __m256 eight = _mm256_max_ps(a.v[0], a.v[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Vec whole_part(Vec x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.v[0], nearest), _mm256_round_ps(x.v[1], nearest)};
}
inline Vec scale_by_power(Vec y, Vec k) {
  for (int i = 0; i < 2; ++i) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(k.v[i]), 23);
    y.v[i] = _mm256_mul_ps(y.v[i], _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000))));
  }
  return y;
}
constexpr int kRowsTogether = 2;
constexpr int kVectorsTogether = 2;
#else
struct Vec {
  float v[16];
};
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec broadcast(float x) {
  Vec a;
  for (float& lane : a.v) lane = x;
  return a;
}
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec subtract(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
inline Vec multiply(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Vec divide(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
inline Vec maximum(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Vec minimum(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
inline float largest_lane(Vec a) {
  float largest = a.v[0];
  for (float lane : a.v) largest = lane > largest ? lane : largest;
  return largest;
}
// Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
inline Vec whole_part(Vec x) {
  for (float& lane : x.v) lane = (lane + 12582912.0f) - 12582912.0f;
  return x;
}
inline Vec scale_by_power(Vec y, Vec k) {
  for (int i = 0; i < 16; ++i) y.v[i] *= bits_float((float_bits(k.v[i] + 12582912.0f) << 23) + 0x3f800000u);
  return y;
}
constexpr int kRowsTogether = 1;
constexpr int kVectorsTogether = 1;
#endif

// (2^x - 1) / x for x from -0.5 to 0.5, a polynomial fitted there.
inline Vec slope_of_power(Vec x) {
  Vec y = broadcast(1.326472731e-3f);
  y = multiply_add(y, x, broadcast(9.671512991e-3f));
  y = multiply_add(y, x, broadcast(5.550733581e-2f));
  y = multiply_add(y, x, broadcast(2.402224243e-1f));
  return multiply_add(y, x, broadcast(6.931470037e-1f));
}

// 2^x to 2e-7 relative for x from -125 to 127, clamped beyond; NaN stays NaN. Exactly 1 at 0. Without branches or tables: the
// whole part moves the exponent, the polynomial takes the rest.
inline Vec exponential2(Vec x) {
  x = minimum(broadcast(127.0f), maximum(broadcast(-125.0f), x));
  const Vec whole = whole_part(x);
  const Vec rest = subtract(x, whole);
  return scale_by_power(multiply_add(slope_of_power(rest), rest, broadcast(1.0f)), whole);
}
constexpr float kLog2E = 1.44269504f;

// tanh(x) to 1e-6 relative, by way of e = exp(2 x) - 1, which is summed so that small x lose nothing: e / (e + 2).
inline Vec hyperbolic_tangent(Vec x) {
  const Vec doubled = minimum(broadcast(60.0f), maximum(broadcast(-60.0f), multiply(x, broadcast(2.0f * kLog2E))));
  const Vec whole = whole_part(doubled);
  const Vec rest = subtract(doubled, whole);
  const Vec power = scale_by_power(broadcast(1.0f), whole);
  const Vec e = multiply_add(multiply(slope_of_power(rest), rest), power, subtract(power, broadcast(1.0f)));
  return divide(e, add(e, broadcast(2.0f)));
}
