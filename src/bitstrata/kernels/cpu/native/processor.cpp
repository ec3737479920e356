// On x86-64 written out: the tables behind __builtin_cpu_supports are in a library that Clang does not link on Windows.
#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <initializer_list>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitstrata {

#if defined(__x86_64__)
namespace {

enum Register { A, B, C, D };

bool has(unsigned leaf, unsigned subleaf, Register where, std::initializer_list<int> bits) {
  unsigned registers[4] = {0, 0, 0, 0};
  if (!__get_cpuid_count(leaf, subleaf, &registers[A], &registers[B], &registers[C], &registers[D])) return false;
  for (int bit : bits)
    if (!(registers[where] >> bit & 1)) return false;
  return true;
}

// Whether the system keeps registers when it switches threads (XCR0): bits 1 and 2 are xmm and ymm, 5 to 7 AVX-512's.
bool kept(unsigned mask) {
  if (!has(1, 0, C, {27})) return false;  // OSXSAVE: xgetbv may be asked
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

bool has_wide() { return has_avx2() && kept(0xe6) && has(7, 0, B, {16, 17, 30, 31}); }  // AVX-512 F, DQ, BW, VL

}  // namespace

bool has_avx2() { return kept(0x6) && has(1, 0, C, {12, 28, 29}) && has(7, 0, B, {5, 8}); }  // FMA, AVX, F16C; AVX2, BMI2
bool has_avx_vnni() { return has_avx2() && has(7, 1, A, {4}); }
bool has_avx512() { return has_wide() && has(7, 0, C, {11}); }
bool has_avx512_bf16() { return has_wide() && has(7, 1, A, {5}); }
#elif defined(__aarch64__)
bool has_neon_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every 64-bit Mac
#endif
}
#endif

}  // namespace bitstrata
