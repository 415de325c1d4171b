// Activation rows into the number format of a weight: the plain loops, which are the reference, each instruction set compiling
// them under its own target attribute. AVX-512 encodes whole numbers in vectors of its own, to the same bits.
#pragma once

#include <cstring>

#include "layout.h"

#define DOVETAIL_INLINE inline __attribute__((always_inline))

namespace dovetail {

DOVETAIL_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

DOVETAIL_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

DOVETAIL_INLINE uint16_t round_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

// Largest magnitude as bits: the order of non-negative floats is that of their bits, with infinity and NaN on top.
DOVETAIL_INLINE uint32_t largest_magnitude(const float* x, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

constexpr int kPiece = 16;  // columns of the shortest group

// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
DOVETAIL_INLINE int32_t encode_piece(const float* x, float inverse, int8_t* values) {
  int32_t sum = 0;
  for (int i = 0; i < kPiece; ++i) {
    const int32_t value = static_cast<int32_t>(float_bits(x[i] * inverse + 12582912.0f)) - kWhole;
    values[i] = static_cast<int8_t>(value);
    sum += value;
  }
  return sum;
}

// 127 over the largest magnitude of a span, and its inverse; both zero for a span of zeros, inverse zero and scale NaN for one
// that is not finite.
struct SpanScale {
  float inverse, scale;
};

DOVETAIL_INLINE SpanScale span_scale(uint32_t largest_bits) {
  const float tiny = 1e-30f;  // below it a span counts as zero: 127 / largest would overflow
  const float largest = bits_float(largest_bits);
  if (largest_bits >= 0x7f800000u) return {0.0f, bits_float(0x7fc00000u)};
  return largest > tiny ? SpanScale{127.0f / largest, largest / 127.0f} : SpanScale{0.0f, 0.0f};
}

// Where the values of `column` and those behind it lie, of row t.
DOVETAIL_INLINE int8_t* values_at(const Activations& tile, int64_t column, int width, int t) {
  return reinterpret_cast<int8_t*>(tile.values) + (column / kChunk * width + t) * kChunk + column % kChunk;
}

// What `Activations::offsets` holds for a group whose values have this sum.
DOVETAIL_INLINE int32_t group_offset(const Packed& w, int32_t sum, int32_t factor) {
  return w.kind == kMinimum ? static_cast<int32_t>(float_bits(static_cast<float>(sum))) : kWhole - sum * factor;
}

DOVETAIL_INLINE void encode_integer_row(const float* x, const Packed& w, int width, int t, const Activations& tile) {
  const int32_t offset_factor = 1 << w.middle_bits();
  int32_t sum = 0;
  SpanScale scale = {0.0f, 0.0f};
  for (int64_t column = 0; column < w.in; column += kPiece) {
    const float* piece = x + column;
    if (column % w.span() == 0) {
      scale = span_scale(largest_magnitude(piece, w.span()));
      tile.scales[column / w.span() * width + t] = scale.scale;
    }
    int8_t* values = values_at(tile, column, width, t);
    if (scale.inverse == 0.0f) {
      std::memset(values, 0, kPiece);
    } else {
      sum += encode_piece(piece, scale.inverse, values);
    }
    if ((column + kPiece) % w.group == 0) {
      tile.offsets[column / w.group * width + t] = group_offset(w, sum, offset_factor);
      sum = 0;
    }
  }
}

DOVETAIL_INLINE void encode_float_row(const float* x, const Packed& w, int width, int t, const Activations& tile) {
  const int64_t chunks = w.chunks();
  for (int64_t c = 0; c < chunks; ++c) {
    float padded[kChunk] = {};
    const float* piece = x + c * kChunk;
    const int64_t left = w.in - c * kChunk;
    if (left < kChunk) {
      std::memcpy(padded, piece, static_cast<size_t>(left) * sizeof(float));
      piece = padded;
    }
    const int64_t at = (c * width + t) * kChunk;
    if (w.bits == 32) {
      std::memcpy(reinterpret_cast<float*>(tile.values) + at, piece, sizeof padded);
    } else {
      uint16_t* values = reinterpret_cast<uint16_t*>(tile.values) + at;
      for (int i = 0; i < kChunk; ++i) values[i] = round_bf16(piece[i]);
    }
  }
}

DOVETAIL_INLINE void encode_row(const float* x, const Packed& w, int width, int t, const Activations& tile) {
  if (w.integer()) {
    encode_integer_row(x, w, width, t, tile);
  } else {
    encode_float_row(x, w, width, t, tile);
  }
}

}  // namespace dovetail
