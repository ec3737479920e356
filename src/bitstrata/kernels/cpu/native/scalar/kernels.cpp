#include "simd.h"

#include "../generic/kernels.h"

namespace bitstrata {
extern const Kernels kScalar;
const Kernels kScalar = kernels_of<Simd>("scalar");
}  // namespace bitstrata
