// Level tables: what a code means, as unsigned bytes.
//
// The weights of a group take at most 2^bits values. For up to four planes they are kept as
//
//   W = low + step * level,   level = 0..level_max,   low the smallest value, step * level_max the span
//
// in a table of 16 bytes a row, so a lookup turns a nibble into something a byte dot product accepts.
// Rounding a value to a whole level is off by at most step / 2; evenly spaced values are exact. With more
// than four planes the weight is the sum of two such tables, planes 0-3 with the offset and planes 4-7.
//
// Tables are built in registers from the stored fp16 scales whenever a group begins: with D_i the level
// difference that plane i makes (8 fractional bits), entry c of a table is base + sum of D_i over the bits of c.
#pragma once
#include <cmath>

#include "half.h"
#include "index.h"

namespace bitstrata {
namespace {

// Byte shuffles within a lane that holds four 32-bit numbers, or 8 bytes for each of two rows.
struct alignas(64) Shuffles {
  uint8_t twice[kWordBytes];               // both halves of a number from its lower half
  uint8_t field[2][kQuads][kWordBytes];    // entry n of row q's table: byte n & 3, or n >> 2, of number q
  uint8_t half_table[2][kWordBytes];       // entry n: byte n >> 1 of the lower or upper 8 bytes
  uint8_t bit[4][kWordBytes];              // no shuffle but a table: bit t of n
  constexpr Shuffles() : twice(), field(), half_table(), bit() {
    for (int byte = 0; byte < kWordBytes; ++byte) {
      const int n = byte % 16;
      twice[byte] = uint8_t(n / 4 * 4 + n % 2);
      for (int q = 0; q < kQuads; ++q) {
        field[0][q][byte] = uint8_t(4 * q + n % 4);
        field[1][q][byte] = uint8_t(4 * q + n / 4);
      }
      for (int upper = 0; upper < 2; ++upper) half_table[upper][byte] = uint8_t(8 * upper + n / 2);
      for (int t = 0; t < 4; ++t) bit[t][byte] = uint8_t(n >> t & 1);
    }
  }
};
inline constexpr Shuffles kShuffles{};

// Tables of one activation segment for one unit. `Sets` is 2 where two tables add up, `Count` the tables that the
// slots of a word choose from.
template <class S, int Groups, int Sets, int Count>
struct Tables {
  static constexpr int halves = 4 / S::lanes, sets = Sets;
  alignas(64) uint8_t level[Groups][Sets][Count][kQuads][kWordBytes];
  alignas(64) float step[Groups][Sets][kBlockRows];
  alignas(64) float low[Groups][kBlockRows];
};

// The levels of 4 * lanes rows, as tables of 16 bytes: `put(table, q, lanes of the rows 4 * lane + q)`.
//
// `base` and `delta` are 16-bit numbers with 8 fractional bits, one to each 32-bit element; plane 0 is the highest
// bit of a code. Two codes that differ by 2 share an element, so that after adding up the upper bytes of two such
// elements merge into four consecutive levels.
template <class S, int Planes, bool Nibble, class Put>
inline void level_tables(typename S::V base, const typename S::V* delta, Put put) {
  using V = typename S::V;
  static_assert(Planes >= 2 && Planes <= 4, "one plane needs no table of its own");
  const V twice = S::load(kShuffles.twice), upper_bytes = S::upper_bytes();
  auto both = [&](V value) { return S::lookup(value, twice); };
  auto merge = [&](V even, V odd) { return S::select(upper_bytes, odd, S::template right<8>(even)); };
  const V bit1 = delta[Planes - 2], bit0 = both(delta[Planes - 1]);
  V pairs = S::add16(both(base), S::template left32<16>(bit1));
  auto four = [&](V even) { return merge(even, S::add16(even, bit0)); };
  const V word0 = four(pairs);
  auto finish = [&](V table) { return S::flip(table); };
  if constexpr (Planes == 2) {
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (Nibble) {
        put(0, q, finish(S::lookup(word0, S::load(kShuffles.field[1][q]))));
      } else {
        put(0, q, finish(S::lookup(word0, S::load(kShuffles.field[0][q]))));
        put(1, q, finish(S::lookup(word0, S::load(kShuffles.field[1][q]))));
      }
    }
  } else {
    const V bit2 = both(delta[Planes - 3]);
    V pairs4 = S::add16(pairs, bit2);
    const V word1 = four(pairs4);
    if constexpr (Planes == 3) {
      const V rows01 = S::unpack_low32(word0, word1), rows23 = S::unpack_high32(word0, word1);
      for (int q = 0; q < kQuads; ++q)
        put(0, q, finish(S::lookup(q < 2 ? rows01 : rows23, S::load(kShuffles.half_table[q % 2]))));
    } else {
      const V bit3 = both(delta[0]);
      const V word2 = four(S::add16(pairs, bit3)), word3 = four(S::add16(pairs4, bit3));
      const V low01 = S::unpack_low32(word0, word1), low23 = S::unpack_high32(word0, word1);
      const V high01 = S::unpack_low32(word2, word3), high23 = S::unpack_high32(word2, word3);
      put(0, 0, finish(S::unpack_low64(low01, high01)));
      put(0, 1, finish(S::unpack_high64(low01, high01)));
      put(0, 2, finish(S::unpack_low64(low23, high23)));
      put(0, 3, finish(S::unpack_high64(low23, high23)));
    }
  }
}

// A coefficient of the rows of a half: fp16, or a byte, of which plane `plane` counts 2^-plane.
template <class S>
inline typename S::F coefficient(const uint16_t* scales, int) {
  return S::load_half(scales);
}

template <class S>
inline typename S::F coefficient(const int8_t* scales, int plane) {
  return S::mul(S::load_byte(scales), S::floats(1.0f / float(1 << plane)));
}

// Planes first..first+Planes-1 of one group for the rows of half `h`; returns `low` less what the tables' lowest entries are.
template <class S, int Planes, bool Nibble, class T, class C>
inline typename S::F affine_set(T& tables, int g, int set, int h, const C* scales, typename S::F low) {
  using V = typename S::V;
  using F = typename S::F;
  constexpr int half_rows = 4 * S::lanes, at_bytes = 16 * S::lanes;
  auto put = [&](int table, int q, V value) { S::store(&tables.level[g][set][table][q][h * at_bytes], value); };
  F step;
  if constexpr (Planes == 1) {  // the level is the bit
    F scale = coefficient<S>(scales, 0);
    step = S::add(scale, scale);
    low = S::sub(low, scale);
    for (int q = 0; q < kQuads; ++q)
      for (int t = 0; t < (Nibble ? 1 : 4); ++t) put(t, q, S::flip(S::load(kShuffles.bit[Nibble ? 3 : t])));
  } else {
    F scale[Planes], total = coefficient<S>(scales, 0), span = S::abs(total);
    scale[0] = total;
    for (int i = 1; i < Planes; ++i) {
      scale[i] = coefficient<S>(scales + i * kBlockRows, i);
      total = S::add(total, scale[i]);
      span = S::add(span, S::abs(scale[i]));
    }
    constexpr float most = float(S::level_max(Planes));
    const F unit = S::ratio(S::floats(most * 256), span);
    V delta[Planes];
    for (int i = 0; i < Planes; ++i) delta[i] = S::to_int(S::mul(scale[i], unit));
    const F below = S::mul(S::sub(span, total), S::floats(0.5f));
    const V base = S::to_int(S::fma(below, unit, S::floats(128)));  // 128: rounds when the fraction is dropped
    level_tables<S, Planes, Nibble>(base, delta, put);
    step = S::mul(span, S::floats(2 / most));
    low = S::sub(low, span);
  }
  S::store_float(&tables.step[g][set][h * half_rows], step);
  return S::level_bias ? S::fma(step, S::floats(float(S::level_bias)), low) : low;
}

// `scales` [bits + 1][16] of one group -> group `g` of `tables`, planes arranged as IndexForm says. From bytes, `step`
// and `low` lack the rows' units.
template <class S, bool Nibble, class T, class C>
inline void affine_tables(T& tables, int g, const C* scales, int bits) {
  constexpr int half_rows = 4 * S::lanes;
  for (int h = 0; h < T::halves; ++h) {
    const C* at = scales + h * half_rows;
    auto low = coefficient<S>(at + bits * kBlockRows, 0);
    if (bits == 1) low = affine_set<S, 1, Nibble>(tables, g, 0, h, at, low);
    else if (bits == 2) low = affine_set<S, 2, Nibble>(tables, g, 0, h, at, low);
    else if (bits == 3) low = affine_set<S, 3, Nibble>(tables, g, 0, h, at, low);
    else low = affine_set<S, 4, Nibble>(tables, g, 0, h, at, low);
    if constexpr (T::sets > 1 && sizeof(C) == 2) {  // more than kByteBits
      const C* rest = at + 4 * kBlockRows;
      if (bits == 5) low = affine_set<S, 1, true>(tables, g, 1, h, rest, low);
      else if (bits == 6) low = affine_set<S, 2, true>(tables, g, 1, h, rest, low);
      else if (bits == 7) low = affine_set<S, 3, true>(tables, g, 1, h, rest, low);
      else if (bits == 8) low = affine_set<S, 4, true>(tables, g, 1, h, rest, low);
    }
    S::store_float(&tables.low[g][h * half_rows], low);
  }
}

// `table` [16][2^bits] of one block -> group 0 of `tables`. With more than four bits, table c holds the entries
// whose planes 4..7 are the bits of c, planes beyond `bits` ignored.
template <class S, int Planes, bool Nibble, class T>
inline void codebook_tables(T& tables, const uint16_t* table, int bits, int count) {
  const int entries = 1 << bits;
  for (int row = 0; row < kBlockRows; ++row) {
    float value[1 << kMaxBits], low = INFINITY, high = -INFINITY;
    uint8_t level[1 << kMaxBits];
    for (int c = 0; c < entries; ++c) {
      value[c] = half_to_float(table[row * entries + c]);
      low = value[c] < low ? value[c] : low;
      high = value[c] > high ? value[c] : high;
    }
    const float most = float(S::level_most), step = (high - low) / most;
    const float unit = step > 0 ? 1 / step : 0;
    for (int c = 0; c < entries; ++c) {
      float scaled = (value[c] - low) * unit + 0.5f;
      level[c] = uint8_t(int(scaled < most ? scaled : most) ^ S::level_bias);
    }
    tables.step[0][0][row] = step;
    tables.low[0][row] = low + step * float(S::level_bias);
    const int lane = row / 4, q = row % 4;
    for (int t = 0; t < count; ++t)
      for (int n = 0; n < 16; ++n) {
        int code;
        if (!Nibble && bits == 1) code = n >> t & 1;
        else if (!Nibble && bits == 2) code = t ? n >> 2 : n & 3;
        else if (bits <= 4) code = n >> (4 - bits);
        else code = n << (bits - 4) | t >> (Planes - bits);
        tables.level[0][0][t][q][lane * 16 + n] = level[code];
      }
  }
}

}  // namespace
}  // namespace bitstrata
