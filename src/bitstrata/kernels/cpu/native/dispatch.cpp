#include "dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitstrata {

extern const Kernels kAvx512, kAvxVnni, kAvx2, kNeon, kScalar;

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
bool has_neon_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every 64-bit Mac
#endif
}
#endif

}  // namespace

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
