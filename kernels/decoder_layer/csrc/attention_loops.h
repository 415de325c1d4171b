// Attention over one key head, for one instruction set. Included by layer_math.cpp after attention_words.h.

// The running softmax of some queries: largest score, sum of weights (one per lane), weighted sum of values.
struct Softmax {
  float* largest;  // [queries]
  float* totals;   // [queries][kLanes]
  float* sums;     // [queries][head_dim]
};

inline Softmax softmax_at(const AttendTask& task, float* memory) {
  const int64_t queries = task.num_queries();
  const int64_t rounded = (queries + kLanes - 1) / kLanes * kLanes;
  return {memory, memory + rounded, memory + rounded + queries * kLanes};
}

inline void start(const Softmax& s, int width, int first, int end) {
  for (int i = first; i < end; ++i) s.largest[i] = -std::numeric_limits<float>::infinity();
  std::memset(s.totals + first * kLanes, 0, static_cast<size_t>(end - first) * kLanes * sizeof(float));
  std::memset(s.sums + int64_t{first} * width, 0, static_cast<size_t>(end - first) * static_cast<size_t>(width) * sizeof(float));
}

inline void scale_add(float* to, Vec keep, const float* more, Vec worth, int width) {
  for (int i = 0; i < width; i += 16) store(to + i, multiply_add(load(more + i), worth, multiply(load(to + i), keep)));
}

// Folds the softmax of a later chunk into `to`, for queries [first, end).
inline void fold(const Softmax& to, const Softmax& chunk, int width, int first, int end) {
  for (int i = first; i < end; ++i) {
    const float largest = to.largest[i] > chunk.largest[i] ? to.largest[i] : chunk.largest[i];
    const Vec keep = exponential2(broadcast(to.largest[i] - largest));
    const Vec worth = exponential2(broadcast(chunk.largest[i] - largest));
    scale_add(to.totals + i * kLanes, keep, chunk.totals + i * kLanes, worth, kLanes);
    scale_add(to.sums + int64_t{i} * width, keep, chunk.sums + int64_t{i} * width, worth, width);
    to.largest[i] = largest;
  }
}

// The same for the chunk of keys up to `stop`, for the rows that see any of them.
inline void fold_seen(const AttendTask& task, const Softmax& to, const Softmax& chunk, int stop) {
  if (task.window.highest < stop) return fold(to, chunk, task.head_dim, 0, task.num_queries());
  for (int row = 0; row < task.num_rows; ++row)
    if (task.window.first[row] < stop) fold(to, chunk, task.head_dim, row * task.group, (row + 1) * task.group);
}

// The scratch memory of one task, cut up. Rows of keys and values are [rows][words], blocks of values [head_dim] words a pack.
struct Buffers {
  Softmax running;
  Softmax chunk;
  uint32_t* queries;  // [queries][words]
  uint32_t* turned;   // [words, rounded up to 16][kKeyBlock]
  uint32_t* joined;   // [open, rounded up to blocks, / pack][head_dim]
  uint32_t* rest;     // [kKeyBlock / pack][head_dim]: of one row's own path
  uint32_t* rows;     // [open, rounded up to blocks][words]
  float* scores;      // [queries][open_stride]
  int32_t* at;        // [open]
  int words;          // of a row
  int open_stride;
};

template <typename Words>
inline Buffers cut(const AttendTask& task, float* scratch) {
  const int64_t queries = task.num_queries();
  const int64_t width = task.head_dim;
  Buffers b;
  b.open_stride = (task.open() + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const int64_t blocks = b.open_stride > kKeyBlock ? b.open_stride : kKeyBlock;
  b.words = static_cast<int>(width / Words::kPack);
  float* at = scratch;
  const auto take = [&at](int64_t count) {
    float* taken = at;
    at += (count + 15) / 16 * 16;
    return taken;
  };
  b.running = softmax_at(task, take(partial_floats(task)));
  b.chunk = softmax_at(task, take(partial_floats(task)));
  b.queries = reinterpret_cast<uint32_t*>(take(queries * width));
  b.turned = reinterpret_cast<uint32_t*>(take((width + 16) * kKeyBlock));
  b.joined = reinterpret_cast<uint32_t*>(take(blocks * width));
  b.rest = reinterpret_cast<uint32_t*>(take(kKeyBlock * width));
  b.rows = reinterpret_cast<uint32_t*>(take(blocks * width + 16));
  b.scores = take(queries * b.open_stride);
  b.at = reinterpret_cast<int32_t*>(take(blocks));
  return b;
}

template <typename Words>
inline void take_queries(const AttendTask& task, const Buffers& b) {
  const Vec scale = broadcast(task.scale * kLog2E);
  for (int i = 0; i < task.num_queries(); ++i) {
    const float* query = task.query + i / task.group * task.row_stride + i % task.group * task.head_dim;
    for (int d = 0; d < task.head_dim; d += 16) {
      float scaled[16];
      store(scaled, multiply(load(query + d), scale));
      Words::from_floats(scaled, 16, b.queries + int64_t{i} * b.words + d / Words::kPack);
    }
  }
}

// Rows [first, first + count) as words: those of the cache itself where it holds such words, else converted into `rows`.
template <typename Words>
inline const uint32_t* rows_of(const AttendTask& task, const CacheRows& cache, int first, int count, bool whole, uint32_t* rows) {
  const int64_t at = int64_t{first} * task.head_dim;
  if (whole && Words::holds(task.format)) return reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(cache.data) + at * element_bytes(task.format));
  Words::widen_rows(cache.data, task.format, at, int64_t{count} * task.head_dim, rows);
  return rows;
}

// Turns up to kKeyBlock keys from `first` on, so that they lie side by side. What lies past count may be anything.
template <typename Words>
inline void turn_keys(const AttendTask& task, const Buffers& b, int first, int count) {
  const uint32_t* rows = rows_of<Words>(task, task.keys, first, count, count % 16 == 0 && b.words % 16 == 0, b.rows);
  for (int key = 0; key < count; key += 16)
    for (int word = 0; word < b.words; word += 16) transpose_square(rows + key * b.words + word, b.words, b.turned + word * kKeyBlock + key);
}

// Joins the rows at[0 .. count) in packs; zeros fill the last one.
template <typename Words>
inline void join_values(const uint32_t* rows, const int32_t* at, int count, int width, uint32_t* out) {
  const int words = width / Words::kPack;
  int key = 0;
  for (; key + Words::kPack <= count; key += Words::kPack, out += width)
    Words::template join_rows<true>(rows + int64_t{at[key]} * words, rows + int64_t{at[key + Words::kPack - 1]} * words, width, out);
  if (key < count) Words::template join_rows<false>(rows + int64_t{at[key]} * words, nullptr, width, out);
}

// Soft cap of one row against a block of keys: s becomes cap * tanh(s / cap).
inline void cap_scores(float* scores, float cap) {
  for (int k = 0; k < kKeyBlock; k += 16)
    store(scores + k, multiply(broadcast(cap), hyperbolic_tangent(divide(load(scores + k), broadcast(cap)))));
}

// Scores of queries [first, end) against the turned keys, whose first is `key` of the cache, into rows `stride` apart.
template <typename Words>
inline void score(const AttendTask& task, const Buffers& b, int first, int end, int key, int count, float* scores, int64_t stride) {
  for (int i = first; i < end; i += kRowsTogether) {
    const int rows = i + kRowsTogether <= end ? kRowsTogether : end - i;
    float* out = scores + (i - first) * stride;
    multiply<Words, true>(rows, b.queries + int64_t{i} * b.words, b.words, b.turned, kKeyBlock, b.words, nullptr, out, stride, kKeyBlock);
    for (int r = 0; task.keys.scales != nullptr && r < rows; ++r)
      for (int k = 0; k < count; ++k) out[r * stride + k] *= task.keys.scales[key + k];
    for (int r = 0; task.cap > 0.0f && r < rows; ++r) cap_scores(out + r * stride, task.cap * kLog2E);
  }
}

// Takes one block of up to kKeyBlock scores of queries [first, first + rows), kKeyBlock apart, into their softmax. `weights` gets
// what the values are multiplied by, as words; `keep` what each sum so far is worth. Positions past count weigh nothing.
template <typename Words>
inline void weigh(const Softmax& s, int first, int rows, float* scores, int count, const float* value_scales, uint32_t* weights, float* keep) {
  float change[16] = {};
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyBlock;
    for (int key = count; key < kKeyBlock; ++key) row[key] = -std::numeric_limits<float>::infinity();
    const Vec highest = maximum(maximum(load(row), load(row + 16)), maximum(load(row + 32), load(row + 48)));
    const float before = s.largest[first + r];
    const float block_largest = largest_lane(highest);
    const float largest = before > block_largest ? before : block_largest;
    change[r] = before - largest;
    s.largest[first + r] = largest;
  }
  store(keep, exponential2(load(change)));
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyBlock;
    const Vec level = broadcast(s.largest[first + r]);
    Vec part[kKeyBlock / 16];
    for (int j = 0; j < kKeyBlock / 16; ++j) part[j] = exponential2(subtract(load(row + j * 16), level));
    for (int j = 0; j < kKeyBlock / 16; ++j) store(row + j * 16, part[j]);
    if (count < kKeyBlock) {
      for (int key = count; key < kKeyBlock; ++key) row[key] = 0.0f;
      for (int j = 0; j < kKeyBlock / 16; ++j) part[j] = load(row + j * 16);
    }
    float* totals = s.totals + (first + r) * kLanes;
    store(totals, multiply_add(load(totals), broadcast(keep[r]), add(add(part[0], part[1]), add(part[2], part[3]))));
    if (value_scales != nullptr)
      for (int j = 0; j < kKeyBlock / 16; ++j) store(row + j * 16, multiply(part[j], load(value_scales + j * 16)));
    Words::from_floats(row, kKeyBlock, weights + r * (kKeyBlock / Words::kPack));
  }
}

// Asks for `count` lines of memory from line `first` on, if they are among the `bytes` of `data`.
inline void fetch_lines(const void* data, int64_t bytes, int64_t first, int64_t count) {
  const char* p = static_cast<const char*>(data);
  for (int64_t at = first * 64; at < (first + count) * 64 && at < bytes; at += 64) __builtin_prefetch(p + at);
}

constexpr float kWhole[4] = {1.0f, 1.0f, 1.0f, 1.0f};
static_assert(kRowsTogether <= 4);

// Keys that one row takes: those at `first` + at[0 .. count) of the cache. `values` begin at `first`; the first `shared` packs of
// those taken lie joined at `joined` already.
struct RowKeys {
  int first;
  const int32_t* at;
  int count;
  const uint32_t* values;
  const uint32_t* joined;
  int shared;
};

// Takes them into the softmax of the row's queries. fill(i, count, scores) writes the scores of queries from i on, kKeyBlock apart.
template <typename Words, typename Fill>
inline void take_row(const AttendTask& task, const Buffers& b, const Softmax& s, int row, const RowKeys& keys, const Fill& fill) {
  constexpr int packs = kKeyBlock / Words::kPack;
  const int width = task.head_dim;
  const int ready = keys.shared * Words::kPack;
  const int own = (keys.count + Words::kPack - 1) / Words::kPack - keys.shared;
  join_values<Words>(keys.values, keys.at + ready, keys.count - ready, width, b.rest);
  float value_scales[kKeyBlock] = {};
  const bool scaled = task.values.scales != nullptr;
  for (int key = 0; scaled && key < keys.count; ++key) value_scales[key] = task.values.scales[keys.first + keys.at[key]];
  const int end = (row + 1) * task.group;
  for (int i = row * task.group; i < end; i += kRowsTogether) {
    const int count = i + kRowsTogether <= end ? kRowsTogether : end - i;
    float keep[16];
    float scores[kRowsTogether * kKeyBlock];
    uint32_t weights[kRowsTogether * packs];
    fill(i, count, scores);
    weigh<Words>(s, i, count, scores, keys.count, scaled ? value_scales : nullptr, weights, keep);
    float* sums = s.sums + int64_t{i} * width;
    multiply<Words, false>(count, weights, packs, keys.joined, width, keys.shared, keep, sums, width, width);
    multiply<Words, false>(count, weights + keys.shared, packs, b.rest, width, own, kWhole, sums, width, width);
  }
}

// Takes the block of keys from `first` on, where windows begin: each row what it sees of it, if anything.
template <typename Words>
inline void take_edge(const AttendTask& task, const Buffers& b, const Softmax& s, const uint32_t* values, int first) {
  int32_t at[kKeyBlock];
  for (int key = 0; key < kKeyBlock; ++key) at[key] = key;
  for (int row = 0; row < task.num_rows; ++row) {
    const int hidden = task.window.first[row] > first ? task.window.first[row] - first : 0;
    if (hidden >= kKeyBlock) continue;
    const int seen = kKeyBlock - hidden;
    take_row<Words>(task, b, s, row, {first, at + hidden, seen, values, b.joined, 0}, [&](int i, int count, float* scores) {
      score<Words>(task, b, i, i + count, first, kKeyBlock, scores, kKeyBlock);
      for (int r = 0; r < count; ++r) std::memmove(scores + r * kKeyBlock, scores + r * kKeyBlock + hidden, static_cast<size_t>(seen) * sizeof(float));
    });
  }
}

// Takes the whole blocks of keys [first, end), a part of one chunk, into the softmax of all queries.
template <typename Words>
inline void take_blocks(const AttendTask& task, const Buffers& b, const Softmax& s, int first, int end) {
  constexpr int packs = kKeyBlock / Words::kPack;
  float scores[kRowsTogether * kKeyBlock];
  uint32_t weights[kRowsTogether * packs];
  float keep[16];
  int32_t in_order[kKeyBlock];
  for (int key = 0; key < kKeyBlock; ++key) in_order[key] = key;
  const int64_t row_bytes = task.head_dim * element_bytes(task.format);
  const int64_t block_lines = kKeyBlock * row_bytes / 64;
  const int64_t turns = (task.num_queries() + kRowsTogether - 1) / kRowsTogether;
  const int64_t lines_a_turn = (block_lines + turns - 1) / turns;
  for (; first < end; first += kKeyBlock) {
    const int64_t next = (first + kKeyBlock) * row_bytes;
    const int64_t next_bytes = (task.prefix + task.tail) * row_bytes - next;
    turn_keys<Words>(task, b, first, kKeyBlock);
    const uint32_t* rows = rows_of<Words>(task, task.values, first, kKeyBlock, true, b.rows);
    if (first < task.window.highest) {
      take_edge<Words>(task, b, s, rows, first);
      continue;
    }
    join_values<Words>(rows, in_order, kKeyBlock, task.head_dim, b.joined);
    const float* value_scales = task.values.scales == nullptr ? nullptr : task.values.scales + first;
    for (int i = 0; i < task.num_queries(); i += kRowsTogether) {
      const int count = i + kRowsTogether <= task.num_queries() ? kRowsTogether : task.num_queries() - i;
      const int64_t line = i / kRowsTogether * lines_a_turn;
      fetch_lines(static_cast<const char*>(task.keys.data) + next, next_bytes, line, lines_a_turn);
      fetch_lines(static_cast<const char*>(task.values.data) + next, next_bytes, line, lines_a_turn);
      score<Words>(task, b, i, i + count, first, kKeyBlock, scores, kKeyBlock);
      weigh<Words>(s, i, count, scores, kKeyBlock, value_scales, weights, keep);
      multiply<Words, false>(count, weights, packs, b.joined, task.head_dim, packs, keep, s.sums + int64_t{i} * task.head_dim, task.head_dim, task.head_dim);
    }
  }
}

// The keys behind the closed ones that row `row` sees, counted from there, in the order of its path.
struct Path {
  int32_t* at;
  int length;
  int in_order;  // leading keys that are where they would be without a tree
};

inline Path path_of(const AttendTask& task, int row, int32_t* at) {
  const int common = task.prefix - task.closed();
  const int first_new = task.tail - task.num_rows;
  Path path{at, 0, 0};
  for (; path.length < common; ++path.length) at[path.length] = path.length;
  for (int key = 0; key < task.tail; ++key) {
    const bool seen = task.mask ? task.mask[int64_t{row} * task.tail + key] != 0 : key <= first_new + row;
    if (seen) at[path.length++] = common + key;
  }
  while (path.in_order < path.length && at[path.in_order] == path.in_order) ++path.in_order;
  return path;
}

// Takes the keys [from, from + count) of a row's path into the softmax of its queries. `values` are the open ones; the keys in
// order have their packs in `joined` already, where `from` begins one.
template <typename Words>
inline void take_path(const AttendTask& task, const Buffers& b, const uint32_t* values, const Path& path, int row, int from, int count) {
  const int ready = from % Words::kPack == 0 ? path.in_order - from : 0;
  const int in_order = ready < count ? (ready > 0 ? ready : 0) : count;
  const uint32_t* joined = b.joined + int64_t{from} / Words::kPack * task.head_dim;
  const RowKeys keys{task.closed(), path.at + from, count, values, joined, in_order / Words::kPack};
  take_row<Words>(task, b, b.chunk, row, keys, [&](int i, int queries, float* scores) {
    for (int r = 0; r < queries; ++r) {
      const float* all = b.scores + int64_t{i + r} * b.open_stride;
      float* own = scores + r * kKeyBlock;
      std::memcpy(own, all + from, static_cast<size_t>(in_order) * sizeof(float));
      for (int key = in_order; key < count; ++key) own[key] = all[path.at[from + key]];
    }
  });
}

inline void finish(const AttendTask& task, const Softmax& s, int i) {
  float lanes[kLanes];
  store(lanes, load(s.totals + i * kLanes));
  const Vec inverse = broadcast(1.0f / add_lanes(lanes));
  float* out = task.output + i / task.group * task.row_stride + i % task.group * task.head_dim;
  for (int d = 0; d < task.head_dim; d += 16) store(out + d, multiply(load(s.sums + int64_t{i} * task.head_dim + d), inverse));
}

// The keys behind the closed blocks: scored once for all rows, then taken by each row along its path.
template <typename Words>
inline void take_open(const AttendTask& task, const Buffers& b) {
  const int closed = task.closed();
  const int open = task.open();
  for (int first = 0; first < open; first += kKeyBlock) {
    const int count = open - first < kKeyBlock ? open - first : kKeyBlock;
    turn_keys<Words>(task, b, closed + first, count);
    score<Words>(task, b, 0, task.num_queries(), closed + first, count, b.scores + first, b.open_stride);
  }
  for (int key = 0; key < open; ++key) b.at[key] = key;
  const uint32_t* rows = rows_of<Words>(task, task.values, closed, open, true, b.rows);
  join_values<Words>(rows, b.at, open, task.head_dim, b.joined);
  for (int row = 0; row < task.num_rows; ++row) {
    const Path path = path_of(task, row, b.at);
    const int first = row * task.group;
    const int end = first + task.group;
    const int hidden = task.window.highest > closed && task.window.first[row] > closed ? task.window.first[row] - closed : 0;
    const int first_block = hidden / kKeyBlock * kKeyBlock;
    for (int block = first_block; block < path.length; block += kKeyBlock) {
      if (block > first_block && (closed + block) % kKeyChunk == 0) {
        fold(b.running, b.chunk, task.head_dim, first, end);
        start(b.chunk, task.head_dim, first, end);
      }
      const int from = hidden > block ? hidden : block;
      const int stop = path.length - block < kKeyBlock ? path.length : block + kKeyBlock;
      take_path<Words>(task, b, rows, path, row, from, stop - from);
    }
    fold(b.running, b.chunk, task.head_dim, first, end);
    for (int i = first; i < end; ++i) finish(task, b.running, i);
  }
}

template <typename Words>
inline void attend_as(const AttendTask& task, float* scratch) {
  const Buffers b = cut<Words>(task, scratch);
  const int queries = task.num_queries();
  const int closed = task.closed();
  take_queries<Words>(task, b);
  start(b.running, task.head_dim, 0, queries);
  start(b.chunk, task.head_dim, 0, queries);
  for (int chunk = 0; chunk < task.num_partials; ++chunk) {
    const Softmax partial = softmax_at(task, const_cast<float*>(task.partials) + chunk * partial_floats(task));
    fold_seen(task, b.running, partial, (task.first_chunk() + chunk + 1) * kKeyChunk);
  }
  for (int first = (task.first_chunk() + task.num_partials) * kKeyChunk; first < closed; first += kKeyChunk) {
    const bool whole = first + kKeyChunk <= closed;
    take_blocks<Words>(task, b, b.chunk, first > task.begin() ? first : task.begin(), whole ? first + kKeyChunk : closed);
    if (!whole) break;
    fold_seen(task, b.running, b.chunk, first + kKeyChunk);
    start(b.chunk, task.head_dim, 0, queries);
  }
  take_open<Words>(task, b);
}

template <typename Words>
inline void attend_chunk_as(const AttendTask& task, int chunk, float* partial, float* scratch) {
  const Buffers b = cut<Words>(task, scratch);
  const Softmax s = softmax_at(task, partial);
  take_queries<Words>(task, b);
  start(s, task.head_dim, 0, task.num_queries());
  const int first = chunk * kKeyChunk;
  take_blocks<Words>(task, b, s, first > task.begin() ? first : task.begin(), first + kKeyChunk);
}

#ifdef DOVETAIL_BF16_DOTS
void attend_task(const AttendTask& task, float* scratch) {
  task.format == CacheFormat::kFp32 ? attend_as<Fp32Words>(task, scratch) : attend_as<Bf16Words>(task, scratch);
}

void attend_chunk(const AttendTask& task, int chunk, float* partial, float* scratch) {
  task.format == CacheFormat::kFp32 ? attend_chunk_as<Fp32Words>(task, chunk, partial, scratch) : attend_chunk_as<Bf16Words>(task, chunk, partial, scratch);
}
#else
void attend_task(const AttendTask& task, float* scratch) { attend_as<Fp32Words>(task, scratch); }

void attend_chunk(const AttendTask& task, int chunk, float* partial, float* scratch) { attend_chunk_as<Fp32Words>(task, chunk, partial, scratch); }
#endif
