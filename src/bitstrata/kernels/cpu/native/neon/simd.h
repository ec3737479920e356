// Arm NEON with the signed byte dot product (Armv8.2): one lane of 16 bytes. The product takes signed bytes on both
// sides, so tables hold level - 128, and `low` makes up for it.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace bitstrata {
namespace {  // every instruction set has its own Simd, and its own copies of what is built on it

struct Simd {
  static constexpr int lanes = 1;
  // Of a product of many rows: blocks, and rows of x, whose sums stay in registers.
  static constexpr int tile_blocks = 1, panel_rows = 4;
  static constexpr int level_bias = 128;
  static constexpr int level_most = 255;
  static constexpr int level_max(int planes) { return planes == 3 ? 252 : 255; }

  using V = uint8x16_t;
  using F = float32x4_t;

  static V load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static void store(void* p, V v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
  static V repeat(const void* p) { return load(p); }
  static V repeat_word(const void* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
  }
  static V bytes(int value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }
  static V upper_bytes() { return vreinterpretq_u8_u16(vdupq_n_u16(0xFF00)); }
  static V zero() { return vdupq_n_u8(0); }
  static V flip(V v) { return veorq_u8(v, vdupq_n_u8(128)); }

  static V both(V a, V b) { return vandq_u8(a, b); }
  static V select(V mask, V yes, V no) { return vbslq_u8(mask, yes, no); }
  static V twice(V a) { return vaddq_u8(a, a); }
  template <int n>
  static V right(V a) {
    return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a), n));
  }
  template <int n>
  static V left(V a) {
    return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a), n));
  }
  static V lookup(V table, V index) { return vqtbl1q_u8(table, index); }
  template <int bit>
  static V choose(V bits, V yes, V no) {
    return vbslq_u8(vtstq_u8(bits, vdupq_n_u8(1 << bit)), yes, no);
  }

  static V dot(V sum, V levels, V x) {
    return vreinterpretq_u8_s32(
        vdotq_s32(vreinterpretq_s32_u8(sum), vreinterpretq_s8_u8(levels), vreinterpretq_s8_u8(x)));
  }
  static F sum4(F a, F b, F c, F d) {
    float64x2_t ab = vreinterpretq_f64_f32(vzip1q_f32(a, b)), cd = vreinterpretq_f64_f32(vzip1q_f32(c, d));
    F first = vreinterpretq_f32_f64(vzip1q_f64(ab, cd)), second = vreinterpretq_f32_f64(vzip2q_f64(ab, cd));
    ab = vreinterpretq_f64_f32(vzip2q_f32(a, b)), cd = vreinterpretq_f64_f32(vzip2q_f32(c, d));
    F third = vreinterpretq_f32_f64(vzip1q_f64(ab, cd)), fourth = vreinterpretq_f32_f64(vzip2q_f64(ab, cd));
    return vaddq_f32(vaddq_f32(vaddq_f32(first, second), third), fourth);
  }
  static F repeat4(const float* p) { return vld1q_f32(p); }

  static V add16(V a, V b) {
    return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
  }
  template <int n>
  static V left32(V a) { return vreinterpretq_u8_u32(vshlq_n_u32(vreinterpretq_u32_u8(a), n)); }
  static V unpack_low32(V a, V b) {
    return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
  }
  static V unpack_high32(V a, V b) {
    return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
  }
  static V unpack_low64(V a, V b) {
    return vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
  }
  static V unpack_high64(V a, V b) {
    return vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
  }

  static F to_float(V v) { return vcvtq_f32_s32(vreinterpretq_s32_u8(v)); }
  static V to_int(F v) { return vreinterpretq_u8_s32(vcvtnq_s32_f32(v)); }
  // The lowest bytes of the elements of v, which fit there; of NaN anything.
  static void store_bytes(int8_t* p, V v) {
    const int16x4_t words = vqmovn_s32(vreinterpretq_s32_u8(v));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    std::memcpy(p, &bytes, 4);
  }
  static F floats(float v) { return vdupq_n_f32(v); }
  static F load_float(const float* p) { return vld1q_f32(p); }
  static void store_float(float* p, F v) { vst1q_f32(p, v); }
  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_half(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static F load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16)); }
  static F load_byte(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static F load_low(const uint8_t* p) { return vcvtq_f32_u32(vandq_u32(wide_bytes(p), vdupq_n_u32(15))); }
  static F load_high(const uint8_t* p) { return vcvtq_f32_u32(vshrq_n_u32(wide_bytes(p), 4)); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F rounded(F a) {
    asm("" : "+w"(a));
    return a;
  }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F ratio(F a, F b) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(vdivq_f32(a, b)), vcgtq_f32(b, vdupq_n_f32(0))));
  }
  static void gather16(const float* table, const uint8_t* index, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = table[index[i]];
  }

 private:
  static uint32x4_t wide_bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
  }
};

}  // namespace
}  // namespace bitstrata
