// What this processor can run, and the system lets it.
#pragma once

namespace bitstrata {

#if defined(__x86_64__)
bool has_avx2();  // with FMA, F16C and BMI2
bool has_avx_vnni();
bool has_avx512();  // F, BW, VL and DQ, with VNNI
bool has_avx512_bf16();
#elif defined(__aarch64__)
bool has_neon_dot();
#endif

}  // namespace bitstrata
