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

void widen_halves(const uint8_t* from, float* to) {
  for (int row = 0; row < kPanel; ++row) {
    uint16_t half;
    std::memcpy(&half, from + row * 2, 2);
    to[row] = widen_fp16(half);
  }
}

// Sums of one chunk for one activation row: d[row] += codes[row][column] * x[column].
template <int Bits>
void dot_chunk(int32_t* d, const uint8_t* w, const int8_t* x) {
  constexpr int columns = Bits == 4 ? 8 : 4;  // of one 128-byte piece
  for (int k = 0; k < kChunk; k += columns, w += kPanel * 4, x += columns) {
    for (int row = 0; row < kPanel; ++row) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t code = w[row * 4 + j];
        d[row] += Bits == 4 ? (code & 15) * x[j] + (code >> 4) * x[4 + j] : code * x[j];
      }
    }
  }
}

template <int Bits, bool Minimum, int T>
void step_integer(const Step& s) {
  constexpr int chunk_bytes = kPanel * kChunk * Bits / 8;
  const int groups = s.chunks / s.group_chunks;
  const int64_t group_bytes = s.group_chunks * chunk_bytes + kPanel * 2 * (1 + Minimum);
  for (int t = 0; t < T; ++t) {
    float sum[kPanel] = {};
    for (int g = 0; g < groups; ++g) {
      const uint8_t* w = s.weights + g * group_bytes;
      const int32_t offset = s.offsets[g * T + t];
      int32_t d[kPanel];
      for (int row = 0; row < kPanel; ++row) d[row] = Minimum ? 0 : offset;
      for (int c = 0; c < s.group_chunks; ++c, w += chunk_bytes) {
        dot_chunk<Bits>(d, w, reinterpret_cast<const int8_t*>(s.values) + ((g * s.group_chunks + c) * T + t) * kChunk);
      }
      float scale[2][kPanel];
      widen_halves(w, scale[0]);
      for (int row = 0; row < kPanel; ++row) sum[row] += static_cast<float>(d[row]) * scale[0][row];
      if constexpr (Minimum) {
        widen_halves(w + kPanel * 2, scale[1]);
        for (int row = 0; row < kPanel; ++row) sum[row] += scale[1][row] * bits_float(static_cast<uint32_t>(offset));
      }
    }
    for (int row = 0; row < kPanel; ++row) s.sums[t * kPanel + row] += sum[row] * s.scales[t];
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
