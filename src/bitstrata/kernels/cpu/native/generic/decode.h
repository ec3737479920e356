// The weight itself, exactly as the reference decodes it: offset first, then planes 0, 1, ... in float32.
//
// The first four planes of a row's group take at most 16 values, kept in a table; later planes are added one by
// one, because their sum would round differently.
#pragma once
#include "call.h"
#include "half.h"
#include "index.h"

namespace bitstrata {
namespace {

// Indices of one word: high[slot][byte] from planes 0-3, low[slot][byte] from planes 4-7.
template <class S>
inline void word_indices(const Weight& weight, int bits, size_t offset, uint8_t high[kSlots][kWordBytes],
                         uint8_t low[kSlots][kWordBytes]) {
  using V = typename S::V;
  constexpr int bytes = 16 * S::lanes;
  for (int at = 0; at < kWordBytes; at += bytes) {
    V plane[4], index[kSlots];
    for (int set = 0; set * 4 < bits; ++set) {
      const int planes = bits - set * 4 < 4 ? bits - set * 4 : 4;
      for (int i = 0; i < planes; ++i) plane[i] = S::load(weight.planes[set * 4 + i] + offset + at);
      if (planes == 1) form_indices<S, 1, true>(plane, index);
      else if (planes == 2) form_indices<S, 2, true>(plane, index);
      else if (planes == 3) form_indices<S, 3, true>(plane, index);
      else form_indices<S, 4, true>(plane, index);
      for (int s = 0; s < kSlots; ++s) S::store((set ? low : high)[s] + at, index[s]);
    }
  }
}

// The coefficients of one row's group as numbers, the offset last.
inline void group_scales(const Weight& weight, int bits, int block, int group, int row, float* out) {
  const size_t first = (size_t(block) * weight.layout.groups + group) * (bits + 1) * kBlockRows + row;
  if (!weight.has_bytes(bits)) {
    const uint16_t* scales = static_cast<const uint16_t*>(weight.scales[bits]) + first;
    for (int i = 0; i <= bits; ++i) out[i] = half_to_float(scales[i * kBlockRows]);
    return;
  }
  const int8_t* scales = static_cast<const int8_t*>(weight.scales[bits]) + first;
  const float unit = weight.units(bits)[block * kBlockRows + row];
  for (int i = 0; i <= bits; ++i) out[i] = float(scales[i * kBlockRows]) * (unit / float(i < bits ? 1 << i : 1));
}

// What a row's group adds up to: by index, the offset and the first four planes; each later plane by itself.
struct Sums {
  alignas(64) float first[16];
  alignas(64) float later[kMaxBits - 4][16];

  Sums(const float* scales, int bits) {
    for (int n = 0; n < 16; ++n) first[n] = scales[bits];
    for (int i = 0; i < 4 && i < bits; ++i)
      for (int n = 0; n < 16; ++n) first[n] += (n >> (3 - i) & 1) ? scales[i] : -scales[i];
    for (int i = 4; i < bits; ++i)
      for (int n = 0; n < 16; ++n) later[i - 4][n] = (n >> (7 - i) & 1) ? scales[i] : -scales[i];
  }
};

// 16 columns of a row -> out.
template <class S>
inline void affine_slot(const Sums& sums, int bits, const uint8_t* high, const uint8_t* low, float* out) {
  S::gather16(sums.first, high, out);
  for (int i = 4; i < bits; ++i) {
    alignas(64) float more[16];
    S::gather16(sums.later[i - 4], low, more);
    for (int b = 0; b < 16; ++b) out[b] += more[b];
  }
}

// Columns of `unit` of the 16 rows of a block -> out [16][128], padded columns included.
template <class S>
void decode_unit(const Weight& weight, int bits, int block, int unit, float out[kBlockRows][kUnitColumns]) {
  const Layout& layout = weight.layout;
  const int groups = layout.groups_per_unit;
  const size_t offset = (size_t(block) * layout.units + unit) * kQuads * kWordBytes;
  alignas(64) uint8_t high[kSlots][kWordBytes], low[kSlots][kWordBytes];
  const auto* scales = static_cast<const uint16_t*>(weight.scales[bits]);
  for (int q = 0; q < kQuads; ++q) {
    word_indices<S>(weight, bits, offset + q * kWordBytes, high, low);
    for (int lane = 0; lane < 4; ++lane) {
      const int row = 4 * lane + q;
      if (weight.codebook) {
        const uint16_t* entries = scales + ((size_t(block) * kBlockRows + row) << bits);
        for (int s = 0; s < kSlots; ++s)
          for (int b = 0; b < 16; ++b) {
            const int at = 16 * lane + b;
            const int code = bits <= 4 ? high[s][at] >> (4 - bits) : high[s][at] << (bits - 4) | low[s][at] >> (8 - bits);
            out[row][16 * s + b] = half_to_float(entries[code]);
          }
        continue;
      }
      for (int g = 0; g < groups; ++g) {
        const int group = groups > 1 ? unit * groups + g : unit / layout.units_per_group;
        float scales[kMaxBits + 1];
        group_scales(weight, bits, block, group, row, scales);
        const Sums sums(scales, bits);
        for (int s = g * kSlots / groups; s < (g + 1) * kSlots / groups; ++s)
          affine_slot<S>(sums, bits, high[s] + 16 * lane, low[s] + 16 * lane, &out[row][16 * s]);
      }
    }
  }
}

template <class S>
void convert(const float* values, int count, void* out, Type type) {
  if (type == Type::f32) {
    std::memcpy(out, values, size_t(count) * sizeof(float));
    return;
  }
  auto* words = static_cast<uint16_t*>(out);
  if (type == Type::bf16) {
    for (int i = 0; i < count; ++i) words[i] = float_to_bfloat(values[i]);
    return;
  }
  constexpr int step = 4 * S::lanes;
  int i = 0;
  for (; i + step <= count; i += step) S::store_half(words + i, S::load_float(values + i));
  for (; i < count; ++i) words[i] = float_to_half(values[i]);
}

// The stored columns of chunk `g` of `unit`: the first one, and how many; 0 where there are none.
struct Columns {
  int first, count;

  Columns(const Layout& layout, int unit, int g) {
    if (layout.groups_per_unit > 1 || layout.units_per_group == 1) {
      const int group = unit * layout.groups_per_unit + g;
      first = group * layout.group_size;
      count = group < layout.stored_groups ? group_columns(layout, group) : 0;
    } else {
      const int group = unit / layout.units_per_group, skipped = unit % layout.units_per_group * kUnitColumns;
      first = group * layout.group_size + skipped;
      count = group_columns(layout, group) - skipped;
      if (count > kUnitColumns) count = kUnitColumns;
    }
  }
};

template <class S>
void decode_block(const Weight& weight, int bits, int block, void* out, Type type, ptrdiff_t stride) {
  const Layout& layout = weight.layout;
  const int size = type == Type::f32 ? 4 : 2;
  const int rows = layout.rows - block * kBlockRows < kBlockRows ? layout.rows - block * kBlockRows : kBlockRows;
  alignas(64) float unit_values[kBlockRows][kUnitColumns];
  for (int unit = 0; unit < layout.units; ++unit) {
    decode_unit<S>(weight, bits, block, unit, unit_values);
    const int width = kUnitColumns / layout.groups_per_unit;
    for (int g = 0; g < layout.groups_per_unit; ++g) {
      const Columns columns(layout, unit, g);
      for (int row = 0; row < rows; ++row)
        convert<S>(unit_values[row] + g * width, columns.count,
                   static_cast<char*>(out) + (row * stride + columns.first) * size, type);
    }
  }
}

// One row of the weight -> out [columns].
template <class S>
void decode_row(const Weight& weight, int bits, int row, void* out, Type type) {
  const Layout& layout = weight.layout;
  const int size = type == Type::f32 ? 4 : 2, groups = layout.groups_per_unit, width = kUnitColumns / groups;
  const int block = row / kBlockRows, within = row % kBlockRows;
  for (int unit = 0; unit < layout.units; ++unit) {
    const size_t offset = ((size_t(block) * layout.units + unit) * kQuads + within % 4) * kWordBytes + within / 4 * 16;
    alignas(64) uint8_t high[kUnitColumns] = {}, low[kUnitColumns] = {};
    for (int i = 0; i < bits; ++i) {
      const uint8_t* lane = weight.planes[i] + offset;
      uint8_t* index = i < 4 ? high : low;
      const int place = 3 - i % 4;
      for (int s = 0; s < kSlots; ++s)
        for (int b = 0; b < 16; ++b) index[16 * s + b] |= uint8_t((lane[b] >> s & 1) << place);
    }
    alignas(64) float values[kUnitColumns];
    if (weight.codebook) {
      const uint16_t* entries =
          static_cast<const uint16_t*>(weight.scales[bits]) + ((size_t(block) * kBlockRows + within) << bits);
      for (int k = 0; k < kUnitColumns; ++k)
        values[k] = half_to_float(entries[(high[k] << 4 | low[k]) >> (8 - bits)]);
    }
    for (int g = 0; g < groups; ++g) {
      if (!weight.codebook) {
        float scales[kMaxBits + 1];
        group_scales(weight, bits, block, groups > 1 ? unit * groups + g : unit / layout.units_per_group, within, scales);
        const Sums sums(scales, bits);
        for (int k = g * width; k < (g + 1) * width; k += 16) affine_slot<S>(sums, bits, high + k, low + k, values + k);
      }
      const Columns columns(layout, unit, g);
      convert<S>(values + g * width, columns.count, static_cast<char*>(out) + ptrdiff_t(columns.first) * size, type);
    }
  }
}

// A block of y from float activations and float weights.
template <class S>
void exact_block(const FewRows& call, const Weight& weight, int block, float* out) {
  constexpr int width = 16;
  float sum[kMaxRows][kBlockRows][width] = {};
  alignas(64) float unit_values[kBlockRows][kUnitColumns];
  const Layout& layout = *call.layout;
  for (int i = 0; i < call.segment_count; ++i) {
    const Segment& segment = call.segments[i];
    for (int unit = 0; unit < layout.units; ++unit) {
      decode_unit<S>(weight, segment.bits, block, unit, unit_values);
      for (int r = segment.begin; r < segment.end; ++r) {
        const float* x = call.x_exact + (size_t(r) * layout.units + unit) * kUnitColumns;
        for (int row = 0; row < kBlockRows; ++row)
          for (int k = 0; k < kUnitColumns; k += width)
            for (int j = 0; j < width; ++j) sum[r][row][j] += unit_values[row][k + j] * x[k + j];
      }
    }
  }
  for (int r = 0; r < call.rows; ++r)
    for (int row = 0; row < kBlockRows; ++row) {
      float total = 0;
      for (int j = 0; j < width; ++j) total += sum[r][row][j];
      out[r * kBlockRows + row] = total;
    }
}

}  // namespace
}  // namespace bitstrata
