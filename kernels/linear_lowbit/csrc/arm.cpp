// Arm with the dot-product extension (s8 x s8, Armv8.2-A): Neoverse N1 and later, Apple M1 and later, Raspberry Pi 5.
#include "encode.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

namespace dovetail {
namespace {

constexpr int kRows = 4;      // output rows of one 16-byte vector of sums
constexpr int kVectors = 4;   // such vectors in a half panel: with two activation rows, eight sums in registers

TARGET void encode(const float* x, const Packed& w, int width, int t, const Activations& tile) { encode_row(x, w, width, t, tile); }

// What 4-bit codes stand for, as signed bytes: entries of the table, which for kinds without one counts from -8.
TARGET DOVETAIL_INLINE int8x16_t low_nibbles(int8x16_t table, uint8x16_t codes) { return vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15))); }

TARGET DOVETAIL_INLINE int8x16_t high_nibbles(int8x16_t table, uint8x16_t codes) { return vqtbl1q_s8(table, vshrq_n_u8(codes, 4)); }

TARGET DOVETAIL_INLINE int8x16_t centred(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))); }

template <int Lane, int U>
TARGET DOVETAIL_INLINE void dot(int32x4_t (&d)[kVectors][U], int vector, int8x16_t weights, const int8x16_t (&x)[U]) {
  for (int u = 0; u < U; ++u) d[vector][u] = vdotq_laneq_s32(d[vector][u], weights, x[u], Lane);
}

// Sixteen columns: four quads, whose activations are the four lanes of one vector.
template <int Bits, int U>
TARGET DOVETAIL_INLINE void dot_columns(int32x4_t (&d)[kVectors][U], const uint8_t* w, const int8x16_t (&x)[U], int8x16_t table) {
  for (int v = 0; v < kVectors; ++v, w += 16) {
    if constexpr (Bits == 4) {
      const uint8x16_t first = vld1q_u8(w);
      const uint8x16_t second = vld1q_u8(w + kPanel * 4);
      dot<0, U>(d, v, low_nibbles(table, first), x);
      dot<1, U>(d, v, high_nibbles(table, first), x);
      dot<2, U>(d, v, low_nibbles(table, second), x);
      dot<3, U>(d, v, high_nibbles(table, second), x);
    } else {
      dot<0, U>(d, v, centred(vld1q_u8(w)), x);
      dot<1, U>(d, v, centred(vld1q_u8(w + kPanel * 4)), x);
      dot<2, U>(d, v, centred(vld1q_u8(w + kPanel * 8)), x);
      dot<3, U>(d, v, centred(vld1q_u8(w + kPanel * 12)), x);
    }
  }
}

// Four scales or minima from the one for row `row` of the panel on.
TARGET DOVETAIL_INLINE float32x4_t scales_at(const uint8_t* scales, int bytes, int row) {
  if (bytes == 4) return vld1q_f32(reinterpret_cast<const float*>(scales) + row);
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales + row * 2)));
}

template <int Bits, Kind K, int T, int U>
TARGET DOVETAIL_INLINE void half_rows(const Step& s, int half, int first) {
  constexpr int columns = 16;
  constexpr int8_t counted[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const int8x16_t table = vld1q_s8(K == kTable ? s.table : counted);
  const uint8_t* w = s.weights;
  const float* activation_scale = s.scales + first;
  float32x4_t sum[kVectors][U];
  for (int v = 0; v < kVectors; ++v)
    for (int u = 0; u < U; ++u) sum[v][u] = vdupq_n_f32(0.0f);
  for (int g = 0; g < s.groups(); ++g) {
    const int32_t* offset = s.offsets + g * T + first;
    const int8_t* x = reinterpret_cast<const int8_t*>(s.group_values(g, T)) + first * kChunk;
    int32x4_t d[kVectors][U];
    for (int u = 0; u < U; ++u) {
      // With minima the products are wanted for the codes themselves; without, the middle already stands for the offset.
      const int32_t start = K == kMinimum ? static_cast<int32_t>(bits_float(static_cast<uint32_t>(offset[u]))) * (1 << (Bits - 1)) : 0;
      for (int v = 0; v < kVectors; ++v) d[v][u] = vdupq_n_s32(start);
    }
    for (int k = 0; k < s.group; k += columns, w += columns * kPanel * Bits / 8) {
      int8x16_t values[U];
      for (int u = 0; u < U; ++u) values[u] = vld1q_s8(x + (k / kChunk * T + u) * kChunk + k % kChunk);
      dot_columns<Bits, U>(d, w + half * 64, values, table);
    }
    const uint8_t* minima = w + kPanel * s.scale_bytes;
    for (int v = 0; v < kVectors; ++v) {
      const int row = half * kHalf + v * kRows;
      const float32x4_t scale = scales_at(w, s.scale_bytes, row);
      for (int u = 0; u < U; ++u) sum[v][u] = vfmaq_f32(sum[v][u], vcvtq_f32_s32(d[v][u]), scale);
      if constexpr (K == kMinimum) {
        const float32x4_t minimum = scales_at(minima, s.scale_bytes, row);
        for (int u = 0; u < U; ++u) sum[v][u] = vfmaq_n_f32(sum[v][u], minimum, bits_float(static_cast<uint32_t>(offset[u])));
      }
    }
    w = minima + (K == kMinimum ? kPanel * s.scale_bytes : 0);
    if (!s.ends_span(g)) continue;
    for (int u = 0; u < U; ++u) {
      float* out = s.sums + (first + u) * kPanel + half * kHalf;
      for (int v = 0; v < kVectors; ++v) {
        vst1q_f32(out + v * kRows, vfmaq_n_f32(vld1q_f32(out + v * kRows), sum[v][u], activation_scale[u]));
        sum[v][u] = vdupq_n_f32(0.0f);
      }
    }
    activation_scale += T;
  }
}

template <int Bits, Kind K, int T>
TARGET void step_integer(const Step& s) {
  for (int half = 0; half < 2; ++half) {
    for (int first = 0; first + 2 <= T; first += 2) half_rows<Bits, K, T, 2>(s, half, first);
    if constexpr (T % 2 != 0) half_rows<Bits, K, T, 1>(s, half, T - 1);
  }
}

bool supported() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

}  // namespace

// bf16 and fp32 take the portable steps, which compilers turn into NEON.
const InstructionSet* arm_dotprod() {
  static const InstructionSet set = [] {
    InstructionSet dotprod = *portable();
    dotprod.name = "arm-dotprod";
    dotprod.supported = supported;
    dotprod.encode = encode;
    const StepFunction integer[kBf16][kTile] = {DOVETAIL_INTEGER_STEPS};
    std::memcpy(dotprod.steps, integer, sizeof integer);
    return dotprod;
  }();
  return &set;
}

}  // namespace dovetail
#else
namespace dovetail {
const InstructionSet* arm_dotprod() { return nullptr; }
}  // namespace dovetail
#endif
