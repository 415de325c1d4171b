// Sixteen floats, in whatever registers the instruction set has. Included by layer_math.cpp once for each instruction set,
// inside its namespace and its target pragma; DOVETAIL_VECTOR says which.
#if DOVETAIL_VECTOR == 512
struct Vec {
  __m512 v;
};
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
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
inline Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])};
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
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
inline Vec multiply(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
constexpr int kRowsTogether = 1;
constexpr int kVectorsTogether = 1;
#endif
