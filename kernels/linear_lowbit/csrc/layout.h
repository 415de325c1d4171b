// The packed weight format and the quantised activations, shared by every instruction set.
//
// A weight matrix [out, in] is cut into panels of 32 output rows. A panel is one contiguous stream, read front to back once
// per pass, made of groups of `group` input columns:
//
//   int4, int8   codes, then 32 scales (and 32 minima where the weight has zero points), all fp16 or all fp32
//   bf16, fp32   codes only; the columns are padded with zeros to whole chunks
//
// Codes are stored in the order in which the dot-product instructions want them (a "half" is 16 output rows):
//
//   int4   [group / 8][2 halves][16 rows][4 columns]   low nibble: columns 8i .. 8i+3, high nibble: columns 8i+4 .. 8i+7
//   int8   [group / 4][2 halves][16 rows][4 columns]
//   bf16   [group / 2][2 halves][16 rows][2 columns]
//   fp32   [group / 1][2 halves][16 rows]
//
// Integer codes are unsigned. weight = scale * (code - 2^(bits-1)), or scale * code + minimum where minima are stored, or
// scale * table[code] where 4-bit codes index a table of sixteen signed bytes.
// Every group starts on a cache line if the first does: all parts are multiples of 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dovetail {

constexpr int kPanel = 32;  // output rows of a panel
constexpr int kHalf = 16;   // output rows of one 64-byte vector of sums
constexpr int kChunk = 32;  // input columns of one tile-interleaved piece of an activation row
constexpr int kSpan = 32;   // input columns that share one activation scale, where the weight's groups are not longer
constexpr int kStride = 128;  // input columns of one step: a whole number of spans
constexpr int32_t kWhole = 0x4b400000;  // the bits of 1.5 * 2^23: this plus a whole number below 2^22 is, as float bits, their sum
constexpr int kTile = 8;    // activation rows that a step takes at most
constexpr int kBlock = 64;  // activation rows of one pass over the weights

// What an integer code stands for, before its scale: the code less the middle of its range, the code itself with a minimum to
// add, or an entry of a table.
enum Kind : int32_t { kSymmetric, kMinimum, kTable };

struct Packed {
  const uint8_t* data;
  int64_t out;
  int64_t in;
  int32_t bits;     // 4, 8, 16 (bf16) or 32 (fp32)
  int32_t group;    // columns that share a scale: 16, 32, 64 or 128
  int32_t kind;     // `Kind`
  int32_t scale_bytes;  // of one scale or minimum: 2 (fp16) or 4 (fp32)
  int8_t table[16];     // of kTable

  bool integer() const { return bits <= 8; }
  int64_t panels() const { return (out + kPanel - 1) / kPanel; }
  int64_t chunks() const { return (in + kChunk - 1) / kChunk; }
  int64_t columns() const { return chunks() * kChunk; }
  int span() const { return group > kSpan ? group : kSpan; }
  int64_t spans() const { return integer() ? in / span() : 0; }
  int64_t groups() const { return integer() ? in / group : 0; }
  int64_t chunk_bytes() const { return int64_t{kPanel} * kChunk * bits / 8; }
  int64_t group_bytes() const { return chunk_bytes() * group / kChunk + kPanel * scale_bytes * (kind == kMinimum ? 2 : 1); }
  int middle_bits() const { return kind == kTable ? 7 : bits - 1; }  // codes, or table entries plus 128, have 2^this as middle
  int64_t panel_bytes() const { return integer() ? groups() * group_bytes() : chunks() * chunk_bytes(); }
  int element_bytes() const { return bits == 32 ? 4 : bits == 16 ? 2 : 1; }  // of an activation
};

// Rows of activations in the number format that a weight wants, in tiles of up to kTile rows.
// A tile of width T that starts at row r holds, for t in [0, T):
//   values  + r * columns * element_bytes : [chunk][T][32]     int8 (round(x / scale)), bf16 or fp32
//   offsets + r * groups                  : [group][T]         int32: kWhole - 2^middle_bits * sum of the group's values; with minima the sum as float bits
//   scales  + r * spans                   : [span][T]          fp32: largest magnitude / 127 of the span; NaN if the span is not finite
struct Activations {
  uint8_t* values;
  int32_t* offsets;
  float* scales;
};

// One step: the sums of one panel over up to kStride columns for one tile.
struct Step {
  const uint8_t* weights;
  const uint8_t* values;
  const int32_t* offsets;
  const float* scales;
  float* sums;       // [T][32], read and written
  int chunks;  // of this step
  int group;   // columns of a group
  int span_groups;  // that share an activation scale: one, or two of 16 columns
  int scale_bytes;
  const int8_t* table;

  int groups() const { return chunks * kChunk / group; }
  // Whether group g is the last that shares its activation scale.
  bool ends_span(int g) const { return span_groups == 1 || g % 2 == 1; }
  // Where group g of a tile of `width` rows has its first column.
  const uint8_t* group_values(int g, int width) const {
    const int column = g * group;
    return values + column / kChunk * width * kChunk + column % kChunk;
  }
};

using StepFunction = void (*)(const Step&);

// Rows are spread evenly over the fewest tiles: the tile that row `row` of `rows` belongs to.
struct TileRange {
  int first;
  int width;
};

inline int tile_count(int rows) { return (rows + kTile - 1) / kTile; }

inline TileRange tile_range(int rows, int tile) {
  const int tiles = tile_count(rows);
  const int first = static_cast<int>(int64_t{rows} * tile / tiles);
  return {first, static_cast<int>(int64_t{rows} * (tile + 1) / tiles) - first};
}

// What an instruction set provides. `steps` is indexed by [format][width - 1].
enum Format { kInt4, kInt4Minimum, kInt4Table, kInt8, kInt8Minimum, kBf16, kFp32, kFormats };

inline Format format_of(const Packed& w) {
  if (w.bits == 4) return w.kind == kTable ? kInt4Table : w.kind == kMinimum ? kInt4Minimum : kInt4;
  if (w.bits == 8) return w.kind == kMinimum ? kInt8Minimum : kInt8;
  return w.bits == 16 ? kBf16 : kFp32;
}

using EncodeFunction = void (*)(const float* x, const Packed& w, int width, int t, const Activations& tile);

struct InstructionSet {
  const char* name;
  bool (*supported)();
  EncodeFunction encode;
  StepFunction steps[kFormats][kTile];
};

// The table of steps, from an instruction set's own step_integer<bits, kind, width>, step_bf16<width>, step_fp32<width>.
#define DOVETAIL_WIDTHS(STEP) {STEP(1), STEP(2), STEP(3), STEP(4), STEP(5), STEP(6), STEP(7), STEP(8)}
#define DOVETAIL_INT4(T) step_integer<4, kSymmetric, T>
#define DOVETAIL_INT4_MINIMUM(T) step_integer<4, kMinimum, T>
#define DOVETAIL_INT4_TABLE(T) step_integer<4, kTable, T>
#define DOVETAIL_INT8(T) step_integer<8, kSymmetric, T>
#define DOVETAIL_INT8_MINIMUM(T) step_integer<8, kMinimum, T>
#define DOVETAIL_BF16(T) step_bf16<T>
#define DOVETAIL_FP32(T) step_fp32<T>
#define DOVETAIL_INTEGER_STEPS                                                                              \
  DOVETAIL_WIDTHS(DOVETAIL_INT4), DOVETAIL_WIDTHS(DOVETAIL_INT4_MINIMUM), DOVETAIL_WIDTHS(DOVETAIL_INT4_TABLE), \
      DOVETAIL_WIDTHS(DOVETAIL_INT8), DOVETAIL_WIDTHS(DOVETAIL_INT8_MINIMUM)
#define DOVETAIL_STEPS {DOVETAIL_INTEGER_STEPS, DOVETAIL_WIDTHS(DOVETAIL_BF16), DOVETAIL_WIDTHS(DOVETAIL_FP32)}

const InstructionSet* avx512();       // null where the build has no such code
const InstructionSet* avx512_bf16();
const InstructionSet* avx_vnni();
const InstructionSet* avx2();
const InstructionSet* arm_dotprod();
const InstructionSet* portable();

}  // namespace dovetail
