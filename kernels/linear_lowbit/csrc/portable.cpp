// Plain C++ that compilers vectorise for whatever they build for: correct anywhere, and the twin of the fast instruction sets.
#include "encode.h"

namespace dovetail {
namespace {

void encode(const float* x, const Packed& w, int width, int t, const Activations& tile) { encode_row(x, w, width, t, tile); }

float widen_fp16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = bits_float(rest << 13) * bits_float(0x77800000u);  // times 2^112 moves the exponent's bias, subnormals included
  return bits_float(sign | float_bits(magnitude));
}

float scale_at(const uint8_t* scales, int bytes, int row) {
  uint16_t half;
  float wide;
  if (bytes == 2) {
    std::memcpy(&half, scales + row * 2, 2);
    return widen_fp16(half);
  }
  std::memcpy(&wide, scales + row * 4, 4);
  return wide;
}

// Sums of one group for one activation row: d[row] += codes[row][column] * x[column], or the table's entry for the code.
template <int Bits, Kind K>
void dot_group(int32_t* d, const uint8_t* w, const int8_t* x, int chunk_stride, const Step& s) {
  constexpr int columns = Bits == 4 ? 8 : 4;  // of one 128-byte piece
  for (int k = 0; k < s.group; k += columns, w += kPanel * 4) {
    const int8_t* at = x + k / kChunk * chunk_stride + k % kChunk;
    for (int row = 0; row < kPanel; ++row) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t code = w[row * 4 + j];
        if constexpr (K == kTable) {
          d[row] += s.table[code & 15] * at[j] + s.table[code >> 4] * at[4 + j];
        } else {
          d[row] += Bits == 4 ? (code & 15) * at[j] + (code >> 4) * at[4 + j] : code * at[j];
        }
      }
    }
  }
}

template <int Bits, Kind K, int T>
void step_integer(const Step& s) {
  const int code_bytes = kPanel * s.group * Bits / 8;
  const int64_t group_bytes = code_bytes + kPanel * s.scale_bytes * (K == kMinimum ? 2 : 1);
  for (int t = 0; t < T; ++t) {
    const float* activation_scale = s.scales + t;
    float sum[kPanel] = {};
    for (int g = 0; g < s.groups(); ++g) {
      const uint8_t* w = s.weights + g * group_bytes;
      const uint8_t* scales = w + code_bytes;
      const int32_t offset = s.offsets[g * T + t];
      int32_t d[kPanel];
      for (int row = 0; row < kPanel; ++row) d[row] = K == kSymmetric ? offset - kWhole : 0;
      dot_group<Bits, K>(d, w, reinterpret_cast<const int8_t*>(s.group_values(g, T)) + t * kChunk, T * kChunk, s);
      for (int row = 0; row < kPanel; ++row) sum[row] += static_cast<float>(d[row]) * scale_at(scales, s.scale_bytes, row);
      if constexpr (K == kMinimum) {
        const uint8_t* minima = scales + kPanel * s.scale_bytes;
        for (int row = 0; row < kPanel; ++row) sum[row] += scale_at(minima, s.scale_bytes, row) * bits_float(static_cast<uint32_t>(offset));
      }
      if (!s.ends_span(g)) continue;
      for (int row = 0; row < kPanel; ++row) {
        s.sums[t * kPanel + row] += sum[row] * *activation_scale;
        sum[row] = 0.0f;
      }
      activation_scale += T;
    }
  }
}

template <int T>
void step_bf16(const Step& s) {
  for (int t = 0; t < T; ++t) {
    float* sums = s.sums + t * kPanel;
    const uint8_t* w = s.weights;
    for (int c = 0; c < s.chunks; ++c) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(s.values) + (c * T + t) * kChunk;
      for (int k = 0; k < kChunk; k += 2, w += kPanel * 4) {
        const float first = bits_float(uint32_t{x[k]} << 16);
        const float second = bits_float(uint32_t{x[k + 1]} << 16);
        for (int row = 0; row < kPanel; ++row) {
          uint32_t pair;
          std::memcpy(&pair, w + row * 4, 4);
          sums[row] += bits_float(pair << 16) * first;
          sums[row] += bits_float(pair & 0xffff0000u) * second;
        }
      }
    }
  }
}

template <int T>
void step_fp32(const Step& s) {
  for (int t = 0; t < T; ++t) {
    float* sums = s.sums + t * kPanel;
    const float* w = reinterpret_cast<const float*>(s.weights);
    for (int c = 0; c < s.chunks; ++c) {
      const float* x = reinterpret_cast<const float*>(s.values) + (c * T + t) * kChunk;
      for (int k = 0; k < kChunk; ++k, w += kPanel) {
        for (int row = 0; row < kPanel; ++row) sums[row] += w[row] * x[k];
      }
    }
  }
}

bool everywhere() { return true; }

const InstructionSet kPortable = {
    "portable", everywhere, encode, DOVETAIL_STEPS};

}  // namespace

const InstructionSet* portable() { return &kPortable; }

}  // namespace dovetail
