#include "layer_math.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "encode.h"
#include "linear.h"

namespace dovetail {
namespace {

template <bool Fused>
DOVETAIL_INLINE float multiply_add(float a, float b, float c) {
  if constexpr (Fused) return __builtin_fmaf(a, b, c);
  return a * b + c;
}

// exp(x) to 2e-7 relative, for x from -87 to 88 and clamped beyond; NaN stays NaN. Without branches or tables.
template <bool Fused>
DOVETAIL_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = multiply_add<Fused>(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23 rounds to an integer in the low bits
  const float power = shifted - 12582912.0f;
  float rest = multiply_add<Fused>(power, -0.693359375f, x);  // ln 2 in two parts
  rest = multiply_add<Fused>(power, 2.12194440e-4f, rest);
  float y = 1.3981999507e-3f;
  y = multiply_add<Fused>(y, rest, 8.3334519073e-3f);
  y = multiply_add<Fused>(y, rest, 4.1665795894e-2f);
  y = multiply_add<Fused>(y, rest, 1.6666665459e-1f);
  y = multiply_add<Fused>(y, rest, 5.0000001201e-1f);
  y = multiply_add<Fused>(y, rest * rest, rest + 1.0f);
  return y * bits_float((float_bits(shifted) - 0x4b400000u + 127u) << 23);
}

DOVETAIL_INLINE float add_lanes(const float* lanes) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <bool Fused>
DOVETAIL_INLINE void normalise_row(const float* x, const float* weight, float epsilon, int width, float* out) {
  float squares[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) squares[lane] = multiply_add<Fused>(x[i + lane], x[i + lane], squares[lane]);
  for (int lane = 0; i + lane < width; ++lane) squares[lane] = multiply_add<Fused>(x[i + lane], x[i + lane], squares[lane]);
  const float inverse = 1.0f / std::sqrt(add_lanes(squares) / static_cast<float>(width) + epsilon);
  for (int j = 0; j < width; ++j) out[j] = weight[j] * (x[j] * inverse);
}

DOVETAIL_INLINE void rotate_row(float* x, const float* cosine, const float* sine, int width) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[half + i];
    x[i] = first * cosine[i] - second * sine[i];
    x[half + i] = second * cosine[half + i] + first * sine[half + i];
  }
}

template <bool Fused>
DOVETAIL_INLINE void swiglu_row(const float* gate, const float* up, int width, float* out) {
  for (int i = 0; i < width; ++i) out[i] = gate[i] / (1.0f + exponential<Fused>(-gate[i])) * up[i];
}

DOVETAIL_INLINE float widen(const void* from, int64_t at, bool bf16) {
  if (!bf16) return static_cast<const float*>(from)[at];
  return bits_float(uint32_t{static_cast<const uint16_t*>(from)[at]} << 16);
}

// Keys [first, first + count) as fp32 with the keys side by side: out[d][kKeyBlock].
DOVETAIL_INLINE void transpose_keys(const AttendTask& task, int64_t first, int count, float* out) {
  const int64_t width = task.head_dim;
  for (int key = 0; key < count; ++key)
    for (int64_t d = 0; d < width; ++d) out[d * kKeyBlock + key] = widen(task.keys, (first + key) * width + d, task.bf16);
}

DOVETAIL_INLINE void widen_values(const AttendTask& task, int64_t first, int count, float* out) {
  const int64_t width = task.head_dim;
  if (task.bf16) {
    for (int64_t i = 0; i < count * width; ++i) out[i] = widen(task.values, first * width + i, true);
  } else {
    std::memcpy(out, static_cast<const float*>(task.values) + first * width, static_cast<size_t>(count * width) * sizeof(float));
  }
}

// Scores of one query against a block of transposed keys, the sum over the head running upwards for every key.
template <bool Fused>
DOVETAIL_INLINE void score(const float* query, const float* keys, int width, float* scores) {
  for (int part = 0; part < kKeyBlock; part += 2 * kLanes) {
    float sum[2 * kLanes] = {};
    for (int d = 0; d < width; ++d)
      for (int lane = 0; lane < 2 * kLanes; ++lane) sum[lane] = multiply_add<Fused>(query[d], keys[d * kKeyBlock + part + lane], sum[lane]);
    std::memcpy(scores + part, sum, sizeof sum);
  }
}

// The running softmax of one query: largest score, sum of weights, weighted sum of values.
struct Running {
  float largest;
  float total;
  float* sum;
};

// Adds a block of up to kKeyBlock keys; values[at[key]] is the value row of the key-th.
template <bool Fused>
DOVETAIL_INLINE void add_block(Running& state, float* scores, int count, const float* values, const int32_t* at, int width) {
  float largest = state.largest;
  for (int key = 0; key < count; ++key) largest = scores[key] > largest ? scores[key] : largest;
  for (int key = count; key < kKeyBlock; ++key) scores[key] = largest;
  float lanes[kLanes] = {};
  for (int key = 0; key < kKeyBlock; ++key) scores[key] = exponential<Fused>(scores[key] - largest);
  for (int key = count; key < kKeyBlock; ++key) scores[key] = 0.0f;
  for (int key = 0; key < kKeyBlock; key += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += scores[key + lane];
  const float keep = exponential<Fused>(state.largest - largest);
  state.total = multiply_add<Fused>(state.total, keep, add_lanes(lanes));
  state.largest = largest;
  int d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    float sum[2 * kLanes];
    for (int lane = 0; lane < 2 * kLanes; ++lane) sum[lane] = state.sum[d + lane] * keep;
    for (int key = 0; key < count; ++key) {
      const float* value = values + int64_t{at[key]} * width + d;
      for (int lane = 0; lane < 2 * kLanes; ++lane) sum[lane] = multiply_add<Fused>(scores[key], value[lane], sum[lane]);
    }
    std::memcpy(state.sum + d, sum, sizeof sum);
  }
  for (; d < width; ++d) {
    float sum = state.sum[d] * keep;
    for (int key = 0; key < count; ++key) sum = multiply_add<Fused>(scores[key], values[int64_t{at[key]} * width + d], sum);
    state.sum[d] = sum;
  }
}

// The keys behind the last whole block of the prefix that row `row` sees, counted from there, in the order of its path.
DOVETAIL_INLINE int open_keys(const AttendTask& task, int row, int open_prefix, int32_t* at) {
  int count = 0;
  for (; count < open_prefix; ++count) at[count] = count;
  const int first_new = task.tail - task.num_rows;
  for (int key = 0; key < task.tail; ++key) {
    const bool seen = task.mask ? task.mask[int64_t{row} * task.tail + key] != 0 : key <= first_new + row;
    if (seen) at[count++] = open_prefix + key;
  }
  return count;
}

// Softmax over the keys of a row's own path in blocks of kKeyBlock positions. Whole blocks of the prefix are taken once for
// all rows; what lies behind is scored once for all rows and then read by each row along its path, so that a row of a tree
// goes through the very sums of the same row decoded alone.
template <bool Fused>
DOVETAIL_INLINE void attend_head(const AttendTask& task, float* scratch) {
  const int width = task.head_dim;
  const int heads = task.num_rows * task.group;
  const int closed = task.prefix / kKeyBlock * kKeyBlock;
  const int open_prefix = task.prefix - closed;
  const int open = open_prefix + task.tail;
  const int open_stride = (open + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  float* sums = scratch;
  float* largest = sums + int64_t{heads} * width;
  float* totals = largest + heads;
  float* scores = totals + heads;
  float* keys = scores + int64_t{heads} * open_stride;
  float* values = keys + int64_t{kKeyBlock} * width;
  int32_t* at = reinterpret_cast<int32_t*>(values + int64_t{open_stride} * width);
  std::memset(sums, 0, static_cast<size_t>(heads) * width * sizeof(float));
  for (int i = 0; i < heads; ++i) {
    largest[i] = -std::numeric_limits<float>::infinity();
    totals[i] = 0.0f;
  }
  for (int key = 0; key < kKeyBlock; ++key) at[key] = key;
  for (int first = 0; first < closed; first += kKeyBlock) {
    transpose_keys(task, first, kKeyBlock, keys);
    widen_values(task, first, kKeyBlock, values);
    for (int i = 0; i < heads; ++i) {
      float block[kKeyBlock];
      score<Fused>(task.query + i / task.group * task.row_stride + i % task.group * width, keys, width, block);
      Running state{largest[i], totals[i], sums + int64_t{i} * width};
      add_block<Fused>(state, block, kKeyBlock, values, at, width);
      largest[i] = state.largest;
      totals[i] = state.total;
    }
  }
  widen_values(task, closed, open, values);
  for (int first = 0; first < open; first += kKeyBlock) {
    transpose_keys(task, closed + first, open - first < kKeyBlock ? open - first : kKeyBlock, keys);
    for (int i = 0; i < heads; ++i) {
      score<Fused>(task.query + i / task.group * task.row_stride + i % task.group * width, keys, width,
                   scores + int64_t{i} * open_stride + first);
    }
  }
  for (int row = 0; row < task.num_rows; ++row) {
    const int seen = open_keys(task, row, open_prefix, at);
    for (int i = row * task.group; i < (row + 1) * task.group; ++i) {
      Running state{largest[i], totals[i], sums + int64_t{i} * width};
      for (int first = 0; first < seen; first += kKeyBlock) {
        const int count = seen - first < kKeyBlock ? seen - first : kKeyBlock;
        float block[kKeyBlock];
        for (int key = 0; key < count; ++key) block[key] = scores[int64_t{i} * open_stride + at[first + key]];
        add_block<Fused>(state, block, count, values, at + first, width);
      }
      float* out = task.output + row * task.row_stride + i % task.group * width;
      const float inverse = 1.0f / state.total;
      for (int d = 0; d < width; ++d) out[d] = state.sum[d] * inverse;
    }
  }
}

// One variant: the loops above, compiled under an instruction set's attribute.
#define DOVETAIL_LAYER_MATH(VARIANT, ATTRIBUTE, FUSED)                                                               \
  namespace VARIANT {                                                                                                \
  ATTRIBUTE void normalise(const float* x, const float* weight, float epsilon, int width, float* out) {              \
    normalise_row<FUSED>(x, weight, epsilon, width, out);                                                            \
  }                                                                                                                  \
  ATTRIBUTE void rotate(float* x, const float* cosine, const float* sine, int width) {                               \
    rotate_row(x, cosine, sine, width);                                                                              \
  }                                                                                                                  \
  ATTRIBUTE void swiglu(const float* gate, const float* up, int width, float* out) {                                 \
    swiglu_row<FUSED>(gate, up, width, out);                                                                         \
  }                                                                                                                  \
  ATTRIBUTE void attend(const AttendTask& task, float* scratch) { attend_head<FUSED>(task, scratch); }               \
  const LayerMath kMath = {#VARIANT, normalise, rotate, swiglu, attend};                                             \
  }

#if defined(__x86_64__) || defined(_M_X64)
DOVETAIL_LAYER_MATH(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))), true)
DOVETAIL_LAYER_MATH(avx2, __attribute__((target("avx2,fma"))), true)
#endif
#if defined(__aarch64__)
DOVETAIL_LAYER_MATH(portable, , true)
#else
DOVETAIL_LAYER_MATH(portable, , false)
#endif

}  // namespace

const LayerMath& layer_math() {
#if defined(__x86_64__) || defined(_M_X64)
  if (std::strncmp(instruction_set().name, "avx512", 6) == 0) return avx512::kMath;
  if (std::strcmp(instruction_set().name, "avx2") == 0) return avx2::kMath;
#endif
  return portable::kMath;
}

}  // namespace dovetail
