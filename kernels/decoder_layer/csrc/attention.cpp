// Attention tasks on threads: whole tasks where there are enough, else their chunks first.
#include "attention.h"

#include <algorithm>

#include "layer_math.h"
#include "profile.h"

namespace dovetail {

float* AlignedFloats::reserve(int64_t count) {
  constexpr size_t line = 64;
  if (count > size_) {
    memory_.reset(new float[static_cast<size_t>(count) + line / sizeof(float)]);
    size_ = count;
  }
  const size_t past = reinterpret_cast<size_t>(memory_.get()) % line;
  return memory_.get() + (past == 0 ? 0 : (line - past) / sizeof(float));
}

namespace {

float* scratch_for(const AttendTask& task) {
  thread_local AlignedFloats scratch;
  return scratch.reserve(attend_scratch(task));
}

struct Piece {
  AttendTask* task;
  int index;  // of the chunk, from the task's first on
};

// Computes every task's whole chunks, one piece of work each, into `partials`.
void attend_chunks(Pool& pool, AlignedFloats& partials, std::vector<AttendTask>& tasks) {
  const LayerMath& math = layer_math();
  std::vector<Piece> pieces;
  int64_t floats = 0;
  for (AttendTask& task : tasks) {
    for (int i = 0; i < task.whole_chunks(); ++i) pieces.push_back({&task, i});
    floats += task.whole_chunks() * partial_floats(task);
  }
  float* memory = partials.reserve(floats);
  for (AttendTask& task : tasks) {
    task.partials = memory;
    memory += task.whole_chunks() * partial_floats(task);
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const AttendTask& task = *pieces[i].task;
      float* partial = const_cast<float*>(task.partials) + pieces[i].index * partial_floats(task);
      math.attend_chunk(task, task.first_chunk() + pieces[i].index, partial, scratch_for(task));
      lap(Part::kAttention);
    }
  };
  pool.run(static_cast<int64_t>(pieces.size()), 1, body);
  for (AttendTask& task : tasks) task.num_partials = task.whole_chunks();
}

}  // namespace

int64_t attend_scratch(const AttendTask& task) {
  const int64_t width = task.head_dim;
  const int64_t queries = task.num_queries();
  const int64_t open = task.open() + kKeyBlock;  // rounded up to blocks
  const int64_t rounding = 16 * 16;              // every part starts on a line
  return 2 * partial_floats(task) + queries * (width + open) + (2 * width + 16) * kKeyBlock + open * (2 * width + 1) + rounding;
}

void attend(Pool& pool, AlignedFloats& partials, std::vector<AttendTask>& tasks) {
  const LayerMath& math = layer_math();
  const auto count = static_cast<int64_t>(tasks.size());
  const bool few = pool.threads() > 1 && count < int64_t{2} * pool.threads();
  if (few && std::any_of(tasks.begin(), tasks.end(), [](const AttendTask& task) { return task.whole_chunks() > 0; })) {
    attend_chunks(pool, partials, tasks);
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      math.attend_task(tasks[i], scratch_for(tasks[i]));
      lap(Part::kAttention);
    }
  };
  pool.run(count, 1, body);
}

}  // namespace dovetail
