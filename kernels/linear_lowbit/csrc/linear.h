// y = x W for up to any number of rows, every row bit-identical whatever its neighbours.
#pragma once

#include <memory>

#include "layout.h"
#include "pool.h"
#include "profile.h"

namespace dovetail {

// The instruction set in use; chosen at load as the fastest that the processor supports.
const InstructionSet& instruction_set();

// Memory for the activations of one block of rows in the format of `w`; grows to the largest asked for.
class Workspace {
 public:
  Activations activations(const Packed& w, int rows);

 private:
  uint8_t* reserve(size_t bytes);
  std::unique_ptr<uint8_t[]> memory_;
  size_t size_ = 0;
};

// The part of `activations` that belongs to the tile starting at row `first`.
Activations tile_at(const Activations& activations, const Packed& w, int first);

// Encodes x as row `row` of the `rows` (at most kBlock) of a block.
void encode_block_row(const Packed& w, const float* x, int row, int rows, const Activations& activations);

// Encodes `rows` (at most kBlock) rows of x, `stride` floats apart.
void encode_rows(Pool& pool, const Packed& w, const float* x, int64_t stride, int rows, const Activations& activations);

// Outputs [32 * begin, 32 * end) of every encoded activation row: y[row * stride] is output 32 * begin of that row.
void multiply_panels(const Packed& w, const Activations& activations, int rows, int64_t begin, int64_t end, float* y, int64_t stride);

// How many panels a thread takes at a time.
int64_t panel_grain(const Packed& w, int rows, int threads);

// y = W x for any number of rows, in blocks of kBlock; rows of y lie `stride` floats apart. x(row) makes a row's input and says
// where it is: it is called once for each row, from any thread, `grain` rows at a time, and encoded while it is in cache.
template <typename Input>
void linear_of(Pool& pool, Workspace& workspace, const Packed& w, int64_t rows, int64_t grain, Input&& x, float* y, int64_t stride) {
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int block = static_cast<int>(rows - first < kBlock ? rows - first : kBlock);
    const Activations activations = workspace.activations(w, block);
    auto encode = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        encode_block_row(w, x(first + row), static_cast<int>(row), block, activations);
        lap(Part::kQuantising);
      }
    };
    pool.run(block, grain, encode);
    auto multiply = [&](int64_t begin, int64_t end) {
      multiply_panels(w, activations, block, begin, end, y + first * stride + begin * kPanel, stride);
      lap(Part::kProducts);
    };
    pool.run(w.panels(), panel_grain(w, block, pool.threads()), multiply);
  }
}

// The same for rows that are there already, `stride` floats apart; rows of y lie behind one another.
void linear(Pool& pool, Workspace& workspace, const Packed& w, const float* x, int64_t stride, int64_t rows, float* y);

}  // namespace dovetail
