// y = x W for up to any number of rows, every row bit-identical whatever its neighbours.
#pragma once

#include <memory>

#include "layout.h"
#include "pool.h"

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

// Encodes `rows` (at most kBlock) rows of x, `stride` floats apart.
void encode_rows(Pool& pool, const Packed& w, const float* x, int64_t stride, int rows, const Activations& activations);

// Outputs [32 * begin, 32 * end) of every encoded activation row: y[row * stride] is output 32 * begin of that row.
void multiply_panels(const Packed& w, const Activations& activations, int rows, int64_t begin, int64_t end, float* y, int64_t stride);

// How many panels a thread takes at a time.
int64_t panel_grain(const Packed& w, int threads);

// All of it for any number of rows, in blocks of kBlock. Rows of x lie `stride` floats apart, rows of y behind one another.
void linear(Pool& pool, Workspace& workspace, const Packed& w, const float* x, int64_t stride, int64_t rows, float* y);

}  // namespace dovetail
