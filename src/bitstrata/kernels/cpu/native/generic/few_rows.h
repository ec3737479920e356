// y = x W^T for a few rows of x, straight from the planes.
//
// x is int8 with four scales for each row and group (or unit, if groups are wider): one for each quarter of the columns,
// activations.h. Weights are looked up as byte levels (tables.h). For each unit of 128 columns and block of 16 weight rows the plane words are read
// once and turned into indices (index.h); every row of x then takes its dot products from the same levels.
// Rows may differ in bits: rows of equal bits form a segment with tables of its own over the same indices.
//
//   y[r, n] = sum over groups of step[n] * (sum over quarters of x_scale[r] * sum level * x_int) + low[n] * x_sum[r]
//
// A byte dot product leaves four sums a lane, one for each four neighbouring bytes: the quarters of a group are just
// these, so finer scales of x cost a multiplication and no further sums.
//
// Of kFineBits bits and more x has a second byte, activations.h: the sum of the first bytes times 128 and of the second.
#pragma once
#include <type_traits>

#include "call.h"
#include "tables.h"

namespace bitstrata {
namespace {

// Ahead of what is being read: with several rows the hardware's own prefetching falls behind.
inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 4096); }

// Levels of one word's slots from its indices.
template <class S, int Sets, int Count, int Set, bool Codebook, int Planes, bool Nibble, class T>
inline void look_up(const T& tables, const typename S::V* high, const typename S::V* low, int q, int at, int bits,
                    typename S::V* level) {
  using V = typename S::V;
  constexpr int groups = sizeof(tables.level) / sizeof(tables.level[0]);
  using Form = IndexForm<Planes, Nibble>;
  auto table = [&](int g, int set, int t) { return S::load(&tables.level[g][set][t][q][at]); };
  if constexpr (Codebook && Planes > 4) {
    if (Nibble && bits <= 4) {
      for (int s = 0; s < kSlots; ++s) level[s] = S::lookup(table(0, 0, 0), high[s]);
      return;
    }
    for (int s = 0; s < kSlots; ++s) {
      V found[Count];
      for (int t = 0; t < Count; ++t) found[t] = S::lookup(table(0, 0, t), high[s]);
      // the tables' number ends with the last plane, which is the lowest bit in use
      if constexpr (Planes > 7) for (int t = 0; t < Count / 2; ++t) found[t] = S::template choose<0>(low[s], found[2 * t + 1], found[2 * t]);
      if constexpr (Planes > 6) for (int t = 0; t < (Planes > 7 ? 4 : Count / 2); ++t) found[t] = S::template choose<1>(low[s], found[2 * t + 1], found[2 * t]);
      if constexpr (Planes > 5) for (int t = 0; t < 2; ++t) found[t] = S::template choose<2>(low[s], found[2 * t + 1], found[2 * t]);
      level[s] = S::template choose<3>(low[s], found[1], found[0]);
    }
  } else {
    for (int s = 0; s < kSlots; ++s)
      level[s] = S::lookup(table(s * groups / kSlots, Set, Set ? 0 : Form::table_of(s)), Set ? low[s] : high[s]);
  }
}

// Block `block` of y into `out` [rows][16].
template <class S, int Planes, int Groups, bool Codebook, bool Mixed, bool One>
void few_rows_block(const FewRows& call, int block, float* out) {
  using V = typename S::V;
  using F = typename S::F;
  constexpr int halves = 4 / S::lanes, half_rows = 4 * S::lanes, half_bytes = 16 * S::lanes;
  constexpr int sets = !Codebook && Planes > 4 ? 2 : 1;
  constexpr bool nibble = Mixed || Planes > 4;
  using Form = IndexForm<(Planes > 4 ? 4 : Planes), nibble>;
  constexpr int count = Codebook && Planes > 4 ? 1 << (Planes - 4) : Form::tables;
  constexpr int together = One ? 1 : 2;  // words whose levels stay in registers while rows pass by
  constexpr int max_segments = Mixed ? kMaxBits : 1;
  // With one row a unit's sums may be finished while the next unit runs: right after its products, everything behind
  // would wait for them. Measured to pay at 3 and 4 planes.
  constexpr bool late = One && !Codebook && (Planes == 3 || Planes == 4);
  const Layout& layout = *call.layout;
  const int rows = One ? 1 : call.rows, segments = Mixed ? call.segment_count : 1;
  const size_t plane_offset = size_t(block) * layout.units * kQuads * kWordBytes;

  static_assert(!Codebook || Groups == 1, "a codebook's table serves the whole row");
  // Tables of this unit and of the next: built a unit ahead, so that their latency hides behind the products.
  constexpr int ahead = Codebook ? 1 : 2;
  Tables<S, Groups, sets, count> buffers[ahead][max_segments];
  alignas(64) float total[One ? 1 : kMaxRows][kBlockRows] = {};
  V sum[One ? 1 : kMaxRows][sets][Groups][halves][kQuads];
  V sum_before[Groups][halves][kQuads];

  auto segment_bits = [&](int i) { return Mixed ? call.segments[i].bits : Planes; };
  auto fine = [&](int i) { return Planes >= kFineBits && segment_bits(i) >= kFineBits; };
  if constexpr (Codebook) {
    for (int i = 0; i < segments; ++i) {
      const Segment& segment = call.segments[i];
      codebook_tables<S, Planes, nibble>(
          buffers[0][i], static_cast<const uint16_t*>(segment.scales) + (size_t(block) * kBlockRows << segment_bits(i)),
          segment_bits(i), Mixed && segment_bits(i) <= 4 ? 1 : count);
    }
  }

  F one_total[halves];
  if constexpr (One)
    for (int h = 0; h < halves; ++h) one_total[h] = S::floats(0);

  // A step: the units of a group, or one unit and its groups.
  auto build = [&](int step) {
    for (int i = 0; i < segments; ++i) {
      const int bits = segment_bits(i), stride = (bits + 1) * kBlockRows;
      const size_t first = (size_t(block) * layout.groups + size_t(step) * Groups) * stride;
      auto make = [&](const auto* scales) {
        prefetch(scales + first);
        for (int g = 0; g < Groups; ++g)
          affine_tables<S, nibble>(buffers[step % ahead][i], g, scales + first + g * stride, bits);
      };
      if ((Mixed || Planes <= kByteBits) && call.segments[i].units) make(static_cast<const int8_t*>(call.segments[i].scales));
      else make(static_cast<const uint16_t*>(call.segments[i].scales));
    }
  };
  if constexpr (!Codebook) build(0);
  // Sums of a unit, scaled and added up.
  auto finish = [&](int unit, const auto& tables) {
    for (int i = 0; i < segments; ++i) {
      const int begin = Mixed ? call.segments[i].begin : 0, end = Mixed ? call.segments[i].end : rows;
      const int used = Mixed && segment_bits(i) <= 4 ? 1 : sets;
      for (int r = begin; r < end; ++r) {
        const float* x_scale = call.x_scale + (size_t(r) * layout.chunks + unit * Groups) * kQuarters;
        const float* x_sum = (fine(i) ? call.fine_sum : call.x_sum) + size_t(r) * layout.chunks + unit * Groups;
        for (int h = 0; h < halves; ++h) {
          F y = One ? one_total[h] : S::load_float(&total[r][h * half_rows]);
          for (int g = 0; g < Groups; ++g) {
            for (int set = 0; set < used; ++set) {
              const V* part = late ? sum_before[g][h] : sum[r][set][g][h];
              F scale = S::repeat4(x_scale + g * kQuarters);
              if (fine(i)) scale = S::mul(scale, S::floats(kRestUnit));
              auto scaled = [&](int q) { return S::mul(S::to_float(part[q]), scale); };
              const F products = S::sum4(scaled(0), scaled(1), scaled(2), scaled(3));
              y = S::fma(products, S::load_float(&tables[i].step[g][set][h * half_rows]), y);
            }
            y = S::fma(S::load_float(&tables[i].low[g][h * half_rows]), S::floats(x_sum[g]), y);
          }
          if constexpr (One) one_total[h] = y;
          else S::store_float(&total[r][h * half_rows], y);
        }
      }
    }
  };
  const size_t x_stride = size_t(layout.units) * kUnitColumns;
  int step = 0, units_left = layout.units_per_group;
  const auto* tables = &buffers[0];
  for (int unit = 0; unit < layout.units; ++unit) {
    const auto* tables_before = tables;
    tables = &buffers[Codebook ? 0 : step % 2];
    auto between = [&] {
      if (late && unit > 0) finish(unit - 1, *tables_before);
      if (!Codebook && --units_left == 0) {
        ++step, units_left = layout.units_per_group;
        if (unit + 1 < layout.units) build(step);
      }
    };
    const size_t word_offset = plane_offset + size_t(unit) * kQuads * kWordBytes;
    const size_t x_unit = size_t(unit) * kUnitColumns;
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; q += together) {
      if (q == (late ? kQuads / 2 : 0)) between();
      for (int h = 0; h < halves; ++h) {
        V high[together][kSlots], low[together][kSlots];
        for (int t = 0; t < together; ++t) {
          V plane[Planes];
          for (int i = 0; i < Planes; ++i) {
            const uint8_t* word = call.planes[i] + word_offset + (q + t) * kWordBytes;
            plane[i] = S::load(word + h * half_bytes);
            if (h == 0) prefetch(word);
          }
          form_indices<S, (Planes > 4 ? 4 : Planes), nibble>(plane, high[t]);
          if constexpr (Planes > 4) form_indices<S, Planes - 4, true>(plane + 4, low[t]);
        }
        for (int i = 0; i < segments; ++i) {
          auto take = [&](auto set) {
            V level[together][kSlots];
            for (int t = 0; t < together; ++t)
              look_up<S, sets, count, set.value, Codebook, Planes, nibble>((*tables)[i], high[t], low[t], q + t,
                                                                           h * half_bytes, segment_bits(i), level[t]);
            const int begin = Mixed ? call.segments[i].begin : 0, end = Mixed ? call.segments[i].end : rows;
            for (int r = begin; r < end; ++r) {
              const int8_t* x = call.x + x_unit + r * x_stride;
              for (int g = 0; g < Groups; ++g) {
                V products[together];
                for (int t = 0; t < together; ++t) products[t] = S::zero();
                auto add = [&](const int8_t* from) {
                  for (int s = g * kSlots / Groups; s < (g + 1) * kSlots / Groups; ++s) {
                    const V columns = S::repeat(from + 16 * s);
                    for (int t = 0; t < together; ++t) products[t] = S::dot(products[t], level[t][s], columns);
                  }
                };
                add(x);
                if (fine(i)) {
                  for (int t = 0; t < together; ++t) products[t] = S::template left32<7>(products[t]);
                  add(call.rest + x_unit + r * x_stride);
                }
                for (int t = 0; t < together; ++t) sum[r][set.value][g][h][q + t] = products[t];
              }
            }
          };
          take(std::integral_constant<int, 0>{});
          if constexpr (sets > 1)
            if (!Mixed || segment_bits(i) > 4) take(std::integral_constant<int, 1>{});
        }
      }
    }
    if constexpr (late) {
      for (int g = 0; g < Groups; ++g)
        for (int h = 0; h < halves; ++h)
          for (int q = 0; q < kQuads; ++q) sum_before[g][h][q] = sum[0][0][g][h][q];
    } else {
      finish(unit, *tables);
    }
  }
  if (late) finish(layout.units - 1, *tables);
  for (int i = 0; i < segments; ++i) {
    const float* units = call.segments[i].units;
    const int begin = Mixed ? call.segments[i].begin : 0, end = Mixed ? call.segments[i].end : rows;
    for (int r = begin; r < end; ++r)
      for (int h = 0; h < halves; ++h) {
        F y = One ? one_total[h] : S::load_float(&total[r][h * half_rows]);
        if (units) y = S::mul(y, S::load_float(units + size_t(block) * kBlockRows + h * half_rows));
        S::store_float(out + r * kBlockRows + h * half_rows, y);
      }
  }
}

template <class S, int Planes, int Groups, bool Codebook>
BlockFunction few_rows_pick(bool mixed, bool one) {
  // rows of different bits use indices of four or eight planes; planes that are absent are garbage to every table
  constexpr int wide = Planes > 4 ? 8 : 4;
  if (mixed) return few_rows_block<S, wide, Groups, Codebook, true, false>;
  if (one) return few_rows_block<S, Planes, Groups, Codebook, false, true>;
  return few_rows_block<S, Planes, Groups, Codebook, false, false>;
}

template <class S>
BlockFunction few_rows_function(const FewRows& call) {
  const bool mixed = call.segment_count > 1, one = call.rows == 1;
#define BITSTRATA_CASE(planes)                                                                     \
  case planes:                                                                                     \
    if (call.codebook) return few_rows_pick<S, planes, 1, true>(mixed, one);                       \
    if (call.layout->groups_per_unit == 1) return few_rows_pick<S, planes, 1, false>(mixed, one);  \
    if (call.layout->groups_per_unit == 2) return few_rows_pick<S, planes, 2, false>(mixed, one);  \
    return few_rows_pick<S, planes, 4, false>(mixed, one);
  switch (call.bits) {
    BITSTRATA_CASE(1)
    BITSTRATA_CASE(2)
    BITSTRATA_CASE(3)
    BITSTRATA_CASE(4)
    BITSTRATA_CASE(5)
    BITSTRATA_CASE(6)
    BITSTRATA_CASE(7)
    default:
    BITSTRATA_CASE(8)
  }
#undef BITSTRATA_CASE
}

}  // namespace
}  // namespace bitstrata
