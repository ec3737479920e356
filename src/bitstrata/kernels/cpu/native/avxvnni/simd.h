// AVX2 with the byte dot product of AVX-VNNI: the same operations, compiled with the instruction allowed.
#pragma once
#include "../avx2/simd.h"
