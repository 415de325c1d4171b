// Dot products over words: a word is what one lane of a product takes in one step, an fp32 number or a pair of bf16 numbers.
// Included by layer_math.cpp once for each instruction set, after vec16.h.
struct Fp32Words {
  static constexpr int kPack = 1;  // numbers in a word
  using Operand = Vec;
  static Operand load_words(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Operand broadcast_word(const uint32_t* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return broadcast(x);
  }
  static Vec dot(Operand a, Operand b, Vec sum) { return multiply_add(a, b, sum); }
  // Numbers in order to words in order.
  static void from_floats(const float* from, int count, uint32_t* to) { std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); }
  // The columns of one row, as the words that hold them.
  template <bool Both>
  static void join_rows(const uint32_t* row, const uint32_t*, int width, uint32_t* to) {
    std::memcpy(to, row, static_cast<size_t>(width) * sizeof(float));
  }
  static void widen_rows(const void* from, CacheFormat format, int64_t first, int64_t count, uint32_t* to) {
    float* out = reinterpret_cast<float*>(to);
    if (format == CacheFormat::kBf16) {
      const uint16_t* rows = static_cast<const uint16_t*>(from) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = bits_float(uint32_t{rows[i]} << 16);
    } else if (format == CacheFormat::kInt8) {
      const int8_t* rows = static_cast<const int8_t*>(from) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(rows[i]);
    } else {
      std::memcpy(out, static_cast<const float*>(from) + first, static_cast<size_t>(count) * sizeof(float));
    }
  }
  static bool holds(CacheFormat format) { return format == CacheFormat::kFp32; }
};

#ifdef DOVETAIL_BF16_DOTS
struct Interleaving {  // of 32 columns of two rows: where each 16-bit half of each word comes from
  alignas(64) uint16_t low[32];
  alignas(64) uint16_t high[32];
  constexpr Interleaving() : low(), high() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<uint16_t>(low[i] + 16);
    }
  }
};

struct Bf16Words {
  static constexpr int kPack = 2;
  using Operand = __m512bh;
  static Operand load_words(const uint32_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Operand broadcast_word(const uint32_t* p) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(*p))); }
  static Vec dot(Operand a, Operand b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
  static void from_floats(const float* from, int count, uint32_t* to) {
    int i = 0;
    for (; i + 32 <= count; i += 32) _mm512_storeu_si512(to + i / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i))));
    for (; i < count; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i))));
  }
  // Two rows into words of one column each; where not Both, zeros stand for the second.
  template <bool Both>
  static void join_rows(const uint32_t* row, const uint32_t* second, int width, uint32_t* to) {
    alignas(64) static constexpr Interleaving order;
    const __m512i low = _mm512_load_si512(order.low);
    const __m512i high = _mm512_load_si512(order.high);
    int i = 0;
    for (; i + 32 <= width; i += 32) {
      const __m512i even = _mm512_loadu_si512(row + i / 2);
      const __m512i odd = Both ? _mm512_loadu_si512(second + i / 2) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(even, high, odd));
    }
    for (; i < width; ++i) to[i] = column(row, i) | (Both ? column(second, i) << 16 : 0);
  }
  static uint32_t column(const uint32_t* row, int i) { return row[i / 2] >> i % 2 * 16 & 0xffffu; }
  // Whole numbers up to 127 are exact in bf16.
  static void widen_rows(const void* from, CacheFormat format, int64_t first, int64_t count, uint32_t* to) {
    if (format == CacheFormat::kBf16) {
      std::memcpy(to, static_cast<const uint16_t*>(from) + first, static_cast<size_t>(count) * 2);
      return;
    }
    const int8_t* rows = static_cast<const int8_t*>(from) + first;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) _mm512_storeu_si512(to + i / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(whole(rows + i + 16), whole(rows + i))));
    for (; i < count; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(whole(rows + i))));
  }
  static __m512 whole(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static bool holds(CacheFormat format) { return format == CacheFormat::kBf16; }
};
#endif

#if DOVETAIL_VECTOR == 512
// 16 keys of 16 words, `stride` words from key to key, turned: out[word * kKeyBlock + key].
inline void transpose_square(const uint32_t* from, int64_t stride, uint32_t* out) {
  __m512i row[16], pair[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // row[4 g + i]: word i, i + 4, i + 8, i + 12 of keys 4 g .. 4 g + 3
    const __m512i even = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd);
    const __m512i later_even = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88);
    const __m512i later_odd = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
    _mm512_storeu_si512(out + i * kKeyBlock, _mm512_shuffle_i32x4(even, later_even, 0x88));
    _mm512_storeu_si512(out + (8 + i) * kKeyBlock, _mm512_shuffle_i32x4(even, later_even, 0xdd));
    _mm512_storeu_si512(out + (4 + i) * kKeyBlock, _mm512_shuffle_i32x4(odd, later_odd, 0x88));
    _mm512_storeu_si512(out + (12 + i) * kKeyBlock, _mm512_shuffle_i32x4(odd, later_odd, 0xdd));
  }
}
#else
inline void transpose_square(const uint32_t* from, int64_t stride, uint32_t* out) {
  for (int key = 0; key < 16; ++key)
    for (int word = 0; word < 16; ++word) out[word * kKeyBlock + key] = from[key * stride + word];
}
#endif

// c[Rows][Vectors * 16] = c * keep[row] + a x b over `steps` words, or without the first term where Fresh. Each sum runs over
// the steps upwards, whatever Rows is.
template <typename Words, int Rows, int Vectors, bool Fresh>
inline void multiply_tile(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int steps, const float* keep, float* c, int64_t c_stride) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[r][j] = Fresh ? broadcast(0.0f) : multiply(load(c + r * c_stride + j * 16), broadcast(keep[r]));
  for (int step = 0; step < steps; ++step) {
    typename Words::Operand value[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) value[j] = Words::load_words(b + step * b_stride + j * 16);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const typename Words::Operand factor = Words::broadcast_word(a + r * a_stride + step);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[r][j] = Words::dot(value[j], factor, sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(c + r * c_stride + j * 16, sum[r][j]);
}

template <typename Words, int Rows, bool Fresh>
inline void multiply_rows(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int steps, const float* keep, float* c, int64_t c_stride, int lanes) {
  constexpr int wide = kVectorsTogether * 16;
  int lane = 0;
  for (; lane + wide <= lanes; lane += wide)
    multiply_tile<Words, Rows, kVectorsTogether, Fresh>(a, a_stride, b + lane, b_stride, steps, keep, c + lane, c_stride);
  for (; lane < lanes; lane += 16) multiply_tile<Words, Rows, 1, Fresh>(a, a_stride, b + lane, b_stride, steps, keep, c + lane, c_stride);
}

// The same for 1 to kRowsTogether rows.
template <typename Words, bool Fresh>
inline void multiply(int rows, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int steps, const float* keep, float* c, int64_t c_stride, int lanes) {
  if constexpr (kRowsTogether >= 4) {
    if (rows == 4) return multiply_rows<Words, 4, Fresh>(a, a_stride, b, b_stride, steps, keep, c, c_stride, lanes);
    if (rows == 3) return multiply_rows<Words, 3, Fresh>(a, a_stride, b, b_stride, steps, keep, c, c_stride, lanes);
  }
  if constexpr (kRowsTogether >= 2) {
    if (rows == 2) return multiply_rows<Words, 2, Fresh>(a, a_stride, b, b_stride, steps, keep, c, c_stride, lanes);
  }
  multiply_rows<Words, 1, Fresh>(a, a_stride, b, b_stride, steps, keep, c, c_stride, lanes);
}
