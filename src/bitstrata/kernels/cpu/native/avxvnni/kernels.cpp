#include "simd.h"

#include "../generic/kernels.h"

namespace bitstrata {
extern const Kernels kAvxVnni;
const Kernels kAvxVnni = kernels_of<Simd>("avxvnni");
}  // namespace bitstrata
