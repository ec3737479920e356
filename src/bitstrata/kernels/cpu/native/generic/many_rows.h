// y = x W^T for many rows of x: what few_rows.h computes, number for number, arranged for throughput.
//
// Blocks of 16 weight rows are decoded to byte levels once and stay in the cache while all rows of x pass by. Both sides
// lie in the order in which the product reads them: of four neighbouring columns, a level vector holds 16 weight rows, and
// a panel of kPanelRows rows of x as many words of four bytes. A byte dot product then leaves one sum a weight row, and
// nothing is added up across a vector.
//
//   levels of a block  uint8 [units][groups][sets][4 quarters][slots of a group][16 rows][4]
//   panel of x         int8  [units][groups][4 quarters][slots of a group][kPanelRows][4]
//
// For each group a row gets, in this order,
//
//   y += step * (((s0 p0 + s1 p1) + s2 p2) + s3 p3)   for each set of levels; p sums of level * x, s scales of x
//   y += low * x_sum
#pragma once
#include "few_rows.h"

namespace bitstrata {
namespace {

// Element 4 * lane + q of v[i] from element 4 * lane + i of v[q].
template <class S>
inline void transpose4(typename S::V* v) {
  const auto low01 = S::unpack_low32(v[0], v[1]), low23 = S::unpack_low32(v[2], v[3]);
  const auto high01 = S::unpack_high32(v[0], v[1]), high23 = S::unpack_high32(v[2], v[3]);
  v[0] = S::unpack_low64(low01, low23), v[1] = S::unpack_high64(low01, low23);
  v[2] = S::unpack_low64(high01, high23), v[3] = S::unpack_high64(high01, high23);
}

// Levels, steps and lows of block `block` of a weight, for the one segment of `call`; planes beyond its bits are garbage to its tables.
template <class S, int Planes, int Groups, bool Codebook>
void block_levels(const FewRows& call, int block, const BlockLevels& out) {
  using V = typename S::V;
  constexpr int halves = 4 / S::lanes, half_rows = 4 * S::lanes, half_bytes = 16 * S::lanes, slots = kSlots / Groups;
  constexpr int sets = !Codebook && Planes > 4 ? 2 : 1, count = Codebook && Planes > 4 ? 1 << (Planes - 4) : 1;
  const Layout& layout = *call.layout;
  const Segment& segment = call.segments[0];
  const int bits = segment.bits, stride = (bits + 1) * kBlockRows;
  Tables<S, Codebook ? 1 : Groups, sets, count> tables;  // of a codebook: one serves the whole row
  if constexpr (Codebook)
    codebook_tables<S, Planes, true>(
        tables, static_cast<const uint16_t*>(segment.scales) + (size_t(block) * kBlockRows << bits), bits, count);
  auto build = [&](const auto* scales, int step) {
    for (int g = 0; g < Groups; ++g)
      affine_tables<S, true>(tables, g, scales + (size_t(block) * layout.groups + step * Groups + g) * stride, bits);
  };
  for (int unit = 0; unit < layout.units; ++unit) {
    if (!Codebook && unit % layout.units_per_group == 0) {
      const int step = unit / layout.units_per_group;
      if (segment.units) build(static_cast<const int8_t*>(segment.scales), step);
      else build(static_cast<const uint16_t*>(segment.scales), step);
    }
    const size_t word = (size_t(block) * layout.units + unit) * kQuads * kWordBytes;
    uint8_t* const levels = out.level + size_t(unit) * sets * kUnitColumns * kBlockRows;
    for (int h = 0; h < halves; ++h) {
      V high[kQuads][kSlots], low[kQuads][kSlots];
      for (int q = 0; q < kQuads; ++q) {
        V plane[Planes];
        for (int i = 0; i < Planes; ++i) plane[i] = S::load(call.planes[i] + word + q * kWordBytes + h * half_bytes);
        form_indices<S, 4, true>(plane, high[q]);
        if constexpr (Planes > 4) form_indices<S, 4, true>(plane + 4, low[q]);
      }
      auto put = [&](auto set) {
        V level[kQuads][kSlots];
        for (int q = 0; q < kQuads; ++q)
          look_up<S, sets, count, set.value, Codebook, Planes, true>(tables, high[q], low[q], q, h * half_bytes, bits, level[q]);
        for (int s = 0; s < kSlots; ++s) {  // four rows of sixteen columns a lane -> sixteen rows of four columns
          V quarter[kQuarters] = {level[0][s], level[1][s], level[2][s], level[3][s]};
          transpose4<S>(quarter);
          uint8_t* to = levels + (size_t(s / slots * sets + set.value) * kQuarters * slots + s % slots) * kWordBytes + h * half_bytes;
          for (int i = 0; i < kQuarters; ++i) S::store(to + i * slots * kWordBytes, quarter[i]);
        }
      };
      put(std::integral_constant<int, 0>{});
      if constexpr (sets > 1) put(std::integral_constant<int, 1>{});
    }
    for (int g = 0; g < Groups; ++g)
      for (int h = 0; h < halves; ++h) {
        const size_t chunk = size_t(unit) * Groups + g;
        const int from = Codebook ? 0 : g;
        for (int set = 0; set < sets; ++set)
          S::store_float(out.step + (chunk * sets + set) * kBlockRows + h * half_rows, S::load_float(&tables.step[from][set][h * half_rows]));
        S::store_float(out.low + chunk * kBlockRows + h * half_rows, S::load_float(&tables.low[from][h * half_rows]));
      }
  }
}

// S::tile_blocks blocks and a panel -> out [kPanelRows][16] of each.
template <class S, int Groups, int Sets>
void panel_product(const Layout& layout, const BlockLevels* blocks, const Panel& panel, float* const* out) {
  using V = typename S::V;
  using F = typename S::F;
  constexpr int halves = 4 / S::lanes, half_rows = 4 * S::lanes, half_bytes = 16 * S::lanes, slots = kSlots / Groups;
  constexpr int vectors = S::tile_blocks * halves, rows = S::panel_rows, parts = kPanelRows / rows;
  static_assert(kPanelRows % rows == 0, "a panel is taken in whole parts");
  for (int part = 0; part < parts; ++part) {
    alignas(64) F y[rows][vectors];
    for (auto& row : y)
      for (F& value : row) value = S::floats(0);
    for (int chunk = 0; chunk < layout.units * Groups; ++chunk) {
      const float* scale = panel.scale + size_t(chunk) * kQuarters * kPanelRows + part * rows;
      const float* sum = panel.sum + size_t(chunk) * kPanelRows + part * rows;
      for (int set = 0; set < Sets; ++set) {
        F products[rows][vectors];
        auto take = [&](int quarter, auto use) {
          const int8_t* x = panel.x + ((size_t(chunk) * kQuarters + quarter) * slots * kPanelRows + part * rows) * 4;
          const size_t at = ((size_t(chunk) * Sets + set) * kQuarters + quarter) * slots * kWordBytes;
          V total[rows][vectors];
          for (auto& row : total)
            for (V& value : row) value = S::zero();
#pragma GCC unroll 8
          for (int s = 0; s < slots; ++s) {
            V level[vectors];
            for (int v = 0; v < vectors; ++v)
              level[v] = S::load(blocks[v / halves].level + at + s * kWordBytes + v % halves * half_bytes);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
              const V columns = S::repeat_word(x + (s * kPanelRows + r) * 4);
              for (int v = 0; v < vectors; ++v) total[r][v] = S::dot(total[r][v], level[v], columns);
            }
          }
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            const F by = S::floats(scale[quarter * kPanelRows + r]);
            for (int v = 0; v < vectors; ++v) use(products[r][v], S::to_float(total[r][v]), by);
          }
        };
        take(0, [](F& to, F sums, F by) { to = S::rounded(S::mul(sums, by)); });
#pragma GCC unroll 1
        for (int quarter = 1; quarter < kQuarters; ++quarter)
          take(quarter, [](F& to, F sums, F by) { to = S::add(to, S::rounded(S::mul(sums, by))); });
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
          for (int v = 0; v < vectors; ++v) {
            const float* step = blocks[v / halves].step + (size_t(chunk) * Sets + set) * kBlockRows + v % halves * half_rows;
            const float* low = blocks[v / halves].low + size_t(chunk) * kBlockRows + v % halves * half_rows;
            y[r][v] = S::fma(products[r][v], S::load_float(step), y[r][v]);
            if (set == Sets - 1) y[r][v] = S::fma(S::load_float(low), S::floats(sum[r]), y[r][v]);
          }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) {
        const float* units = blocks[v / halves].units;
        if (units) y[r][v] = S::mul(y[r][v], S::load_float(units + v % halves * half_rows));
        S::store_float(out[v / halves] + (part * rows + r) * kBlockRows + v % halves * half_rows, y[r][v]);
      }
  }
}

template <class S, int Planes, bool Codebook>
void block_levels_of(const FewRows& call, int block, const BlockLevels& out) {
  if (call.layout->groups_per_unit == 1) return block_levels<S, Planes, 1, Codebook>(call, block, out);
  if (call.layout->groups_per_unit == 2) return block_levels<S, Planes, 2, Codebook>(call, block, out);
  return block_levels<S, Planes, 4, Codebook>(call, block, out);
}

template <class S>
void block_levels_of(const FewRows& call, int block, const BlockLevels& out) {
  if (call.codebook) return (call.bits > 4 ? block_levels_of<S, 8, true> : block_levels_of<S, 4, true>)(call, block, out);
  return (call.bits > 4 ? block_levels_of<S, 8, false> : block_levels_of<S, 4, false>)(call, block, out);
}

template <class S>
void panel_product_of(const Layout& layout, int sets, const BlockLevels* blocks, const Panel& panel, float* const* out) {
  const bool two = sets > 1;
  const int groups = layout.groups_per_unit;
  if (groups == 1) return (two ? panel_product<S, 1, 2> : panel_product<S, 1, 1>)(layout, blocks, panel, out);
  if (groups == 2) return (two ? panel_product<S, 2, 2> : panel_product<S, 2, 1>)(layout, blocks, panel, out);
  return (two ? panel_product<S, 4, 2> : panel_product<S, 4, 1>)(layout, blocks, panel, out);
}

}  // namespace
}  // namespace bitstrata
