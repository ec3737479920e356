#include "simd.h"

#include "../generic/kernels.h"

namespace bitstrata {
extern const Kernels kAvx512;
const Kernels kAvx512 = kernels_of<Simd>("avx512");
}  // namespace bitstrata
