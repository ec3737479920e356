#include "dispatch.h"

#include <stdexcept>

#include "processor.h"

namespace bitstrata {

extern const Kernels kAvx512, kAvxVnni, kAvx2, kNeon, kScalar;

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = {
#if defined(BITSTRATA_HAVE_AVX512)
      {&kAvx512, has_avx512(), "AVX-512 (F, BW, VL, DQ) with VNNI"},
#endif
#if defined(BITSTRATA_HAVE_AVXVNNI)
      {&kAvxVnni, has_avx_vnni(), "AVX2, FMA, F16C and AVX-VNNI"},
#endif
#if defined(BITSTRATA_HAVE_AVX2)
      {&kAvx2, has_avx2(), "AVX2, FMA and F16C"},
#endif
#if defined(BITSTRATA_HAVE_NEON)
      {&kNeon, has_neon_dot(), "NEON with dot products (Armv8.2)"},
#endif
      {&kScalar, true, "nothing in particular"},
  };
  return all;
}

const Kernels& kernels_named(const std::string& name) {
  for (const Choice& choice : choices())
    if (name == choice.kernels->name) {
      if (!choice.runs) throw std::invalid_argument("this processor lacks " + std::string(choice.needs));
      return *choice.kernels;
    }
  throw std::invalid_argument("no kernels for " + name + " in this build");
}

}  // namespace bitstrata
