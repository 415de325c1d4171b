// The loops of layer_math.h over Vec. Included by layer_math.cpp once for each instruction set, after vec16.h.

// exp(x) to 2e-7 relative, for x from -87 to 88 and clamped beyond; NaN stays NaN. Without branches or tables.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = multiply_add(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23 leaves a rounded integer in the low bits
  const float power = shifted - 12582912.0f;
  float rest = multiply_add(power, -0.693359375f, x);  // ln 2 in two parts
  rest = multiply_add(power, 2.12194440e-4f, rest);
  float y = 1.3981999507e-3f;
  y = multiply_add(y, rest, 8.3334519073e-3f);
  y = multiply_add(y, rest, 4.1665795894e-2f);
  y = multiply_add(y, rest, 1.6666665459e-1f);
  y = multiply_add(y, rest, 5.0000001201e-1f);
  y = multiply_add(y, rest * rest, rest + 1.0f);
  return y * bits_float((float_bits(shifted) - 0x4b400000u + 127u) << 23);
}

inline float add_lanes(const float* lanes) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

void normalise(const float* x, const float* weight, float epsilon, int width, float* out) {
  float squares[kLanes] = {};
  int i = 0;
  Vec sum = load(squares);
  for (; i + kLanes <= width; i += kLanes) sum = multiply_add(load(x + i), load(x + i), sum);
  store(squares, sum);
  for (int lane = 0; i + lane < width; ++lane) squares[lane] = multiply_add(x[i + lane], x[i + lane], squares[lane]);
  const float inverse = 1.0f / std::sqrt(add_lanes(squares) / static_cast<float>(width) + epsilon);
  for (int j = 0; j < width; ++j) out[j] = weight[j] * (x[j] * inverse);
}

void rotate(float* x, const float* cosine, const float* sine, int width) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i];
    const float second = x[half + i];
    x[i] = first * cosine[i] - second * sine[i];
    x[half + i] = second * cosine[half + i] + first * sine[half + i];
  }
}

void swiglu(const float* gate, const float* up, int width, float* out) {
  for (int i = 0; i < width; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void silu(float* x, int width) {
  for (int i = 0; i < width; ++i) x[i] = x[i] / (1.0f + exponential(-x[i]));
}

void blend(const float* gate, const float* first, const float* second, int width, float* out) {
  for (int i = 0; i < width; ++i) out[i] = second[i] + (first[i] - second[i]) / (1.0f + exponential(-gate[i]));
}

float log_sum_exp(const float* x, int64_t count) {
  float largest = x[0];
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += exponential(x[i + lane] - largest);
  for (int lane = 0; i + lane < count; ++lane) sums[lane] += exponential(x[i + lane] - largest);
  return largest + std::log(add_lanes(sums));
}

inline void widen_rows(const void* from, bool bf16, int64_t first, int64_t count, float* out) {
  if (!bf16) {
    std::memcpy(out, static_cast<const float*>(from) + first, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* rows = static_cast<const uint16_t*>(from) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = bits_float(uint32_t{rows[i]} << 16);
}

#if DOVETAIL_VECTOR == 512
// 16 keys of 16 columns, `stride` floats from key to key, turned: out[column * kKeyBlock + key].
inline void transpose_square(const float* from, int64_t stride, float* out) {
  __m512 row[16], pair[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pair[i + j]);
      const __m512d high = _mm512_castps_pd(pair[i + j + 2]);
      row[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      row[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 4; ++i) {  // row[4 g + i]: column i, i + 4, i + 8, i + 12 of keys 4 g .. 4 g + 3
    const __m512 even = _mm512_shuffle_f32x4(row[i], row[4 + i], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(row[i], row[4 + i], 0xdd);
    const __m512 later_even = _mm512_shuffle_f32x4(row[8 + i], row[12 + i], 0x88);
    const __m512 later_odd = _mm512_shuffle_f32x4(row[8 + i], row[12 + i], 0xdd);
    _mm512_storeu_ps(out + i * kKeyBlock, _mm512_shuffle_f32x4(even, later_even, 0x88));
    _mm512_storeu_ps(out + (8 + i) * kKeyBlock, _mm512_shuffle_f32x4(even, later_even, 0xdd));
    _mm512_storeu_ps(out + (4 + i) * kKeyBlock, _mm512_shuffle_f32x4(odd, later_odd, 0x88));
    _mm512_storeu_ps(out + (12 + i) * kKeyBlock, _mm512_shuffle_f32x4(odd, later_odd, 0xdd));
  }
}
#else
inline void transpose_square(const float* from, int64_t stride, float* out) {
  for (int key = 0; key < 16; ++key)
    for (int column = 0; column < 16; ++column) out[column * kKeyBlock + key] = from[key * stride + column];
}
#endif

// Keys [first, first + count) as fp32 with the keys side by side: out[d][kKeyBlock]. Columns past count hold anything.
inline void transpose_keys(const AttendTask& task, int64_t first, int count, float* rows, float* out) {
  const int64_t width = task.head_dim;
  const float* from = rows;
  if (task.bf16 || count % 16 != 0) {
    widen_rows(task.keys, task.bf16, first * width, count * width, rows);
  } else {
    from = static_cast<const float*>(task.keys) + first * width;
  }
  for (int key = 0; key < count; key += 16)
    for (int64_t d = 0; d < width; d += 16) transpose_square(from + key * width + d, width, out + d * kKeyBlock + key);
}

// Scores of Rows queries against a block of turned keys; every key's sum runs over the head upwards, whatever Rows is.
template <int Rows>
inline void score(const float* const* queries, const float* keys, int width, float* const* scores) {
  for (int part = 0; part < kKeyBlock; part += kVectorsTogether * 16) {
    Vec sum[Rows][kVectorsTogether];
    for (auto& row : sum)
      for (Vec& s : row) s = broadcast(0.0f);
    for (int d = 0; d < width; ++d) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectorsTogether; ++j) {
        const Vec key = load(keys + d * kKeyBlock + part + j * 16);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[r][j] = multiply_add(broadcast(queries[r][d]), key, sum[r][j]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectorsTogether; ++j) store(scores[r] + part + j * 16, sum[r][j]);
  }
}

// The running softmax of one query: largest score, sum of weights, weighted sum of values.
struct Running {
  float largest;
  float total;
  float* sum;
  float keep;  // what the sum so far is worth after the block at hand
};

// Turns a block of scores into weights and rescales what came before. Positions past count weigh nothing.
inline void weigh(Running& state, float* scores, int count) {
  float largest = state.largest;
  for (int key = 0; key < count; ++key) largest = scores[key] > largest ? scores[key] : largest;
  for (int key = count; key < kKeyBlock; ++key) scores[key] = largest;
  for (int key = 0; key < kKeyBlock; ++key) scores[key] = exponential(scores[key] - largest);
  for (int key = count; key < kKeyBlock; ++key) scores[key] = 0.0f;
  float lanes[kLanes];
  Vec sum = load(scores);
  for (int key = kLanes; key < kKeyBlock; key += kLanes) sum = multiply_add(load(scores + key), broadcast(1.0f), sum);
  store(lanes, sum);
  state.keep = exponential(state.largest - largest);
  state.total = multiply_add(state.total, state.keep, add_lanes(lanes));
  state.largest = largest;
}

// sum = sum * keep + weights x values over `Vectors` vectors from column d; values[at[key]] is the row of the key-th.
template <int Rows, int Vectors>
inline void add_columns(const Running* states, const float* const* weights, int count, const float* values, const int32_t* at, int width, int d) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[r][j] = multiply(load(states[r].sum + d + j * 16), broadcast(states[r].keep));
  for (int key = 0; key < count; ++key) {
    const float* value = values + int64_t{at[key]} * width + d;
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const Vec v = load(value + j * 16);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r][j] = multiply_add(broadcast(weights[r][key]), v, sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(states[r].sum + d + j * 16, sum[r][j]);
}

template <int Rows>
inline void add_values(const Running* states, const float* const* weights, int count, const float* values, const int32_t* at, int width) {
  int d = 0;
  for (; d + kVectorsTogether * 16 <= width; d += kVectorsTogether * 16) add_columns<Rows, kVectorsTogether>(states, weights, count, values, at, width, d);
  for (; d < width; d += 16) add_columns<Rows, 1>(states, weights, count, values, at, width, d);
}

// The scratch memory of one task, cut up.
struct Buffers {
  Running* states;  // one for each row and head
  float* scores;    // [states, open_stride]: of the keys behind the last whole block of the prefix
  float* turned;    // [head_dim][kKeyBlock]
  float* rows;      // [kKeyBlock][head_dim]: keys on their way to `turned`
  float* values;    // [open_stride][head_dim]
  int32_t* at;
  int open_stride;
};

inline Buffers cut(const AttendTask& task, float* scratch) {
  const int64_t heads = int64_t{task.num_rows} * task.group;
  const int64_t width = task.head_dim;
  const int open = task.prefix % kKeyBlock + task.tail;
  const int open_stride = (open + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  Buffers b;
  b.open_stride = open_stride;
  b.states = reinterpret_cast<Running*>(scratch);
  float* sums = scratch + heads * static_cast<int64_t>(sizeof(Running) / sizeof(float));
  b.scores = sums + heads * width;
  b.turned = b.scores + heads * open_stride;
  b.rows = b.turned + kKeyBlock * width;
  b.values = b.rows + kKeyBlock * width;
  b.at = reinterpret_cast<int32_t*>(b.values + open_stride * width);
  for (int64_t i = 0; i < heads; ++i) b.states[i] = {-std::numeric_limits<float>::infinity(), 0.0f, sums + i * width, 1.0f};
  std::memset(sums, 0, static_cast<size_t>(heads * width) * sizeof(float));
  return b;
}

inline const float* query_of(const AttendTask& task, int i) {
  return task.query + i / task.group * task.row_stride + i % task.group * task.head_dim;
}

// Scores queries [first, end) against the turned keys, into rows `stride` apart.
inline void score_all(const AttendTask& task, const float* turned, int first, int end, float* scores, int64_t stride) {
  for (int i = first; i < end;) {
    const float* queries[kRowsTogether];
    float* outs[kRowsTogether];
    const int together = i + kRowsTogether <= end ? kRowsTogether : 1;
    for (int r = 0; r < together; ++r) {
      queries[r] = query_of(task, i + r);
      outs[r] = scores + (i - first + r) * stride;
    }
    together == 1 ? score<1>(queries, turned, task.head_dim, outs) : score<kRowsTogether>(queries, turned, task.head_dim, outs);
    i += together;
  }
}

// Takes a block of up to kKeyBlock keys into the states of queries [first, end), whose scores lie kKeyBlock apart.
inline void take_block(const AttendTask& task, const Buffers& b, int first, int end, float* scores, int count, const int32_t* at) {
  for (int i = first; i < end;) {
    const float* weights[kRowsTogether];
    const int together = i + kRowsTogether <= end ? kRowsTogether : 1;
    for (int r = 0; r < together; ++r) {
      float* block = scores + int64_t{i - first + r} * kKeyBlock;
      weigh(b.states[i + r], block, count);
      weights[r] = block;
    }
    together == 1 ? add_values<1>(b.states + i, weights, count, b.values, at, task.head_dim)
                  : add_values<kRowsTogether>(b.states + i, weights, count, b.values, at, task.head_dim);
    i += together;
  }
}

// The keys behind the last whole block of the prefix that row `row` sees, counted from there, in the order of its path.
inline int open_keys(const AttendTask& task, int row, int open_prefix, int32_t* at) {
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
void attend(const AttendTask& task, float* scratch) {
  constexpr int together = 8;  // queries whose scores of one block are held at a time
  const int width = task.head_dim;
  const int heads = task.num_rows * task.group;
  const int closed = task.prefix / kKeyBlock * kKeyBlock;
  const int open = task.prefix - closed + task.tail;
  const Buffers b = cut(task, scratch);
  float blocks[together * kKeyBlock];
  for (int key = 0; key < kKeyBlock; ++key) b.at[key] = key;
  for (int first = 0; first < closed; first += kKeyBlock) {
    transpose_keys(task, first, kKeyBlock, b.rows, b.turned);
    widen_rows(task.values, task.bf16, int64_t{first} * width, int64_t{kKeyBlock} * width, b.values);
    for (int i = 0; i < heads; i += together) {
      const int end = i + together < heads ? i + together : heads;
      score_all(task, b.turned, i, end, blocks, kKeyBlock);
      take_block(task, b, i, end, blocks, kKeyBlock, b.at);
    }
  }
  for (int first = 0; first < open; first += kKeyBlock) {
    transpose_keys(task, closed + first, open - first < kKeyBlock ? open - first : kKeyBlock, b.rows, b.turned);
    score_all(task, b.turned, 0, heads, b.scores + first, b.open_stride);
  }
  widen_rows(task.values, task.bf16, int64_t{closed} * width, int64_t{open} * width, b.values);
  for (int row = 0; row < task.num_rows; ++row) {
    const int seen = open_keys(task, row, task.prefix - closed, b.at);
    for (int i = row * task.group; i < (row + 1) * task.group; i += together) {
      const int end = i + together < (row + 1) * task.group ? i + together : (row + 1) * task.group;
      for (int first = 0; first < seen; first += kKeyBlock) {
        const int count = seen - first < kKeyBlock ? seen - first : kKeyBlock;
        for (int j = i; j < end; ++j)
          for (int key = 0; key < count; ++key) blocks[(j - i) * kKeyBlock + key] = b.scores[int64_t{j} * b.open_stride + b.at[first + key]];
        take_block(task, b, i, end, blocks, count, b.at + first);
      }
      for (int j = i; j < end; ++j) {
        float* out = task.output + row * task.row_stride + j % task.group * width;
        const float inverse = 1.0f / b.states[j].total;
        for (int d = 0; d < width; ++d) out[d] = b.states[j].sum[d] * inverse;
      }
    }
  }
}
