// Keys and values as codes of 8 or 4 bits: what kernels/cached.py says, in native code.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "call.h"
#include "half.h"

namespace bitstrata {
namespace {

// Sums and differences of neighbours `Half` apart, if they are in one block.
template <int Half>
inline void mix_by(float* head, int width, int block) {
  if (Half >= block) return;
  for (int first = 0; first < width; first += 2 * Half) {
    float* at = head + first;
    float sum[Half], difference[Half];
    for (int j = 0; j < Half; ++j) sum[j] = at[j] + at[j + Half], difference[j] = at[j] - at[j + Half];
    for (int j = 0; j < Half; ++j) at[j] = sum[j], at[j + Half] = difference[j];
  }
}

// Walsh-Hadamard transforms, orthonormal, of as many neighbours as the largest power of two that divides the width: its
// own inverse.
template <class S>
void mix(float* head, int width) {
  const int block = width & -width;
  mix_by<1>(head, width, block), mix_by<2>(head, width, block), mix_by<4>(head, width, block), mix_by<8>(head, width, block);
  for (int half = 16; half < block; half *= 2)
    for (int first = 0; first < width; first += 2 * half)
      for (int j = first; j < first + half; ++j) {
        const float one = head[j], other = head[j + half];
        head[j] = one + other, head[j + half] = one - other;
      }
  const float scale = 1.0f / std::sqrt(float(block));
  for (int k = 0; k < width; ++k) head[k] *= scale;
}

inline uint16_t up_to_bfloat(float x) { return uint16_t((bits_of(x) + (x > 0 ? 0xFFFFu : 0u)) >> 16); }

// head [width], which is changed, -> codes, and its step and offset.
template <class S>
void encode(float* head, int width, int bits, uint8_t* codes, uint16_t* meaning) {
  constexpr int at_once = kPacked / 2, vector = 4 * S::lanes;
  constexpr float rounder = 12582912.f;  // 1.5 * 2^23: what is added to it falls on a whole number
  mix<S>(head, width);
  float lows[at_once], highs[at_once], odd[at_once] = {};
  for (int j = 0; j < at_once; ++j) lows[j] = highs[j] = head[0];
  for (int k = 0; k < width; k += at_once)
    for (int j = 0; j < std::min(at_once, width - k); ++j) {
      const float x = head[k + j];
      lows[j] = x < lows[j] ? x : lows[j];
      highs[j] = x > highs[j] ? x : highs[j];
      odd[j] += x - x;  // of infinity and NaN: NaN
    }
  float low = lows[0], high = highs[0], unknown = odd[0];
  for (int j = 1; j < at_once; ++j) {
    low = lows[j] < low ? lows[j] : low;
    high = highs[j] > high ? highs[j] : high;
    unknown += odd[j];
  }
  const float most = float((1 << bits) - 1);
  meaning[1] = uint16_t(up_to_bfloat(-low) ^ 0x8000);
  const float offset = bfloat_to_float(meaning[1]), range = high - offset;
  const bool known = unknown == 0 && range - range == 0;
  meaning[0] = known ? up_to_bfloat(range / most) : 0x7FC0;
  float step = bfloat_to_float(meaning[0]);
  if (known && step < kSmallestStep) meaning[0] = 0, step = 0;
  const float base = bits == 8 ? kByteBase : 0.0f;
  alignas(64) float scaled[kPacked];
  alignas(64) int8_t found[kPacked];
  for (int k = 0; k < width; k += kPacked) {
    const int count = std::min(kPacked, width - k);
    for (int j = 0; j < count; ++j)
      scaled[j] = ((step > 0 ? (head[k + j] - offset) / step : 0.0f) + rounder) - rounder - base;
    for (int j = count; j < kPacked; ++j) scaled[j] = 0;
    for (int j = 0; j < kPacked; j += vector) S::store_bytes(found + j, S::to_int(S::load_float(scaled + j)));
    if (bits == 8) {
      std::memcpy(codes + k, found, size_t(count));
      continue;
    }
    for (int j = 0; j < at_once; ++j) codes[k / 2 + j] = uint8_t(found[j] | found[at_once + j] << 4);
  }
}

// Codes as numbers, a vector at a time; of 8 bits kByteBase less.
template <class S>
struct Bytes {
  const uint8_t* p;
  typename S::F load(size_t i) const { return S::load_byte(reinterpret_cast<const int8_t*>(p + i)); }
  float one(size_t i) const { return float(int8_t(p[i])); }
};
template <class S>
struct Nibbles {
  const uint8_t* p;
  typename S::F load(size_t i) const {
    const uint8_t* at = p + i / kPacked * (kPacked / 2) + i % (kPacked / 2);
    return i & (kPacked / 2) ? S::load_high(at) : S::load_low(at);
  }
  float one(size_t i) const {
    const int both = p[i / kPacked * (kPacked / 2) + i % (kPacked / 2)];
    return float(i & (kPacked / 2) ? both >> 4 : both & 15);
  }
};

}  // namespace
}  // namespace bitstrata
