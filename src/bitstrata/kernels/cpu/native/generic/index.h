// From planes to table indices: a bit transposition in registers.
//
// Four planes of a word become, for each of the eight slots, 64 bytes whose low nibble is the code of
// one weight: bit 3 from the first plane, bit 0 from the fourth. Two butterfly steps merge neighbouring
// planes (fields of two bits, then nibbles); with fewer planes the lower bits of an index are garbage,
// and tables repeat their entries over them. One or two planes need no transposition at all: a nibble of
// the plane, or of the merged pair, indexes tables that look at one bit, or at one field, of it.
#pragma once
#include "layout.h"

namespace bitstrata {
namespace {

// How many tables the slots of a word use: slot s looks its index up in table s % 4 * kTables / 4.
template <int Planes, bool Nibble>
struct IndexForm {
  static constexpr int tables = Nibble || Planes > 2 ? 1 : (Planes == 1 ? 4 : 2);
  static constexpr int table_of(int slot) { return (slot % 4) * tables / 4; }
};

template <class S, int Planes, bool Nibble>
inline void form_indices(const typename S::V* plane, typename S::V* index) {
  using V = typename S::V;
  const V low_nibble = S::bytes(0x0F);
  auto split = [&](V nibbles, int slot) {
    index[slot] = S::both(nibbles, low_nibble);
    index[slot + 4] = S::both(S::template right<4>(nibbles), low_nibble);
  };
  if constexpr (!Nibble && Planes == 1) {
    split(plane[0], 0);
    index[1] = index[2] = index[3] = index[0];
    index[5] = index[6] = index[7] = index[4];
  } else {
    const V odd_bits = S::bytes(0xAA);
    V even_high, odd_high;  // fields of two bits: planes 0 and 1
    if constexpr (Planes == 1) {
      even_high = S::twice(plane[0]);
      odd_high = plane[0];
    } else {
      even_high = S::select(odd_bits, S::twice(plane[0]), plane[1]);
      odd_high = S::select(odd_bits, plane[0], S::template right<1>(plane[1]));
    }
    if constexpr (!Nibble && Planes == 2) {
      split(even_high, 0);
      split(odd_high, 1);
      index[2] = index[0], index[6] = index[4];
      index[3] = index[1], index[7] = index[5];
    } else if constexpr (Planes <= 2) {
      split(S::template left<2>(even_high), 0);
      split(S::template left<2>(odd_high), 1);
      split(even_high, 2);
      split(odd_high, 3);
    } else {
      const V high_fields = S::bytes(0xCC);
      V even_low, odd_low;  // planes 2 and 3
      if constexpr (Planes == 3) {
        even_low = S::twice(plane[2]);
        odd_low = plane[2];
      } else {
        even_low = S::select(odd_bits, S::twice(plane[2]), plane[3]);
        odd_low = S::select(odd_bits, plane[2], S::template right<1>(plane[3]));
      }
      split(S::select(high_fields, S::template left<2>(even_high), even_low), 0);
      split(S::select(high_fields, S::template left<2>(odd_high), odd_low), 1);
      split(S::select(high_fields, even_high, S::template right<2>(even_low)), 2);
      split(S::select(high_fields, odd_high, S::template right<2>(odd_low)), 3);
    }
  }
}

}  // namespace
}  // namespace bitstrata
