// fp16 and bf16 as bits, converted without instructions that a processor may lack. Rounds to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

namespace bitstrata {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // infinity, NaN
  // the exponents differ by 112; the multiplication normalises subnormals
  return float_of(sign | bits_of(float_of(rest << 13) * float_of(uint32_t(127 + 112) << 23)));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds beyond 65504
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return uint16_t(sign | (magnitude - (uint32_t(112) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(uint16_t value) { return float_of(uint32_t(value) << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace bitstrata
