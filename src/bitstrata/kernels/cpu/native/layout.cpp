#include "layout.h"

#include "generic/half.h"

#include <algorithm>
#include <cstring>

namespace bitstrata {

Layout::Layout(int rows_, int columns_, int group_size_)
    : rows(rows_), columns(columns_), group_size(std::min(group_size_, columns_)) {
  blocks = (rows + kBlockRows - 1) / kBlockRows;
  stored_groups = (columns + group_size - 1) / group_size;
  groups_per_unit = group_size <= 32 ? 4 : group_size <= 64 ? 2 : 1;
  units_per_group = (group_size + kUnitColumns - 1) / kUnitColumns;
  if (units_per_group > 1) {
    const int last = columns - (stored_groups - 1) * group_size;
    units = (stored_groups - 1) * units_per_group + (last + kUnitColumns - 1) / kUnitColumns;
    groups = stored_groups;
  } else {
    units = (stored_groups + groups_per_unit - 1) / groups_per_unit;
    groups = units * groups_per_unit;
  }
  chunks = units * groups_per_unit;
  plane_bytes = size_t(blocks) * units * kQuads * kWordBytes;
}

namespace {

// The 8x8 bit matrix whose row i is byte i, transposed.
uint64_t transpose8(uint64_t x) {
  uint64_t swap = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= swap ^ (swap << 7);
  swap = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= swap ^ (swap << 14);
  swap = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ swap ^ (swap << 28);
}

// 128 columns as eight 16-bit numbers <-> 16 bytes with a bit for each number.
void spread_unit(const uint16_t columns[kSlots], uint8_t lane[16]) {
  uint64_t low = 0, high = 0;
  for (int s = 0; s < kSlots; ++s) {
    low |= uint64_t(columns[s] & 0xFF) << (8 * s);
    high |= uint64_t(columns[s] >> 8) << (8 * s);
  }
  low = transpose8(low), high = transpose8(high);
  for (int b = 0; b < 8; ++b) lane[b] = uint8_t(low >> (8 * b)), lane[8 + b] = uint8_t(high >> (8 * b));
}

void gather_unit(const uint8_t lane[16], uint16_t columns[kSlots]) {
  uint64_t low = 0, high = 0;
  for (int b = 0; b < 8; ++b) low |= uint64_t(lane[b]) << (8 * b), high |= uint64_t(lane[8 + b]) << (8 * b);
  low = transpose8(low), high = transpose8(high);
  for (int s = 0; s < kSlots; ++s) columns[s] = uint16_t((low >> (8 * s) & 0xFF) | (high >> (8 * s) & 0xFF) << 8);
}

// `count` bits from bit `from` of `source` to bit `to` of `target`, whose bits there are 0. Both start at 32-bit words.
void copy_bits(const uint32_t* source, int from, uint32_t* target, int to, int count) {
  while (count > 0) {
    const int piece = std::min({32 - from % 32, 32 - to % 32, count});
    const uint32_t mask = piece == 32 ? ~0u : (1u << piece) - 1;
    target[to / 32] |= (source[from / 32] >> (from % 32) & mask) << (to % 32);
    from += piece, to += piece, count -= piece;
  }
}

uint8_t* lane_of(const Layout& layout, uint8_t* plane, int row, int unit) {
  const int block = row / kBlockRows, within = row % kBlockRows;
  return plane + ((size_t(block) * layout.units + unit) * kQuads + within % 4) * kWordBytes + within / 4 * 16;
}

}  // namespace

void pack_plane_row(const Layout& layout, const uint32_t* words, uint8_t* plane, int row, uint32_t* scratch) {
  std::fill_n(scratch, layout.units * 4, 0u);
  if (row < layout.rows)
    for (int group = 0; group < layout.stored_groups; ++group)
      copy_bits(words, group * layout.group_size, scratch, group_start(layout, group), group_columns(layout, group));
  for (int unit = 0; unit < layout.units; ++unit) {
    uint16_t columns[kSlots];
    for (int s = 0; s < kSlots; ++s) columns[s] = uint16_t(scratch[unit * 4 + s / 2] >> (s % 2 * 16));
    spread_unit(columns, lane_of(layout, plane, row, unit));
  }
}

void unpack_plane_row(const Layout& layout, const uint8_t* plane, uint32_t* words, int row, uint32_t* scratch) {
  for (int unit = 0; unit < layout.units; ++unit) {
    uint16_t columns[kSlots];
    gather_unit(lane_of(layout, const_cast<uint8_t*>(plane), row, unit), columns);
    for (int w = 0; w < 4; ++w) scratch[unit * 4 + w] = columns[2 * w] | uint32_t(columns[2 * w + 1]) << 16;
  }
  std::fill_n(words, (layout.columns + 31) / 32, 0u);
  for (int group = 0; group < layout.stored_groups; ++group)
    copy_bits(scratch, group_start(layout, group), words, group * layout.group_size, group_columns(layout, group));
}

template <class C>
void pack_scales(const Layout& layout, const C* scale, const C* offset, int bits, C* out) {
  const size_t plane = size_t(layout.rows) * layout.stored_groups;
  for (int block = 0; block < layout.blocks; ++block)
    for (int group = 0; group < layout.groups; ++group)
      for (int i = 0; i <= bits; ++i)
        for (int within = 0; within < kBlockRows; ++within) {
          const int row = block * kBlockRows + within;
          const bool there = row < layout.rows && group < layout.stored_groups;
          const size_t at = size_t(row) * layout.stored_groups + group;
          *out++ = !there ? C(0) : i < bits ? scale[i * plane + at] : offset[at];
        }
}

template <class C>
void unpack_scales(const Layout& layout, const C* packed, int bits, C* scale, C* offset) {
  const size_t plane = size_t(layout.rows) * layout.stored_groups;
  for (int row = 0; row < layout.rows; ++row)
    for (int group = 0; group < layout.stored_groups; ++group) {
      const size_t at = size_t(row) * layout.stored_groups + group;
      const C* from =
          packed + ((size_t(row / kBlockRows) * layout.groups + group) * (bits + 1)) * kBlockRows + row % kBlockRows;
      for (int i = 0; i < bits; ++i) scale[i * plane + at] = from[i * kBlockRows];
      offset[at] = from[bits * kBlockRows];
    }
}

template void pack_scales(const Layout&, const uint16_t*, const uint16_t*, int, uint16_t*);
template void pack_scales(const Layout&, const int8_t*, const int8_t*, int, int8_t*);
template void unpack_scales(const Layout&, const uint16_t*, int, uint16_t*, uint16_t*);
template void unpack_scales(const Layout&, const int8_t*, int, int8_t*, int8_t*);

void pack_units(const Layout& layout, const uint16_t* stored, float* out) {
  for (int row = 0; row < layout.blocks * kBlockRows; ++row)
    out[row] = row < layout.rows ? half_to_float(stored[row]) / 128 : 0.0f;
}

void unpack_units(const Layout& layout, const float* packed, uint16_t* stored) {
  for (int row = 0; row < layout.rows; ++row) stored[row] = float_to_half(packed[row] * 128);
}

}  // namespace bitstrata
