// Between the stored layout of a weight and the blocked one (generic/layout.h).
#pragma once
#include "generic/layout.h"

namespace bitstrata {

// Row `row` of a plane; rows beyond the weight's (up to a whole block) are packed as zeros. `words` [ceil(K / 32)];
// `scratch` [units * 4].
void pack_plane_row(const Layout& layout, const uint32_t* words, uint8_t* plane, int row, uint32_t* scratch);
void unpack_plane_row(const Layout& layout, const uint8_t* plane, uint32_t* words, int row, uint32_t* scratch);

// scale [bits, N, J], offset [N, J] <-> [blocks][groups][bits + 1][16]
void pack_scales(const Layout& layout, const uint16_t* scale, const uint16_t* offset, int bits, uint16_t* out);
void unpack_scales(const Layout& layout, const uint16_t* packed, int bits, uint16_t* scale, uint16_t* offset);

}  // namespace bitstrata
