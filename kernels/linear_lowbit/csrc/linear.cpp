#include "linear.h"

#include <algorithm>
#include <cstring>

namespace dovetail {
namespace {

const InstructionSet* const* instruction_sets() {  // fastest first; the last one runs anywhere
  static const InstructionSet* const sets[] = {avx512_bf16(), avx512(), avx_vnni(), avx2(), arm_dotprod(), portable()};
  return sets;
}

constexpr int kInstructionSets = 6;
const InstructionSet* g_chosen = nullptr;

bool usable(const InstructionSet* set) { return set != nullptr && set->supported(); }

}  // namespace

const InstructionSet& instruction_set() {
  if (g_chosen == nullptr) g_chosen = *std::find_if(instruction_sets(), instruction_sets() + kInstructionSets, usable);
  return *g_chosen;
}

uint8_t* Workspace::reserve(size_t bytes) {
  constexpr size_t line = 64;
  if (bytes + line > size_) {
    memory_.reset(new uint8_t[bytes + line]);
    size_ = bytes + line;
  }
  const size_t address = reinterpret_cast<size_t>(memory_.get());
  return memory_.get() + (line - address % line) % line;
}

Activations Workspace::activations(const Packed& w, int rows) {
  const size_t values = static_cast<size_t>(rows) * w.columns() * w.element_bytes();
  const size_t offsets = static_cast<size_t>(rows) * w.groups() * sizeof(int32_t);
  uint8_t* memory = reserve(values + offsets + static_cast<size_t>(rows) * w.spans() * sizeof(float));
  return {memory, reinterpret_cast<int32_t*>(memory + values), reinterpret_cast<float*>(memory + values + offsets)};
}

Activations tile_at(const Activations& a, const Packed& w, int first) {
  return {a.values + first * w.columns() * w.element_bytes(), a.offsets + first * w.groups(), a.scales + first * w.spans()};
}

void encode_block_row(const Packed& w, const float* x, int row, int rows, const Activations& activations) {
  int tile = 0;
  TileRange range = tile_range(rows, tile);
  while (row >= range.first + range.width) range = tile_range(rows, ++tile);
  instruction_set().encode(x, w, range.width, row - range.first, tile_at(activations, w, range.first));
}

// Rows that a thread takes at a time when all it does is encode them: below it waking another costs more than it saves.
static int64_t encode_grain(const Packed& w) { return std::max<int64_t>(1, 8192 / w.in); }

void encode_rows(Pool& pool, const Packed& w, const float* x, int64_t stride, int rows, const Activations& activations) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) encode_block_row(w, x + row * stride, static_cast<int>(row), rows, activations);
    lap(Part::kQuantising);
  };
  pool.run(rows, encode_grain(w), body);
}

namespace {

// A tile on its way through the columns of one panel.
struct Cursor {
  StepFunction step;
  Step at;
  int width;
};

int start_tiles(const Packed& w, const Activations& activations, int rows, float* sums, Cursor* tiles) {
  const StepFunction* steps = instruction_set().steps[format_of(w)];
  for (int tile = 0; tile < tile_count(rows); ++tile) {
    const TileRange range = tile_range(rows, tile);
    const Activations part = tile_at(activations, w, range.first);
    tiles[tile] = {steps[range.width - 1],
                   {nullptr, part.values, part.offsets, part.scales, sums + range.first * kPanel, 0, w.group, w.span() / w.group, w.scale_bytes, w.table},
                   range.width};
  }
  return tile_count(rows);
}

// The sums of one panel. All tiles take a step before any takes the next: its weights come from L1 for all but the first.
void multiply_panel(const Packed& w, const uint8_t* weights, Cursor* tiles, int num_tiles) {
  const int64_t chunks = w.chunks();
  for (int64_t c = 0; c < chunks; c += kStride / kChunk) {
    const int width = static_cast<int>(std::min<int64_t>(kStride / kChunk, chunks - c));
    const int groups = w.integer() ? width * kChunk / w.group : 0;
    const int spans = w.integer() ? width * kChunk / w.span() : 0;
    for (Cursor* tile = tiles; tile < tiles + num_tiles; ++tile) {
      tile->at.weights = weights;
      tile->at.chunks = width;
      tile->step(tile->at);
      tile->at.values += width * tile->width * kChunk * w.element_bytes();
      tile->at.offsets += groups * tile->width;
      tile->at.scales += spans * tile->width;
    }
    weights += w.integer() ? groups * w.group_bytes() : width * w.chunk_bytes();
  }
}

}  // namespace

void multiply_panels(const Packed& w, const Activations& activations, int rows, int64_t begin, int64_t end, float* y, int64_t stride) {
  alignas(64) float sums[kBlock * kPanel];
  Cursor start[kBlock / kTile];
  const int num_tiles = start_tiles(w, activations, rows, sums, start);
  for (int64_t panel = begin; panel < end; ++panel) {
    Cursor tiles[kBlock / kTile];
    std::copy(start, start + num_tiles, tiles);
    std::memset(sums, 0, static_cast<size_t>(rows) * kPanel * sizeof(float));
    multiply_panel(w, w.data + panel * w.panel_bytes(), tiles, num_tiles);
    const int64_t valid = w.out - panel * kPanel;
    for (int row = 0; row < rows; ++row) {
      float* out = y + row * stride + (panel - begin) * kPanel;
      if (valid >= kPanel) {
        std::memcpy(out, sums + row * kPanel, kPanel * sizeof(float));  // of known size: a call would cost as much as a row
      } else {
        std::memcpy(out, sums + row * kPanel, static_cast<size_t>(valid) * sizeof(float));
      }
    }
  }
}

int64_t panel_grain(const Packed& w, int rows, int threads) {
  const int64_t pieces_per_thread = 8;     // enough to even out threads of unequal speed, few enough to stream long runs
  const int64_t worth_fetching = 1 << 18;  // multiply-adds, about a microsecond: below it fetching pieces is what takes time
  const int64_t even = w.panels() / (pieces_per_thread * threads);
  const int64_t worth = worth_fetching / (int64_t{kPanel} * w.in * rows);
  const int64_t share = (w.panels() + threads - 1) / threads;
  return std::max<int64_t>(1, std::min(std::max(even, worth), share));
}

void linear(Pool& pool, Workspace& workspace, const Packed& w, const float* x, int64_t stride, int64_t rows, float* y) {
  auto input = [&](int64_t row) { return x + row * stride; };
  linear_of(pool, workspace, w, rows, encode_grain(w), input, y, w.out);
}

}  // namespace dovetail

// The C interface, loaded with ctypes. Pointers need no alignment beyond that of their element; x and y must not overlap.
#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// What dovetail_abi answers: raised with every change of a structure or signature below.
int dovetail_abi() { return 8; }

const char* dovetail_instruction_set() { return instruction_set().name; }

// The name of the i-th instruction set that this processor runs, fastest first; null past the last.
const char* dovetail_available_instruction_set(int i) {
  for (int j = 0; j < kInstructionSets; ++j) {
    const InstructionSet* set = instruction_sets()[j];
    if (usable(set) && i-- == 0) return set->name;
  }
  return nullptr;
}

// 0, or -1 where the processor or this build has no such set.
int dovetail_choose_instruction_set(const char* name) {
  for (int j = 0; j < kInstructionSets; ++j) {
    const InstructionSet* set = instruction_sets()[j];
    if (usable(set) && std::strcmp(set->name, name) == 0) {
      g_chosen = set;
      return 0;
    }
  }
  return -1;
}

void dovetail_set_threads(int threads) { Pool::instance().resize(threads); }

int dovetail_threads() { return Pool::instance().size(); }

int64_t dovetail_packed_bytes(const Packed* w) { return w->panels() * w->panel_bytes(); }

void dovetail_linear(const Packed* w, const float* x, int64_t rows, float* y) {
  static Workspace workspace;
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("linear", w->in * w->out, rows));
  linear(pool, workspace, *w, x, w->in, rows, y);
}
}
#pragma GCC visibility pop
