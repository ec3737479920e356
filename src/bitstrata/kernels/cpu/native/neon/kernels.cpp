#include "simd.h"

#include "../generic/kernels.h"

namespace bitstrata {
extern const Kernels kNeon;
const Kernels kNeon = kernels_of<Simd>("neon");
}  // namespace bitstrata
