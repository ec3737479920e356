// The blocked layout: how a weight's planes and scales lie in memory for these kernels.
//
// Rows come in blocks of 16, columns in units of 128. One plane of one (block, unit) is 256 bytes: four
// words of 64. Word q holds the rows 16*block + 4*lane + q, lane = 0..3 being the 16-byte lanes of the
// word; bit `slot` of byte b of a lane is column 16*slot + b of the unit. So one shift and one mask bring
// the bits of 16 neighbouring columns of four rows into 64 bytes, whatever the vector width.
//
//   plane     uint8 [blocks][units][4][64]
//   scales    fp16  [blocks][groups][bits + 1][16]    scale of plane 0..bits-1, then the offset
//     or      int8  [blocks][groups][bits + 1][16]    the same as bytes, up to kByteBits bits, and behind them
//             fp32  [blocks][16]                      2^-7 times the rows' units; plane i counts 2^-i of it
//   table     fp16  [blocks][16][2^bits]
//
// A unit holds a whole number of groups of `lane_group` columns (32, 64 or 128), or a group spans a whole
// number of units. A weight group that fits neither is padded with columns whose activations are 0.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitstrata {

constexpr int kBlockRows = 16;
constexpr int kUnitColumns = 128;
constexpr int kSlots = 8;  // of 16 columns in a unit
constexpr int kWordBytes = 64;
constexpr int kQuads = 4;  // words of a plane in a (block, unit)
constexpr int kQuarters = 4;  // of a chunk of activations, each with a scale of its own
constexpr int kMaxBits = 8;
constexpr int kByteBits = 4;  // bits whose scales may be bytes
constexpr int kFineBits = 7;  // bits from which activations have a second byte
constexpr int kMaxRows = 16;  // activation rows in one pass over the weight

struct Layout {
  int rows, columns;  // N, K
  int group_size;     // columns that share scales in the stored weight; all of them for a codebook
  int blocks, units;
  int stored_groups;     // groups of a row as stored
  int groups;            // groups of a row with padding
  int groups_per_unit;   // > 1: several groups in a unit; their width is 128 / groups_per_unit
  int units_per_group;   // > 1: a group spans several units
  int chunks;            // of activations: units * groups_per_unit, each with kQuarters scales
  size_t plane_bytes;

  // Defined once, for the plain processor: this file is compiled for every instruction set.
  Layout(int rows, int columns, int group_size);
};

// Functions here are private to each file that includes it, for the same reason.
namespace {

// Where stored group `group` starts among the padded columns, and how many columns it has.
inline int group_start(const Layout& layout, int group) {
  return layout.units_per_group > 1 ? group * layout.units_per_group * kUnitColumns
                                    : group * (kUnitColumns / layout.groups_per_unit);
}

inline int group_columns(const Layout& layout, int group) {
  const int left = layout.columns - group * layout.group_size;
  return left < layout.group_size ? left : layout.group_size;
}

}  // namespace
}  // namespace bitstrata
