// AVX-VNNI: the dot products of u8 x s8 on 32-byte vectors, for processors that have them without AVX-512 (Alder Lake and
// later). Floats and the encoding of activations are those of AVX2.
#include "encode.h"
#include "prefetch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))

namespace dovetail {
namespace {

constexpr int kQuarter = 8;  // output rows of one 32-byte vector of sums

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

// Both quarters of a half panel times the four columns at `x` of U rows: a broadcast feeds two dot products.
template <int U>
TARGET DOVETAIL_INLINE void dot(__m256i (&d)[2][U], __m256i upper, __m256i lower, const uint8_t* x) {
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    const __m256i value = broadcast(x + u * kChunk);
    d[0][u] = _mm256_dpbusd_avx_epi32(d[0][u], upper, value);
    d[1][u] = _mm256_dpbusd_avx_epi32(d[1][u], lower, value);
  }
}

// Up to a chunk's columns of a half panel for U rows.
template <int Bits, Kind K, int U>
TARGET DOVETAIL_INLINE void dot_columns(__m256i (&d)[2][U], const uint8_t* w, const uint8_t* x, int columns, __m256i table) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int k = 0; k < columns; k += Bits == 4 ? 8 : 4, w += kPanel * 4) {
    const __m256i upper = load(w);
    const __m256i lower = load(w + 32);
    if constexpr (Bits == 8) {
      dot<U>(d, upper, lower, x + k);
    } else {
      __m256i even[2] = {_mm256_and_si256(upper, nibble), _mm256_and_si256(lower, nibble)};
      __m256i odd[2] = {_mm256_and_si256(_mm256_srli_epi16(upper, 4), nibble), _mm256_and_si256(_mm256_srli_epi16(lower, 4), nibble)};
      if constexpr (K == kTable) {
        for (int quarter = 0; quarter < 2; ++quarter) {
          even[quarter] = _mm256_shuffle_epi8(table, even[quarter]);
          odd[quarter] = _mm256_shuffle_epi8(table, odd[quarter]);
        }
      }
      dot<U>(d, even[0], even[1], x + k);
      dot<U>(d, odd[0], odd[1], x + k + 4);
    }
  }
}

// One half of the panel for rows [first, first + U): exact int32 sums of each group, folded into the span's sums, which lie in
// L1 as those of the panel do, so that the registers belong to the int32 sums.
template <int Bits, Kind K, int T, int U>
TARGET DOVETAIL_INLINE void half_rows(const Step& s, int half, int first) {
  const int columns = s.group < kChunk ? s.group : kChunk;
  const int bytes = kPanel * columns * Bits / 8;
  const __m128i entries = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.table)), _mm_set1_epi8(-128));
  const __m256i table = _mm256_broadcastsi128_si256(entries);  // unsigned as the instruction wants them
  const uint8_t* w = s.weights;
  const float* activation_scale = s.scales + first;
  alignas(32) float span[U * kHalf] = {};
  for (int g = 0; g < s.groups(); ++g) {
    const int32_t* offset = s.offsets + g * T + first;
    const uint8_t* x = s.group_values(g, T) + first * kChunk;
    __m256i d[2][U];
    for (int u = 0; u < U; ++u) d[0][u] = d[1][u] = _mm256_set1_epi32(K == kMinimum ? 0 : offset[u] - kWhole);
    for (int k = 0; k < s.group; k += columns, w += bytes, x += T * kChunk) {
      if (first == 0) prefetch_ahead(w + half * (bytes / 2), bytes / 2);
      dot_columns<Bits, K, U>(d, w + half * 64, x, columns, table);
    }
    if (first == 0 && half == 0) prefetch_ahead(w, kPanel * s.scale_bytes * (K == kMinimum ? 2 : 1));
    const uint8_t* minima = w + kPanel * s.scale_bytes;
    for (int quarter = 0; quarter < 2; ++quarter) {
      const int row = half * kHalf + quarter * kQuarter;
      const __m256 scale = scales_at(w, s.scale_bytes, row);
      const __m256 minimum = K == kMinimum ? scales_at(minima, s.scale_bytes, row) : scale;
      for (int u = 0; u < U; ++u) {
        float* so_far = span + u * kHalf + quarter * kQuarter;
        __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d[quarter][u]), scale, _mm256_load_ps(so_far));
        if constexpr (K == kMinimum) sum = _mm256_fmadd_ps(minimum, _mm256_castsi256_ps(_mm256_set1_epi32(offset[u])), sum);
        if (s.ends_span(g)) {
          float* out = s.sums + (first + u) * kPanel + row;
          _mm256_storeu_ps(out, _mm256_fmadd_ps(sum, _mm256_set1_ps(activation_scale[u]), _mm256_loadu_ps(out)));
          sum = _mm256_setzero_ps();
        }
        _mm256_store_ps(so_far, sum);
      }
    }
    w = minima + (K == kMinimum ? kPanel * s.scale_bytes : 0);
    if (s.ends_span(g)) activation_scale += T;
  }
}

template <int Bits, Kind K, int T>
TARGET void step_integer(const Step& s) {
  constexpr int at_once = 4;  // with two quarters eight sums: the codes and a broadcast fit beside them
  for (int half = 0; half < 2; ++half) {
    if constexpr (T >= at_once) half_rows<Bits, K, T, at_once>(s, half, 0);
    if constexpr (T == 2 * at_once) half_rows<Bits, K, T, at_once>(s, half, at_once);
    if constexpr (T % at_once != 0) half_rows<Bits, K, T, T % at_once>(s, half, T - T % at_once);
  }
}

bool supported() {
  unsigned a, b, c, d;
  return avx2()->supported() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}

const StepFunction kSteps[][kTile] = {DOVETAIL_INTEGER_STEPS};

}  // namespace

const InstructionSet* avx_vnni() {
  static const InstructionSet set = [] {
    InstructionSet with = *avx2();
    with.name = "avx2-vnni";
    with.supported = supported;
    for (int format = kInt4; format <= kInt8Minimum; ++format)
      for (int t = 0; t < kTile; ++t) with.steps[format][t] = kSteps[format][t];
    return with;
  }();
  return &set;
}

}  // namespace dovetail
#else
namespace dovetail {
const InstructionSet* avx_vnni() { return nullptr; }
}  // namespace dovetail
#endif
