// AVX2 with FMA and F16C: 16-bit products of u8 x s8 (vpmaddubsw), summed to int32; bf16 weights widened to fp32.
#include "encode.h"
#include "prefetch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))

namespace dovetail {
namespace {

constexpr int kQuarter = 8;  // output rows of one 32-byte vector of sums
constexpr int kQuarters = kPanel / kQuarter;

TARGET void encode(const float* x, const Packed& w, int width, int t, const Activations& tile) { encode_row(x, w, width, t, tile); }

TARGET DOVETAIL_INLINE __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

TARGET DOVETAIL_INLINE __m256i broadcast(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Eight scales or minima from the one for row `row` of the panel on.
TARGET DOVETAIL_INLINE __m256 scales_at(const uint8_t* scales, int bytes, int row) {
  if (bytes == 4) return _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + row);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + row * 2)));
}

// Products of signed weights with the bytes at `x`, four columns: |weight| times the activation with the weight's sign.
template <int U>
TARGET DOVETAIL_INLINE void dot_signed(__m256i (&d)[U], __m256i weight, const uint8_t* x) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i magnitude = _mm256_abs_epi8(weight);
  for (int u = 0; u < U; ++u) {
    const __m256i value = _mm256_sign_epi8(broadcast(x + u * kChunk), weight);
    d[u] = _mm256_add_epi32(d[u], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, value), ones));
  }
}

// Up to a chunk's columns of one quarter panel for U rows. The 16-bit sums cannot overflow: int4 adds 8 pairs of products of at
// most 2 * 15 * 127, together 30480; int8 and tables add one pair of at most 2 * 128 * 127.
template <int Bits, Kind K, int U>
TARGET DOVETAIL_INLINE void dot_columns(__m256i (&d)[U], const uint8_t* w, const uint8_t* x, int columns, __m256i table) {
  const __m256i nibble = _mm256_set1_epi8(15);
  if constexpr (K == kTable) {
    for (int k = 0; k < columns; k += 8, w += kPanel * 4) {
      const __m256i codes = load(w);
      dot_signed<U>(d, _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble)), x + k);
      dot_signed<U>(d, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)), x + k + 4);
    }
  } else if constexpr (Bits == 4) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i pairs[U];
    for (int u = 0; u < U; ++u) pairs[u] = _mm256_setzero_si256();
    for (int k = 0; k < columns; k += 8, w += kPanel * 4) {
      const __m256i codes = load(w);
      const __m256i low = _mm256_and_si256(codes, nibble);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
      for (int u = 0; u < U; ++u) {
        const uint8_t* at = x + u * kChunk + k;
        pairs[u] = _mm256_add_epi16(pairs[u], _mm256_maddubs_epi16(low, broadcast(at)));
        pairs[u] = _mm256_add_epi16(pairs[u], _mm256_maddubs_epi16(high, broadcast(at + 4)));
      }
    }
    for (int u = 0; u < U; ++u) d[u] = _mm256_add_epi32(d[u], _mm256_madd_epi16(pairs[u], ones));
  } else {
    const __m256i middle = _mm256_set1_epi8(-128);
    for (int k = 0; k < columns; k += 4, w += kPanel * 4) dot_signed<U>(d, _mm256_xor_si256(load(w), middle), x + k);
  }
}

// What the int32 sums start from. The int8 products are those of code - 128, which the offset of symmetric weights stands for.
template <int Bits, Kind K>
TARGET DOVETAIL_INLINE int32_t first_sum(int32_t offset) {
  if constexpr (K == kTable) return 0;
  if constexpr (K == kMinimum) return Bits == 8 ? 128 * static_cast<int32_t>(bits_float(static_cast<uint32_t>(offset))) : 0;
  return Bits == 8 ? 0 : offset - kWhole;
}

template <int Bits, Kind K, int T, int U>
TARGET DOVETAIL_INLINE void quarter_rows(const Step& s, int quarter, int first) {
  const int columns = s.group < kChunk ? s.group : kChunk;
  const int bytes = kPanel * columns * Bits / 8;
  const __m256i table =
      K == kTable ? _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.table))) : _mm256_setzero_si256();
  const uint8_t* w = s.weights;
  const float* activation_scale = s.scales + first;
  __m256 sum[U];
  for (int u = 0; u < U; ++u) sum[u] = _mm256_setzero_ps();
  for (int g = 0; g < s.groups(); ++g) {
    const int32_t* offset = s.offsets + g * T + first;
    const uint8_t* x = s.group_values(g, T) + first * kChunk;
    __m256i d[U];
    for (int u = 0; u < U; ++u) d[u] = _mm256_set1_epi32(first_sum<Bits, K>(offset[u]));
    for (int k = 0; k < s.group; k += columns, w += bytes, x += T * kChunk) {
      if (first == 0) prefetch_ahead(w + quarter * (bytes / kQuarters), bytes / kQuarters);
      dot_columns<Bits, K, U>(d, w + quarter * 32, x, columns, table);
    }
    if (first == 0 && quarter == 0) prefetch_ahead(w, kPanel * s.scale_bytes * (K == kMinimum ? 2 : 1));
    const __m256 scale = scales_at(w, s.scale_bytes, quarter * kQuarter);
    for (int u = 0; u < U; ++u) sum[u] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d[u]), scale, sum[u]);
    w += kPanel * s.scale_bytes;
    if constexpr (K == kMinimum) {
      const __m256 minimum = scales_at(w, s.scale_bytes, quarter * kQuarter);
      for (int u = 0; u < U; ++u) sum[u] = _mm256_fmadd_ps(minimum, _mm256_castsi256_ps(_mm256_set1_epi32(offset[u])), sum[u]);
      w += kPanel * s.scale_bytes;
    }
    if (!s.ends_span(g)) continue;
    for (int u = 0; u < U; ++u) {
      float* out = s.sums + (first + u) * kPanel + quarter * kQuarter;
      _mm256_storeu_ps(out, _mm256_fmadd_ps(sum[u], _mm256_set1_ps(activation_scale[u]), _mm256_loadu_ps(out)));
      sum[u] = _mm256_setzero_ps();
    }
    activation_scale += T;
  }
}

template <int Bits, Kind K, int T>
TARGET void step_integer(const Step& s) {
  constexpr int at_once = 4;  // sums, 16-bit sums and codes of more rows do not fit sixteen registers
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    if constexpr (T >= at_once) quarter_rows<Bits, K, T, at_once>(s, quarter, 0);
    if constexpr (T == 2 * at_once) quarter_rows<Bits, K, T, at_once>(s, quarter, at_once);
    if constexpr (T % at_once != 0) quarter_rows<Bits, K, T, T % at_once>(s, quarter, T - T % at_once);
  }
}

// Two columns of bf16 weights at a time: the even one is the low half of each word, the odd one the high half.
template <int T, int U>
TARGET DOVETAIL_INLINE void bf16_rows(const Step& s, int first) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    const uint8_t* w = s.weights + quarter * 32;
    const uint8_t* x = s.values + first * kChunk * 2;
    float* out = s.sums + first * kPanel + quarter * kQuarter;
    __m256 sum[U];
    for (int u = 0; u < U; ++u) sum[u] = _mm256_loadu_ps(out + u * kPanel);
    for (int c = 0; c < s.chunks; ++c, x += T * kChunk * 2) {
      constexpr int share = kPanel * kChunk * 2 / kQuarters;
      if (first == 0) prefetch_ahead(w + quarter * (share - 32), share);
      for (int k = 0; k < kChunk; k += 2, w += kPanel * 4) {
        const __m256i pair = load(w);
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
        for (int u = 0; u < U; ++u) {
          const __m256i value = broadcast(x + (u * kChunk + k) * 2);
          sum[u] = _mm256_fmadd_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(value, 16)), sum[u]);
          sum[u] = _mm256_fmadd_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(value, high)), sum[u]);
        }
      }
    }
    for (int u = 0; u < U; ++u) _mm256_storeu_ps(out + u * kPanel, sum[u]);
  }
}

template <int T, int U>
TARGET DOVETAIL_INLINE void fp32_rows(const Step& s, int first) {
  for (int half = 0; half < 2; ++half) {
    const float* w = reinterpret_cast<const float*>(s.weights) + half * kHalf;
    const float* x = reinterpret_cast<const float*>(s.values) + first * kChunk;
    float* out = s.sums + first * kPanel + half * kHalf;
    __m256 sum[2][U];
    for (int u = 0; u < U; ++u)
      for (int i = 0; i < 2; ++i) sum[i][u] = _mm256_loadu_ps(out + u * kPanel + i * kQuarter);
    for (int c = 0; c < s.chunks; ++c, x += T * kChunk) {
      constexpr int share = kPanel * kChunk * 4 / 2;
      if (first == 0) prefetch_ahead(reinterpret_cast<const uint8_t*>(w - half * kHalf) + half * share, share);
      for (int k = 0; k < kChunk; ++k, w += kPanel) {
        const __m256 upper = _mm256_loadu_ps(w);
        const __m256 lower = _mm256_loadu_ps(w + kQuarter);
        for (int u = 0; u < U; ++u) {
          const __m256 value = _mm256_set1_ps(x[u * kChunk + k]);
          sum[0][u] = _mm256_fmadd_ps(upper, value, sum[0][u]);
          sum[1][u] = _mm256_fmadd_ps(lower, value, sum[1][u]);
        }
      }
    }
    for (int u = 0; u < U; ++u)
      for (int i = 0; i < 2; ++i) _mm256_storeu_ps(out + u * kPanel + i * kQuarter, sum[i][u]);
  }
}

template <int T>
TARGET void step_bf16(const Step& s) {
  if constexpr (T >= 4) bf16_rows<T, 4>(s, 0);
  if constexpr (T == 8) bf16_rows<T, 4>(s, 4);
  if constexpr (T % 4 != 0) bf16_rows<T, T % 4>(s, T - T % 4);
}

template <int T>
TARGET void step_fp32(const Step& s) {
  if constexpr (T >= 4) fp32_rows<T, 4>(s, 0);
  if constexpr (T == 8) fp32_rows<T, 4>(s, 4);
  if constexpr (T % 4 != 0) fp32_rows<T, T % 4>(s, T - T % 4);
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

const InstructionSet kAvx2 = {"avx2", supported, encode, DOVETAIL_STEPS};

}  // namespace

const InstructionSet* avx2() { return &kAvx2; }

}  // namespace dovetail
#else
namespace dovetail {
const InstructionSet* avx2() { return nullptr; }
}  // namespace dovetail
#endif
