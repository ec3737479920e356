// Between the stored layout of a weight and the blocked one (generic/layout.h).
#pragma once
#include "generic/layout.h"

namespace bitstrata {

// Row `row` of a plane; rows beyond the weight's (up to a whole block) are packed as zeros. `words` [ceil(K / 32)];
// `scratch` [units * 4].
void pack_plane_row(const Layout& layout, const uint32_t* words, uint8_t* plane, int row, uint32_t* scratch);
void unpack_plane_row(const Layout& layout, const uint8_t* plane, uint32_t* words, int row, uint32_t* scratch);

// scale [bits, N, J], offset [N, J] <-> [blocks][groups][bits + 1][16], of halves or bytes
template <class C>
void pack_scales(const Layout& layout, const C* scale, const C* offset, int bits, C* out);
template <class C>
void unpack_scales(const Layout& layout, const C* packed, int bits, C* scale, C* offset);

// fp16 [N] <-> 2^-7 times that as fp32 [blocks][16]
void pack_units(const Layout& layout, const uint16_t* stored, float* out);
void unpack_units(const Layout& layout, const float* packed, uint16_t* stored);

}  // namespace bitstrata
