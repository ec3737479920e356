// AVX2: two lanes of 16 bytes. With AVX-VNNI the byte products are summed in one instruction; without it pairs of
// products are summed into signed 16 bits first, so levels stay below 128.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace bitstrata {
namespace {  // every instruction set has its own Simd, and its own copies of what is built on it

struct Simd {
  static constexpr int lanes = 2;
  // Of a product of many rows: blocks, and rows of x, whose sums stay in registers.
  static constexpr int tile_blocks = 1, panel_rows = 4;
  static constexpr int level_bias = 0;
#ifdef __AVXVNNI__
  static constexpr int level_most = 255;
  static constexpr int level_max(int planes) { return planes == 3 ? 252 : 255; }
#else
  static constexpr int level_most = 127;
  static constexpr int level_max(int planes) { return planes == 4 ? 120 : 126; }
#endif

  using V = __m256i;
  using F = __m256;

  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
  static V repeat(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static V repeat_word(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static V bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static V upper_bytes() { return _mm256_set1_epi16(static_cast<short>(0xFF00)); }
  static V zero() { return _mm256_setzero_si256(); }
  static V flip(V v) { return v; }

  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  static V select(V mask, V yes, V no) {
    return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
  }
  static V twice(V a) { return _mm256_add_epi8(a, a); }
  template <int n>
  static V right(V a) {
    return _mm256_srli_epi16(a, n);
  }
  template <int n>
  static V left(V a) {
    return _mm256_slli_epi16(a, n);
  }
  static V lookup(V table, V index) { return _mm256_shuffle_epi8(table, index); }
  template <int bit>
  static V choose(V bits, V yes, V no) {
    return _mm256_blendv_epi8(no, yes, _mm256_slli_epi16(bits, 7 - bit));
  }

  static V dot(V sum, V levels, V x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, levels, x);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(levels, x), _mm256_set1_epi16(1)));
#endif
  }
  static F sum4(F a, F b, F c, F d) {
    __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    F first = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), second = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    F third = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), fourth = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    return _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(first, second), third), fourth);
  }
  static F repeat4(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }

  static V add16(V a, V b) { return _mm256_add_epi16(a, b); }
  template <int n>
  static V left32(V a) { return _mm256_slli_epi32(a, n); }
  static V unpack_low32(V a, V b) { return _mm256_unpacklo_epi32(a, b); }
  static V unpack_high32(V a, V b) { return _mm256_unpackhi_epi32(a, b); }
  static V unpack_low64(V a, V b) { return _mm256_unpacklo_epi64(a, b); }
  static V unpack_high64(V a, V b) { return _mm256_unpackhi_epi64(a, b); }

  static F to_float(V v) { return _mm256_cvtepi32_ps(v); }
  static V to_int(F v) { return _mm256_cvtps_epi32(v); }
  // The lowest bytes of the elements of v, which fit there; of NaN anything.
  static void store_bytes(int8_t* p, V v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static F floats(float v) { return _mm256_set1_ps(v); }
  static F load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store_float(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_half(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_bfloat(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_byte(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_low(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(wide_bytes(p), _mm256_set1_epi32(15)));
  }
  static F load_high(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(wide_bytes(p), 4)); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F rounded(F a) {
    asm("" : "+x"(a));
    return a;
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F ratio(F a, F b) {
    return _mm256_and_ps(_mm256_div_ps(a, b), _mm256_cmp_ps(b, _mm256_setzero_ps(), _CMP_GT_OQ));
  }
  static void gather16(const float* table, const uint8_t* index, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = table[index[i]];
  }

 private:
  static V wide_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
}  // namespace bitstrata
