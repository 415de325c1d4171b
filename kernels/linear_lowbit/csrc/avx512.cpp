// AVX-512 with VNNI (u8 x s8 dot products) and, where the processor has it, BF16 dot products.
#include "encode.h"
#include "prefetch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))

namespace dovetail {
namespace {

// `encode_integer_row` in vectors of 16 columns: the same values, offsets and scales to the bit, in a third of its time.
template <int kColumns>
TARGET DOVETAIL_INLINE void encode_spans(const float* x, const Packed& w, int width, int t, const Activations& tile) {
  constexpr int kLanes = 16;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), whole = _mm512_set1_epi32(kWhole);
  const __m512 rounding = _mm512_castsi512_ps(whole);
  const int offset_factor = 1 << w.middle_bits();
  for (int64_t span = 0; span < w.in / kColumns; ++span) {
    const float* piece = x + span * kColumns;
    __m512i bits = _mm512_setzero_si512();
    for (int i = 0; i < kColumns; i += kLanes) {
      bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(piece + i)), magnitude));
    }
    const SpanScale scale = span_scale(_mm512_reduce_max_epu32(bits));
    tile.scales[span * width + t] = scale.scale;
    const __m512 inverse = _mm512_set1_ps(scale.inverse);
    const __mmask16 counts = scale.inverse == 0.0f ? 0 : 0xffff;  // zero times infinity must be zero here
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < kColumns; i += kLanes) {
      const int64_t column = span * kColumns + i;
      const __m512 scaled = _mm512_maskz_mul_ps(counts, _mm512_loadu_ps(piece + i), inverse);
      const __m512i codes = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(scaled, rounding)), whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values_at(tile, column, width, t)), _mm512_cvtepi32_epi8(codes));
      sums = _mm512_add_epi32(sums, codes);
      if ((column + kLanes) % w.group == 0) {
        tile.offsets[column / w.group * width + t] = group_offset(w, _mm512_reduce_add_epi32(sums), offset_factor);
        sums = _mm512_setzero_si512();
      }
    }
  }
}

TARGET void encode(const float* x, const Packed& w, int width, int t, const Activations& tile) {
  if (!w.integer()) return encode_float_row(x, w, width, t, tile);
  switch (w.span()) {
    case 32: return encode_spans<32>(x, w, width, t, tile);
    case 64: return encode_spans<64>(x, w, width, t, tile);
    default: return encode_spans<128>(x, w, width, t, tile);
  }
}

TARGET DOVETAIL_INLINE __m512i broadcast(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// Sixteen scales or minima of one half of the panel.
TARGET DOVETAIL_INLINE __m512 half_scales(const uint8_t* scales, int bytes, int half) {
  if (bytes == 4) return _mm512_loadu_ps(scales + half * kHalf * 4);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + half * kHalf * 2)));
}

// A step asks for lines twice: far ahead, and for the span that follows into L1. Those are read once: marked so (NTA), they leave
// the activations, which every panel reads again, in L1. One row of int8 or wider does without the second.
// Measured without and with the lines far ahead, SmolLM2-135M's shape in int4, two threads of a Xeon with AMX: 8.9 to 5.6 ms at
// one row, 10.0 to 6.2 at two, 14.4 to 10.2 at eight; the second alone on Zen 4, 1B LLaMA shape: int4 14.7 to 11.9 at one row.
template <int Bits, int T>
TARGET DOVETAIL_INLINE void prefetch(const uint8_t* w) {
  prefetch_ahead(w, 64);
  if constexpr (T > 1 || Bits == 4) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + (Bits == 4 ? 2304 : 4096), _MM_HINT_NTA);  // 2304: one span of int4 in groups of 32
  }
}

template <int Bits, int T>
TARGET DOVETAIL_INLINE void prefetch_both(const uint8_t* w) {
  prefetch<Bits, T>(w);
  prefetch<Bits, T>(w + 64);
}

// Both halves of the panel times the four columns at `x` of every row of the tile: a broadcast feeds two dot products.
// The empty asm holds each broadcast beside its use: hoisted, eight of them push the int32 sums out of the registers
// (measured on Zen 4 at T = 8: 146 against 202 G multiply-adds/s per core).
template <int T>
TARGET DOVETAIL_INLINE void dot(__m512i (&d)[2][T], __m512i upper, __m512i lower, const uint8_t* x) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512i value = broadcast(x + t * kChunk);
    d[0][t] = _mm512_dpbusd_epi32(d[0][t], upper, value);
    d[1][t] = _mm512_dpbusd_epi32(d[1][t], lower, value);
    asm volatile("" : "+v"(d[0][t]), "+v"(d[1][t]));
  }
}

template <int Bits, Kind K, int T>
TARGET DOVETAIL_INLINE void dot_columns(__m512i (&d)[2][T], const uint8_t* w, const uint8_t* x, int columns, __m512i table) {
  if constexpr (Bits == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int k = 0; k < columns; k += 8, w += 128, x += 8) {
      prefetch_both<Bits, T>(w);
      const __m512i upper = _mm512_loadu_si512(w);
      const __m512i lower = _mm512_loadu_si512(w + 64);
      __m512i even[2] = {_mm512_and_si512(upper, nibble), _mm512_and_si512(lower, nibble)};
      __m512i odd[2] = {_mm512_and_si512(_mm512_srli_epi16(upper, 4), nibble), _mm512_and_si512(_mm512_srli_epi16(lower, 4), nibble)};
      if constexpr (K == kTable) {
        for (int half = 0; half < 2; ++half) {
          even[half] = _mm512_shuffle_epi8(table, even[half]);
          odd[half] = _mm512_shuffle_epi8(table, odd[half]);
        }
      }
      dot<T>(d, even[0], even[1], x);
      dot<T>(d, odd[0], odd[1], x + 4);
    }
  } else {
    for (int k = 0; k < columns; k += 4, w += 128, x += 4) {
      prefetch_both<Bits, T>(w);
      dot<T>(d, _mm512_loadu_si512(w), _mm512_loadu_si512(w + 64), x);
    }
  }
}

// Where a step stands: the next group and span, and the fp32 sums of the first of a span's two groups, [T][32].
// Those live in L1 and are touched once per group: the registers belong to the int32 sums.
struct Position {
  int group;
  const uint8_t* w;
  const int32_t* offset;
  const float* activation_scale;
  float* span;
  __m512i table;  // entries plus 128, unsigned as the instruction wants them
};

// The int32 sums of a group, which began at kWhole, times their scale, plus `sum` unless this is the span's First group. An
// fp16 scale times 1.5 * 2^23 is exact, so that one instruction takes kWhole off again and multiplies, with one rounding.
template <bool First>
TARGET DOVETAIL_INLINE __m512 scaled(__m512i dot, __m512 scale, int scale_bytes, __m512 sum) {
  const __m512 whole = _mm512_castsi512_ps(_mm512_set1_epi32(kWhole));
  const __m512 shifted = _mm512_castsi512_ps(dot);
  if (First && scale_bytes == 2) return _mm512_fmsub_ps(shifted, scale, _mm512_mul_ps(whole, scale));
  const __m512 product = _mm512_sub_ps(shifted, whole);
  return First ? _mm512_mul_ps(product, scale) : _mm512_fmadd_ps(product, scale, sum);
}

// One group of columns: exact int32 sums, folded into the span's sums; the last group's span goes into the panel's sums.
// First and Last are known when compiling, so that the int32 sums of one group never outlive it; so are the columns of short
// groups (16, 32; 0: as the step says). Together: 172 to 201 G multiply-adds/s at T = 8.
template <int Bits, Kind K, int Columns, bool First, bool Last, int T>
TARGET DOVETAIL_INLINE void take_group(const Step& s, Position& at) {
  __m512i d[2][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) d[0][t] = d[1][t] = _mm512_set1_epi32(K == kMinimum ? kWhole : at.offset[t]);
  const int columns = Columns != 0 ? Columns : s.group;
  constexpr int together = Columns == 16 ? 16 : kChunk;
  constexpr int bytes = kPanel * together * Bits / 8;
  const int scale_bytes = s.scale_bytes;
  const uint8_t* scales = at.w + columns / together * bytes;
  prefetch<Bits, T>(scales);
  if (K == kMinimum || scale_bytes == 4) prefetch<Bits, T>(scales + 64);
  if (K == kMinimum && scale_bytes == 4) prefetch_both<Bits, T>(scales + 128);
  const uint8_t* x = s.group_values(at.group, T);
  for (int k = 0; k < columns; k += together, at.w += bytes, x += T * kChunk) dot_columns<Bits, K, T>(d, at.w, x, together, at.table);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512 scale = half_scales(scales, scale_bytes, half);
    const __m512 minimum = K == kMinimum ? half_scales(scales + kPanel * scale_bytes, scale_bytes, half) : scale;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* span = at.span + (t * 2 + half) * kHalf;
      __m512 sum = scaled<First>(d[half][t], scale, scale_bytes, First ? scale : _mm512_load_ps(span));
      if constexpr (K == kMinimum) sum = _mm512_fmadd_ps(minimum, _mm512_castsi512_ps(_mm512_set1_epi32(at.offset[t])), sum);
      if constexpr (Last) {
        float* out = s.sums + t * kPanel + half * kHalf;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, _mm512_set1_ps(at.activation_scale[t]), _mm512_loadu_ps(out)));
      } else {
        _mm512_store_ps(span, sum);
      }
    }
  }
  at.w += kPanel * scale_bytes * (K == kMinimum ? 2 : 1);
  at.offset += T;
  ++at.group;
}

template <int Bits, Kind K, int Columns, int T>
TARGET DOVETAIL_INLINE void take_spans(const Step& s) {
  alignas(64) float span[T * kPanel];
  Position at{0, s.weights, s.offsets, s.scales, span, _mm512_setzero_si512()};
  if constexpr (K == kTable) {
    const __m128i entries = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.table)), _mm_set1_epi8(-128));
    at.table = _mm512_broadcast_i32x4(entries);
  }
  const int groups = s.groups();
  while (at.group < groups) {
    if (s.span_groups == 1) {
      take_group<Bits, K, Columns, true, true, T>(s, at);
    } else {
      take_group<Bits, K, Columns, true, false, T>(s, at);
      take_group<Bits, K, Columns, false, true, T>(s, at);
    }
    at.activation_scale += T;
  }
}

template <int Bits, Kind K, int T>
TARGET void step_integer(const Step& s) {
  if (s.group == 16) return take_spans<Bits, K, 16, T>(s);
  if (s.group == 32) return take_spans<Bits, K, 32, T>(s);
  take_spans<Bits, K, 0, T>(s);
}

// The sums of a tile between memory and registers. Unrolled by hand-written pragma: left to itself GCC keeps the arrays on the
// stack and writes them back in every iteration.
template <int T>
TARGET DOVETAIL_INLINE void load_sums(__m512 (&sum)[2][T], const float* from) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    sum[0][t] = _mm512_loadu_ps(from + t * kPanel);
    sum[1][t] = _mm512_loadu_ps(from + t * kPanel + kHalf);
  }
}

template <int T>
TARGET DOVETAIL_INLINE void store_sums(const __m512 (&sum)[2][T], float* to) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    _mm512_storeu_ps(to + t * kPanel, sum[0][t]);
    _mm512_storeu_ps(to + t * kPanel + kHalf, sum[1][t]);
  }
}

template <int T>
TARGET_BF16 void step_bf16(const Step& s) {
  const uint8_t* w = s.weights;
  const uint8_t* x = s.values;
  __m512 sum[2][T];
  load_sums<T>(sum, s.sums);
  for (int c = 0; c < s.chunks; ++c, x += T * kChunk * 2) {
    for (int pair = 0; pair < kChunk / 2; ++pair, w += 128) {
      prefetch_both<16, T>(w);
      const __m512bh upper = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
      const __m512bh lower = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 64));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512bh value = reinterpret_cast<__m512bh>(broadcast(x + t * kChunk * 2 + pair * 4));
        sum[0][t] = _mm512_dpbf16_ps(sum[0][t], upper, value);
        sum[1][t] = _mm512_dpbf16_ps(sum[1][t], lower, value);
      }
    }
  }
  store_sums<T>(sum, s.sums);
}

template <int T>
TARGET void step_fp32(const Step& s) {
  const float* w = reinterpret_cast<const float*>(s.weights);
  const float* x = reinterpret_cast<const float*>(s.values);
  __m512 sum[2][T];
  load_sums<T>(sum, s.sums);
  for (int c = 0; c < s.chunks; ++c, x += T * kChunk) {
    for (int k = 0; k < kChunk; ++k, w += kPanel) {
      prefetch_both<32, T>(reinterpret_cast<const uint8_t*>(w));
      const __m512 upper = _mm512_loadu_ps(w);
      const __m512 lower = _mm512_loadu_ps(w + kHalf);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512 value = _mm512_set1_ps(x[t * kChunk + k]);
        sum[0][t] = _mm512_fmadd_ps(upper, value, sum[0][t]);
        sum[1][t] = _mm512_fmadd_ps(lower, value, sum[1][t]);
      }
    }
  }
  store_sums<T>(sum, s.sums);
}

bool has_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }

const InstructionSet kAvx512Bf16 = {
    "avx512-vnni-bf16", has_bf16, encode, DOVETAIL_STEPS};

}  // namespace

const InstructionSet* avx512_bf16() { return &kAvx512Bf16; }

// Without the BF16 extension the bf16 steps are those of AVX2, which widen to fp32.
const InstructionSet* avx512() {
  static const InstructionSet set = [] {
    InstructionSet without = kAvx512Bf16;
    without.name = "avx512-vnni";
    without.supported = has_vnni;
    for (int t = 0; t < kTile; ++t) without.steps[kBf16][t] = avx2()->steps[kBf16][t];
    return without;
  }();
  return &set;
}

}  // namespace dovetail
#else
namespace dovetail {
const InstructionSet* avx512() { return nullptr; }
const InstructionSet* avx512_bf16() { return nullptr; }
}  // namespace dovetail
#endif
