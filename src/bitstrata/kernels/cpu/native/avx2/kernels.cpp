#include "simd.h"

#include "../generic/kernels.h"

namespace bitstrata {
extern const Kernels kAvx2;
const Kernels kAvx2 = kernels_of<Simd>("avx2");
}  // namespace bitstrata
