// AVX-512 with VNNI (u8 x s8 dot products) and, where the processor has it, BF16 dot products.
#include "encode.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))

namespace dovetail {
namespace {

TARGET void encode(const float* x, const Packed& w, int width, int t, const Activations& tile) { encode_row(x, w, width, t, tile); }

TARGET DOVETAIL_INLINE __m512i broadcast(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

TARGET DOVETAIL_INLINE __m512 halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The hardware's prefetchers stop at every page and fall behind between spans: asked for two spans ahead, the next weights
// are there in time (measured on Zen 4: 22 to 26 GB/s per core at one row, 138 to 153 G multiply-adds/s at eight).
template <int Distance>
TARGET DOVETAIL_INLINE void prefetch(const uint8_t* w) {
  const char* ahead = reinterpret_cast<const char*>(w) + Distance;
  _mm_prefetch(ahead, _MM_HINT_T0);
  _mm_prefetch(ahead + 64, _MM_HINT_T0);
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

template <int Bits, int T>
TARGET DOVETAIL_INLINE void dot_chunk(__m512i (&d)[2][T], const uint8_t* w, const uint8_t* x) {
  if constexpr (Bits == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int pair = 0; pair < kChunk / 8; ++pair, w += 128, x += 8) {
      prefetch<Bits == 4 ? 2304 : 4096>(w);
      const __m512i upper = _mm512_loadu_si512(w);
      const __m512i lower = _mm512_loadu_si512(w + 64);
      dot<T>(d, _mm512_and_si512(upper, nibble), _mm512_and_si512(lower, nibble), x);
      dot<T>(d, _mm512_and_si512(_mm512_srli_epi16(upper, 4), nibble), _mm512_and_si512(_mm512_srli_epi16(lower, 4), nibble), x + 4);
    }
  } else {
    for (int quad = 0; quad < kChunk / 4; ++quad, w += 128, x += 4) {
      prefetch<Bits == 4 ? 2304 : 4096>(w);
      dot<T>(d, _mm512_loadu_si512(w), _mm512_loadu_si512(w + 64), x);
    }
  }
}

// Folds the int32 sums of a group into the fp32 sums of its span, and the last group's span into the panel's sums. The fp32
// sums live in L1, touched once per group: the registers belong to the int32 sums.
template <bool Minimum, bool First, bool Last, int T>
TARGET DOVETAIL_INLINE void fold(const Step& s, const uint8_t* w, const int32_t* offset, __m512i (&d)[2][T], float* partial) {
  for (int half = 0; half < 2; ++half) {
    const __m512 scale = halves(w + half * kHalf * 2);
    const __m512 minimum = Minimum ? halves(w + (2 + half) * kHalf * 2) : scale;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* span = partial + (t * 2 + half) * kHalf;
      const __m512 dot = _mm512_cvtepi32_ps(d[half][t]);
      __m512 sum = First ? _mm512_mul_ps(dot, scale) : _mm512_fmadd_ps(dot, scale, _mm512_load_ps(span));
      if constexpr (Minimum) sum = _mm512_fmadd_ps(minimum, _mm512_castsi512_ps(_mm512_set1_epi32(offset[t])), sum);
      if constexpr (Last) {
        float* out = s.sums + t * kPanel + half * kHalf;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, _mm512_set1_ps(s.scales[t]), _mm512_loadu_ps(out)));
      } else {
        _mm512_store_ps(span, sum);
      }
    }
  }
}

template <int Bits, bool Minimum, int T>
TARGET void step_integer(const Step& s) {
  constexpr int chunk_bytes = kPanel * kChunk * Bits / 8;
  const uint8_t* w = s.weights;
  const uint8_t* x = s.values;
  const int32_t* offset = s.offsets;
  const int groups = s.chunks / s.group_chunks;
  alignas(64) float partial[T * kPanel];
  for (int g = 0; g < groups; ++g, w += kPanel * 2 * (1 + Minimum), offset += T) {
    __m512i d[2][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) d[0][t] = d[1][t] = Minimum ? _mm512_setzero_si512() : _mm512_set1_epi32(offset[t]);
    for (int c = 0; c < s.group_chunks; ++c, w += chunk_bytes, x += T * kChunk) dot_chunk<Bits, T>(d, w, x);
    const bool last = g + 1 == groups;
    if (g == 0) {
      last ? fold<Minimum, true, true, T>(s, w, offset, d, partial) : fold<Minimum, true, false, T>(s, w, offset, d, partial);
    } else {
      last ? fold<Minimum, false, true, T>(s, w, offset, d, partial) : fold<Minimum, false, false, T>(s, w, offset, d, partial);
    }
    asm volatile("" ::"r"(partial) : "memory");  // or the compiler keeps the fp32 sums in registers and spills the int32 ones
  }
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
      prefetch<4096>(w);
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
      prefetch<4096>(reinterpret_cast<const uint8_t*>(w));
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
