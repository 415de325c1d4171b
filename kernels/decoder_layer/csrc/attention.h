// Attention of new rows over the cached keys of their sequence.
//
// A row goes through the keys of its own path in the order of their positions: in blocks of kKeyBlock counted from position 0,
// each one step of an online softmax, and in chunks of kKeyChunk, each a softmax of its own that is folded into the one before.
// Both are fixed by position, so a row's result depends on nothing but the row and the keys it sees, bit for bit: not on the
// rows beside it, the length of the prefix it arrived with, or the threads that share its keys.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pool.h"

namespace dovetail {

constexpr int kKeyBlock = 64;
constexpr int kKeyChunk = 512;
constexpr int kLanes = 16;  // partial sums of a reduction: fixed, whatever the vector width

// How a slot holds keys and values. int8: signed bytes, with one fp32 scale for each position and head.
enum class CacheFormat : int32_t { kFp32, kBf16, kInt8 };

inline int64_t element_bytes(CacheFormat format) { return format == CacheFormat::kFp32 ? 4 : format == CacheFormat::kBf16 ? 2 : 1; }

// Keys or values of one slot and key head.
struct CacheRows {
  const void* data;     // [capacity, head_dim]
  const float* scales;  // [capacity] with int8, else null
};

// What a sliding window leaves of the keys: each row sees its path from a position of its own on.
struct Window {
  const int32_t* first = nullptr;  // [num_rows] that position; null: every row sees all of its path
  int lowest = 0;                  // of these
  int highest = 0;
};

// One key head of one segment: `num_rows` new rows times the query heads that share the key head.
struct AttendTask {
  CacheRows keys;
  CacheRows values;
  CacheFormat format;
  int head_dim;          // a multiple of 16
  int prefix;            // keys that every row sees
  int tail;              // keys behind them, the new rows last
  int num_rows;
  const uint8_t* mask;   // [num_rows, tail]: nonzero where the row sees that key of the tail; null for causal rows
  int group;             // query heads
  float scale;           // of the scores
  float cap;             // scores s become cap * tanh(s / cap); 0: they stay
  Window window;
  const float* query;    // row r, head h of the group: query + r * row_stride + h * head_dim
  float* output;         // the same places
  int64_t row_stride;
  const float* partials = nullptr;  // the softmax of each chunk from first_chunk on, where others have computed them
  int num_partials = 0;

  int num_queries() const { return num_rows * group; }
  int closed() const { return prefix / kKeyBlock * kKeyBlock; }  // keys in whole blocks that every row sees
  int open() const { return prefix + tail - closed(); }          // the keys behind them
  int begin() const { return window.lowest / kKeyBlock * kKeyBlock; }  // blocks before are seen by none
  int first_chunk() const { return begin() / kKeyChunk; }
  int whole_chunks() const {  // closed ones from first_chunk on
    const int count = closed() / kKeyChunk - first_chunk();
    return count > 0 ? count : 0;
  }
};

// Floats of one chunk's softmax for all queries of a task.
inline int64_t partial_floats(const AttendTask& task) {
  return int64_t{task.num_queries()} * (task.head_dim + kLanes) + (task.num_queries() + kLanes - 1) / kLanes * kLanes;
}

// Floats of scratch memory that attending a task wants, aligned to 64 bytes.
int64_t attend_scratch(const AttendTask& task);

// Floats that start on a cache line; grows to the largest asked for.
class AlignedFloats {
 public:
  float* reserve(int64_t count);

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

// Attends all tasks on the pool's threads. Tasks too few for the threads are shared out chunk by chunk, by way of `partials`.
// A task's output may take the place of its queries.
void attend(Pool& pool, AlignedFloats& partials, std::vector<AttendTask>& tasks);

}  // namespace dovetail
