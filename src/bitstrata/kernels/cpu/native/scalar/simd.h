// No instruction set in particular: one lane of 16 bytes in ordinary arithmetic. Always built; slow, and easy to check.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../generic/half.h"

namespace bitstrata {
namespace {  // every instruction set has its own Simd, and its own copies of what is built on it

struct Simd {
  static constexpr int lanes = 1;
  // Of a product of many rows: blocks, and rows of x, whose sums stay in registers.
  static constexpr int tile_blocks = 1, panel_rows = 4;
  static constexpr int level_bias = 0;
  static constexpr int level_most = 255;
  static constexpr int level_max(int planes) { return planes == 3 ? 252 : 255; }

  struct V {
    uint8_t byte[16];
  };
  struct F {
    float at[4];
  };

  template <class T>
  static T word(const V& v, int i) {
    T value;
    std::memcpy(&value, v.byte + i * sizeof(T), sizeof(T));
    return value;
  }
  // Element i of the result is f(i), elements of type T.
  template <class T, class Function>
  static V make(Function f) {
    V v;
    for (int i = 0; i < int(16 / sizeof(T)); ++i) {
      const T value = static_cast<T>(f(i));
      std::memcpy(v.byte + i * sizeof(T), &value, sizeof(T));
    }
    return v;
  }
  template <class Function>
  static F each(Function f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, 16);
    return v;
  }
  static void store(void* p, const V& v) { std::memcpy(p, &v, 16); }
  static V repeat(const void* p) { return load(p); }
  static V repeat_word(const void* p) {
    V v;
    for (int i = 0; i < 16; i += 4) std::memcpy(v.byte + i, p, 4);
    return v;
  }
  static V bytes(int value) {
    return make<uint8_t>([&](int) { return value; });
  }
  static V upper_bytes() {
    return make<uint16_t>([](int) { return 0xFF00; });
  }
  static V zero() { return bytes(0); }
  static V flip(const V& v) { return v; }

  static V both(const V& a, const V& b) {
    return make<uint64_t>([&](int i) { return word<uint64_t>(a, i) & word<uint64_t>(b, i); });
  }
  static V select(const V& mask, const V& yes, const V& no) {
    return make<uint64_t>([&](int i) {
      const uint64_t m = word<uint64_t>(mask, i);
      return (m & word<uint64_t>(yes, i)) | (~m & word<uint64_t>(no, i));
    });
  }
  static V twice(const V& a) {
    return make<uint8_t>([&](int i) { return a.byte[i] << 1; });
  }
  template <int n>
  static V right(const V& a) {
    return make<uint16_t>([&](int i) { return word<uint16_t>(a, i) >> n; });
  }
  template <int n>
  static V left(const V& a) {
    return make<uint16_t>([&](int i) { return word<uint16_t>(a, i) << n; });
  }
  static V lookup(const V& table, const V& index) {
    return make<uint8_t>([&](int i) { return table.byte[index.byte[i] & 15]; });
  }
  template <int bit>
  static V choose(const V& bits, const V& yes, const V& no) {
    return make<uint8_t>([&](int i) { return bits.byte[i] >> bit & 1 ? yes.byte[i] : no.byte[i]; });
  }

  static V dot(const V& sum, const V& levels, const V& x) {
    return make<int32_t>([&](int i) {
      int32_t total = word<int32_t>(sum, i);
      for (int k = 4 * i; k < 4 * i + 4; ++k) total += int(levels.byte[k]) * int(static_cast<int8_t>(x.byte[k]));
      return total;
    });
  }
  static F sum4(const F& a, const F& b, const F& c, const F& d) {
    const F* part[4] = {&a, &b, &c, &d};
    return each([&](int i) { return ((part[i]->at[0] + part[i]->at[1]) + part[i]->at[2]) + part[i]->at[3]; });
  }
  static F repeat4(const float* p) { return load_float(p); }

  static V add16(const V& a, const V& b) {
    return make<uint16_t>([&](int i) { return word<uint16_t>(a, i) + word<uint16_t>(b, i); });
  }
  template <int n>
  static V left32(const V& a) {
    return make<uint32_t>([&](int i) { return word<uint32_t>(a, i) << n; });
  }
  static V unpack_low32(const V& a, const V& b) {
    return make<uint32_t>([&](int i) { return word<uint32_t>(i % 2 ? b : a, i / 2); });
  }
  static V unpack_high32(const V& a, const V& b) {
    return make<uint32_t>([&](int i) { return word<uint32_t>(i % 2 ? b : a, 2 + i / 2); });
  }
  static V unpack_low64(const V& a, const V& b) {
    return make<uint64_t>([&](int i) { return word<uint64_t>(i ? b : a, 0); });
  }
  static V unpack_high64(const V& a, const V& b) {
    return make<uint64_t>([&](int i) { return word<uint64_t>(i ? b : a, 1); });
  }

  static F to_float(const V& v) {
    return each([&](int i) { return float(word<int32_t>(v, i)); });
  }
  static V to_int(const F& v) {
    return make<int32_t>([&](int i) { return std::isfinite(v.at[i]) ? std::lrint(v.at[i]) : 0; });
  }
  // The lowest bytes of the elements of v, which fit there; of NaN anything.
  static void store_bytes(int8_t* p, const V& v) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(word<int32_t>(v, i));
  }
  static F floats(float v) { return {{v, v, v, v}}; }
  static F load_float(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void store_float(float* p, const F& v) { std::memcpy(p, &v, sizeof(F)); }
  static F load_half(const uint16_t* p) {
    return each([&](int i) { return half_to_float(p[i]); });
  }
  static F load_bfloat(const uint16_t* p) {
    return each([&](int i) { return bfloat_to_float(p[i]); });
  }
  static F load_byte(const int8_t* p) {
    return each([&](int i) { return float(p[i]); });
  }
  static F load_low(const uint8_t* p) {
    return each([&](int i) { return float(p[i] & 15); });
  }
  static F load_high(const uint8_t* p) {
    return each([&](int i) { return float(p[i] >> 4); });
  }
  static void store_half(uint16_t* p, const F& v) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_half(v.at[i]);
  }
  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] + b.at[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] - b.at[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] * b.at[i]; });
  }
  static F rounded(F a) {
#if defined(__aarch64__)
    for (float& value : a.at) asm("" : "+w"(value));
#endif
    return a;
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static F max(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static F abs(const F& a) {
    return each([&](int i) { return std::fabs(a.at[i]); });
  }
  static F ratio(const F& a, const F& b) {
    return each([&](int i) { return b.at[i] > 0 ? a.at[i] / b.at[i] : 0.0f; });
  }
  static void gather16(const float* table, const uint8_t* index, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = table[index[i]];
  }
};

}  // namespace
}  // namespace bitstrata
