// AVX-512 with VNNI: four lanes of 16 bytes, unsigned x signed byte products summed into 32 bits.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace bitstrata {
namespace {  // every instruction set has its own Simd, and its own copies of what is built on it

struct Simd {
  static constexpr int lanes = 4;
  static constexpr int level_bias = 0;
  static constexpr int level_most = 255;
  // Of a product of many rows: blocks, and rows of x, whose sums stay in registers.
  static constexpr int tile_blocks = 2, panel_rows = 6;
  // Largest level of a table of `planes` planes: uniform spacings fall on whole levels.
  static constexpr int level_max(int planes) { return planes == 3 ? 252 : 255; }

  using V = __m512i;
  using F = __m512;

  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, V v) { _mm512_storeu_si512(p, v); }
  static V repeat(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static V repeat_word(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static V bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static V upper_bytes() { return _mm512_set1_epi16(static_cast<short>(0xFF00)); }
  static V zero() { return _mm512_setzero_si512(); }

  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  static V select(V mask, V yes, V no) { return _mm512_ternarylogic_epi64(mask, yes, no, 0xCA); }
  static V twice(V a) { return _mm512_add_epi8(a, a); }
  template <int n>
  static V right(V a) {
    return _mm512_srli_epi16(a, n);
  }
  template <int n>
  static V left(V a) {
    return _mm512_slli_epi16(a, n);
  }
  // Lanes of 16-entry tables, looked up by the low nibble of each byte (bit 7 clear).
  static V lookup(V table, V index) { return _mm512_shuffle_epi8(table, index); }
  // `yes` where bit `bit` of a byte of `bits` is set.
  template <int bit>
  static V choose(V bits, V yes, V no) {
    return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(bits, bytes(1 << bit)), no, yes);
  }

  static V dot(V sum, V levels, V x) { return _mm512_dpbusd_epi32(sum, levels, x); }
  // Element 4 * lane + q of the result is the sum of the four elements of that lane of the q-th argument, added up one
  // after the other.
  static F sum4(F a, F b, F c, F d) {
    __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    F first = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), second = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    F third = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), fourth = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    return _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(first, second), third), fourth);
  }
  static F repeat4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

  static V add16(V a, V b) { return _mm512_add_epi16(a, b); }
  template <int n>
  static V left32(V a) { return _mm512_slli_epi32(a, n); }
  // Within lanes, as the instructions of the same names.
  static V unpack_low32(V a, V b) { return _mm512_unpacklo_epi32(a, b); }
  static V unpack_high32(V a, V b) { return _mm512_unpackhi_epi32(a, b); }
  static V unpack_low64(V a, V b) { return _mm512_unpacklo_epi64(a, b); }
  static V unpack_high64(V a, V b) { return _mm512_unpackhi_epi64(a, b); }

  static F to_float(V v) { return _mm512_cvtepi32_ps(v); }
  static V flip(V v) { return v; }
  static V to_int(F v) { return _mm512_cvtps_epi32(v); }
  // The lowest bytes of the elements of v, which fit there; of NaN anything.
  static void store_bytes(int8_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static F floats(float v) { return _mm512_set1_ps(v); }
  static F load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store_float(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_byte(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // The low, and the high, halves of bytes.
  static F load_low(const uint8_t* p) { return halves(wide_bytes(p)); }
  static F load_high(const uint8_t* p) { return halves(_mm512_srli_epi32(wide_bytes(p), 4)); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  // A product as it is rounded: the compiler must not make one operation of it and a sum that follows.
  static F rounded(F a) {
    asm("" : "+v"(a));
    return a;
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static void store_half(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // out[i] = table[index[i]] for 16 indices below 16.
  static void gather16(const float* table, const uint8_t* index, float* out) {
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(wide, _mm512_loadu_ps(table)));
  }
  // a / b where b > 0, else 0. A relative error of 2^-13 is allowed.
  static F ratio(F a, F b) {
    __mmask16 positive = _mm512_cmp_ps_mask(b, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(a, _mm512_maskz_rcp14_ps(positive, b));
  }

 private:
  static V wide_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F halves(V v) { return _mm512_permutexvar_ps(v, _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)); }
};

}  // namespace
}  // namespace bitstrata
