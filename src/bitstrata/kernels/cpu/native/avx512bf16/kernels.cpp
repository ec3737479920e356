// A tile of x^T y in bf16 products and fp32 sums, see gram.cpp.
#include <immintrin.h>

#include "../gram.h"

namespace bitstrata {
namespace {

// Eight columns of x and 16 * panels of y. x and y are packed: of each pair of rows 16 words, a column's two values each.
template <int panels>
void tile(const uint32_t* x, const uint32_t* const* y, int pairs, float* total, int64_t stride, int rows, int columns) {
  __m512 sum[kGramRows][panels];
  for (auto& row : sum)
    for (auto& part : row) part = _mm512_setzero_ps();
  for (int pair = 0; pair < pairs; ++pair) {
    __m512bh right[panels];
    for (int p = 0; p < panels; ++p) right[p] = (__m512bh)_mm512_loadu_si512(y[p] + pair * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kGramRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(int(x[pair * 16 + i]));
#pragma GCC unroll 3
      for (int p = 0; p < panels; ++p) sum[i][p] = _mm512_dpbf16_ps(sum[i][p], left, right[p]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int p = 0; p < panels; ++p) {
      const int here = columns - 16 * p < 16 ? columns - 16 * p : 16;
      const __mmask16 mask = __mmask16((1u << here) - 1);
      float* to = total + i * stride + 16 * p;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum[i][p]));
    }
}

}  // namespace

void gram_tile_avx512bf16(const uint32_t* x, const uint32_t* const* y, int panels, int pairs, float* total,
                          int64_t stride, int rows, int columns) {
  switch (panels) {
    case 1: return tile<1>(x, y, pairs, total, stride, rows, columns);
    case 2: return tile<2>(x, y, pairs, total, stride, rows, columns);
    default: return tile<3>(x, y, pairs, total, stride, rows, columns);
  }
}

}  // namespace bitstrata
