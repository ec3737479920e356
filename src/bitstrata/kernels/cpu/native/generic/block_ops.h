// What a decoder block does between its products, in float32 on rows that lie in the cache: norms, rotary positions,
// attention over stored keys and values, activations, and products with matrices that are not quantized.
#pragma once
#include <cmath>
#include <cstring>

#include "cached.h"
#include "call.h"
#include "half.h"

namespace bitstrata {
namespace {

constexpr int kWidth = 16;  // numbers that loops below keep apart, so that any vector width fits

// e^x to two units in the last place, for x <= 88; below -87 it is 0. Without branches, so that loops of it are vectors.
inline float exp_of(float x) {
  const float rounder = 12582912.f;  // 1.5 * 2^23
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.9875691e-4f;  // e^r on [-ln 2 / 2, ln 2 / 2]: the minimax polynomial of Cephes' expf
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float scale = float_of((bits_of(shifted) << 23) + 0x3F800000u);
  return x < -87.0f ? 0.0f : p * scale;
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(x < -80.0f ? 80.0f : -x)); }

inline float tanh_of(float x) {
  const float bounded = x > 20.0f ? 20.0f : x < -20.0f ? -20.0f : x;
  return 1.0f - 2.0f / (exp_of(2.0f * bounded) + 1.0f);
}

inline float total_of(const float* sums) {
  float total = 0;
  for (int j = 0; j < kWidth; ++j) total += sums[j];
  return total;
}

template <class S>
void rms_norm(const float* x, const float* weight, float epsilon, int count, float* out) {
  float sums[kWidth] = {};
  int k = 0;
  for (; k + kWidth <= count; k += kWidth)
    for (int j = 0; j < kWidth; ++j) sums[j] += x[k + j] * x[k + j];
  for (; k < count; ++k) sums[0] += x[k] * x[k];
  const float scale = 1.0f / std::sqrt(total_of(sums) / float(count) + epsilon);
  for (k = 0; k < count; ++k) out[k] = x[k] * scale * weight[k];
}

// The first `count` numbers of a head turned by their position's angles; transformers' rotate_half.
template <class S>
void rotate(float* head, const float* cosine, const float* sine, int count) {
  const int half = count / 2;
  for (int k = 0; k < half; ++k) {
    const float one = head[k], other = head[k + half];
    head[k] = one * cosine[k] - other * sine[k];
    head[k + half] = other * cosine[k + half] + one * sine[k + half];
  }
}

// out = act(gate) * up
template <class S>
void activate(Activation kind, const float* gate, const float* up, int count, float* out) {
  if (kind == Activation::silu) {
    for (int k = 0; k < count; ++k) out[k] = gate[k] * sigmoid_of(gate[k]) * up[k];
  } else if (kind == Activation::gelu_tanh) {
    for (int k = 0; k < count; ++k) {
      const float x = gate[k];
      out[k] = 0.5f * x * (1.0f + tanh_of(0.79788456f * (x + 0.044715f * x * x * x))) * up[k];
    }
  } else if (kind == Activation::gelu) {
    for (int k = 0; k < count; ++k) out[k] = 0.5f * gate[k] * (1.0f + std::erf(gate[k] * 0.70710678f)) * up[k];
  } else {
    for (int k = 0; k < count; ++k) out[k] = (gate[k] > 0 ? gate[k] : 0.0f) * up[k];
  }
}

// Stored numbers as float32, a vector at a time.
template <class S>
struct Floats {
  const float* p;
  typename S::F load(size_t i) const { return S::load_float(p + i); }
  float one(size_t i) const { return p[i]; }
};
template <class S>
struct Halves {
  const uint16_t* p;
  typename S::F load(size_t i) const { return S::load_half(p + i); }
  float one(size_t i) const { return half_to_float(p[i]); }
};
template <class S>
struct Bfloats {
  const uint16_t* p;
  typename S::F load(size_t i) const { return S::load_bfloat(p + i); }
  float one(size_t i) const { return bfloat_to_float(p[i]); }
};

// Calls use(reader) for what lies at `data` in `type`.
template <class S, class Use>
inline void with_type(Type type, const void* data, Use use) {
  if (type == Type::f32) use(Floats<S>{static_cast<const float*>(data)});
  else if (type == Type::f16) use(Halves<S>{static_cast<const uint16_t*>(data)});
  else use(Bfloats<S>{static_cast<const uint16_t*>(data)});
}

// The sum of each of four vectors.
template <class S>
inline void totals_of_four(typename S::F a, typename S::F b, typename S::F c, typename S::F d, float total[4]) {
  float lanes[4 * S::lanes];
  S::store_float(lanes, S::sum4(a, b, c, d));
  for (int i = 0; i < 4; ++i) total[i] = lanes[i];
  for (int lane = 1; lane < S::lanes; ++lane)
    for (int i = 0; i < 4; ++i) total[i] += lanes[4 * lane + i];
}

// What the codes of a call's positions stand for: step * (what is loaded) + offset.
struct Meanings {
  float key_step[kPiece], key_offset[kPiece], value_step[kPiece], value_offset[kPiece];

  explicit Meanings(const Attend& call) {
    read(call, call.key_meaning, key_step, key_offset);
    read(call, call.value_meaning, value_step, value_offset);
  }

 private:
  static void read(const Attend& call, const uint16_t* from, float* step, float* offset) {
    const float base = call.bits == 8 ? kByteBase : 0.0f;
    uint32_t both[kPiece];  // two bf16 are the upper halves of two floats
    std::memcpy(both, from + 2 * size_t(call.first), size_t(call.count) * sizeof(uint32_t));
    for (int t = 0; t < call.count; ++t) {
      step[t] = float_of(both[t] << 16);
      offset[t] = float_of(both[t] & 0xFFFF0000u) + base * step[t];
    }
  }
};

inline float largest_of(const float* values, int count) {
  float most[kWidth];
  for (int j = 0; j < kWidth; ++j) most[j] = values[0];
  int t = 0;
  for (; t + kWidth <= count; t += kWidth)
    for (int j = 0; j < kWidth; ++j) most[j] = values[t + j] > most[j] ? values[t + j] : most[j];
  for (; t < count; ++t) most[0] = values[t] > most[0] ? values[t] : most[0];
  for (int j = 1; j < kWidth; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  return most[0];
}

inline float dot_of(const float* a, const float* b, int count) {
  float sums[kWidth] = {};
  int k = 0;
  for (; k + kWidth <= count; k += kWidth)
    for (int j = 0; j < kWidth; ++j) sums[j] += a[k + j] * b[k + j];
  for (; k < count; ++k) sums[0] += a[k] * b[k];
  return total_of(sums);
}

// `Vectors` of numbers from k on of what `Heads` queries see: values times scores, added up position by position.
template <class S, int Heads, int Vectors, class Values>
void weigh(const Attend& call, int first, const Values& values, int k, int stride, const float* lift, const float* scores) {
  using F = typename S::F;
  constexpr int step = 4 * S::lanes;
  F sum[Heads][Vectors];
  for (int h = 0; h < Heads; ++h)
    for (int v = 0; v < Vectors; ++v) sum[h][v] = S::floats(lift[h]);
  for (int t = 0; t < call.count; ++t) {
    F value[Vectors];
    for (int v = 0; v < Vectors; ++v) value[v] = values.load(size_t(t) * stride + k + v * step);
    for (int h = 0; h < Heads; ++h) {
      const F score = S::floats(scores[size_t(h) * kPiece + t]);
      for (int v = 0; v < Vectors; ++v) sum[h][v] = S::fma(score, value[v], sum[h][v]);
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int v = 0; v < Vectors; ++v)
      S::store_float(call.out + size_t(first + h) * padded(call.width) + k + v * step, sum[h][v]);
}

// `Heads` queries of a group from `first` on, against the positions of a call; keys and values whole vectors wide,
// `stride` from one position to the next. meanings: null if they are numbers.
template <class S, int Heads, bool Coded, class Keys>
void attend_heads(const Attend& call, const Meanings* meanings, int first, const Keys& keys, const Keys& values, int width,
                  int stride, float* scores) {
  using F = typename S::F;
  constexpr int step = 4 * S::lanes, at_once = 4;
  const int count = call.count;
  const float* query = call.query + size_t(first) * padded(call.width);
  for (int t = 0; t < count; t += at_once) {
    F sum[Heads][at_once];
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < at_once; ++i) sum[h][i] = S::floats(0);
    for (int k = 0; k < width; k += step)
      for (int i = 0; i < at_once; ++i) {
        const F part = keys.load(size_t(t + i < count ? t + i : count - 1) * stride + k);
        for (int h = 0; h < Heads; ++h)
          sum[h][i] = S::fma(S::load_float(query + size_t(h) * padded(call.width) + k), part, sum[h][i]);
      }
    for (int h = 0; h < Heads; ++h) {
      float total[4];
      totals_of_four<S>(sum[h][0], sum[h][1], sum[h][2], sum[h][3], total);
      for (int i = 0; i < at_once; ++i) scores[size_t(h) * kPiece + t + i] = total[i] * call.scale;  // kPiece is in fours
    }
  }
  float lift[Heads] = {};  // of every number of a head: what offsets add
  for (int h = 0; h < Heads; ++h) {
    float* score = scores + size_t(h) * kPiece;
    if constexpr (Coded) {
      const float* own = query + size_t(h) * padded(call.width);
      float sums[kWidth] = {};
      for (int k = 0; k < width; k += kWidth)
        for (int j = 0; j < kWidth; ++j) sums[j] += own[k + j];
      const float sum = total_of(sums) * call.scale;
      for (int t = 0; t < count; ++t) score[t] = meanings->key_step[t] * score[t] + meanings->key_offset[t] * sum;
    }
    if (call.softcap > 0)
      for (int t = 0; t < count; ++t) score[t] = call.softcap * tanh_of(score[t] / call.softcap);
    const float most = largest_of(score, count);
    float total[kWidth] = {};
    int t = 0;
    for (; t + kWidth <= count; t += kWidth)
      for (int j = 0; j < kWidth; ++j) total[j] += score[t + j] = exp_of(score[t + j] - most);
    for (; t < count; ++t) total[0] += score[t] = exp_of(score[t] - most);
    call.most[first + h] = most;
    call.total[first + h] = total_of(total);
    if constexpr (Coded) {
      lift[h] = dot_of(score, meanings->value_offset, count);
      for (t = 0; t < count; ++t) score[t] *= meanings->value_step[t];
    }
  }
  constexpr int wide = Heads > 2 ? 2 : 4;  // sums that do not wait for each other
  int k = 0;
  for (; k + wide * step <= width; k += wide * step) weigh<S, Heads, wide>(call, first, values, k, stride, lift, scores);
  for (; k < width; k += step) weigh<S, Heads, 1>(call, first, values, k, stride, lift, scores);
}

template <class S, bool Coded, class Keys>
void attend_all(const Attend& call, const Meanings* meanings, const Keys& keys, const Keys& values, int width, int stride) {
  float scores[4 * kPiece];
  int head = 0;
  for (; head + 4 <= call.heads; head += 4)
    attend_heads<S, 4, Coded>(call, meanings, head, keys, values, width, stride, scores);
  const int left = call.heads - head;
  if (left == 3) attend_heads<S, 3, Coded>(call, meanings, head, keys, values, width, stride, scores);
  if (left == 2) attend_heads<S, 2, Coded>(call, meanings, head, keys, values, width, stride, scores);
  if (left == 1) attend_heads<S, 1, Coded>(call, meanings, head, keys, values, width, stride, scores);
}

// keys and values begin at the call's first position.
template <class S, bool Coded, class Keys>
void attend_stored(const Attend& call, const Meanings* meanings, const Keys& keys, const Keys& values, int stride) {
  const int width = call.width;
  if (width % kWidth == 0) {
    attend_all<S, Coded>(call, meanings, keys, values, width, stride);
    return;
  }
  // heads that vectors do not divide: as float32, padded with zeros
  const int wide = padded(width);
  thread_local std::vector<float> room;
  room.assign(2 * size_t(call.count) * wide, 0.0f);
  float *wide_keys = room.data(), *wide_values = wide_keys + size_t(call.count) * wide;
  for (int t = 0; t < call.count; ++t)
    for (int k = 0; k < width; ++k) {
      wide_keys[size_t(t) * wide + k] = keys.one(size_t(t) * stride + k);
      wide_values[size_t(t) * wide + k] = values.one(size_t(t) * stride + k);
    }
  attend_all<S, Coded>(call, meanings, Floats<S>{wide_keys}, Floats<S>{wide_values}, wide, wide);
}

template <class S>
void attend(const Attend& call) {
  if (call.bits) {
    const Meanings meanings(call);
    const size_t skipped = size_t(call.first) * code_bytes(call.width, call.bits);
    const auto *keys = static_cast<const uint8_t*>(call.keys) + skipped, *values = static_cast<const uint8_t*>(call.values) + skipped;
    const int stride = code_stride(call.width, call.bits);
    if (call.bits == 8) attend_stored<S, true>(call, &meanings, Bytes<S>{keys}, Bytes<S>{values}, stride);
    else attend_stored<S, true>(call, &meanings, Nibbles<S>{keys}, Nibbles<S>{values}, stride);
    return;
  }
  const int width = call.width;
  with_type<S>(call.type, call.keys, [&](auto keys) {
    auto values = keys;
    values.p = static_cast<decltype(values.p)>(call.values);
    keys.p += size_t(call.first) * width, values.p += size_t(call.first) * width;
    attend_stored<S, false>(call, nullptr, keys, values, width);
  });
}

// `Rows` rows of x times four rows of a matrix: sums [4][Rows].
template <class S, int Rows, class Matrix>
inline void dense_rows(const Matrix& matrix, int columns, const float* x, int stride, float sums[4][kMaxRows], int first) {
  using F = typename S::F;
  constexpr int step = 4 * S::lanes;
  F sum[4][Rows];
  const int whole = columns / step * step;
  for (int n = 0; n < 4; ++n) {  // one after the other: four streams from memory side by side take 2.5 times as long
    F own[Rows];
    for (int r = 0; r < Rows; ++r) own[r] = S::floats(0);
    for (int k = 0; k < whole; k += step) {
      const F weight = matrix.load(size_t(n) * columns + k);
      for (int r = 0; r < Rows; ++r) own[r] = S::fma(weight, S::load_float(x + size_t(r) * stride + k), own[r]);
    }
    for (int r = 0; r < Rows; ++r) sum[n][r] = own[r];
  }
  for (int r = 0; r < Rows; ++r) {
    float total[4];
    totals_of_four<S>(sum[0][r], sum[1][r], sum[2][r], sum[3][r], total);
    for (int n = 0; n < 4; ++n) {
      for (int rest = whole; rest < columns; ++rest) total[n] += matrix.one(size_t(n) * columns + rest) * x[size_t(r) * stride + rest];
      sums[n][first + r] = total[n];
    }
  }
}

// Rows 16 * block .. + 15 of a matrix that is not quantized, times rows of x [rows][columns]: out [rows][16].
template <class S>
void dense_block(const Dense& matrix, const float* x, int rows, int block, float* out) {
  const int columns = matrix.columns;
  with_type<S>(matrix.type, matrix.data, [&](auto all) {
    for (int n = 0; n < kBlockRows; n += 4) {
      // the last rows again where the matrix ends within four
      const int wanted = block * kBlockRows + n, from = wanted + 4 <= matrix.rows ? wanted : matrix.rows - 4;
      float sums[4][kMaxRows];
      if (wanted >= matrix.rows) break;
      auto four = all;
      four.p += size_t(from > 0 ? from : 0) * columns;
      if (from < 0) {  // fewer than four rows in all
        for (int i = 0; i < matrix.rows; ++i)
          for (int r = 0; r < rows; ++r) {
            float total = 0;
            for (int k = 0; k < columns; ++k) total += four.one(size_t(i) * columns + k) * x[size_t(r) * columns + k];
            out[r * kBlockRows + i] = total;
          }
        break;
      }
      int r = 0;
      for (; r + 4 <= rows; r += 4) dense_rows<S, 4>(four, columns, x + size_t(r) * columns, columns, sums, r);
      for (; r < rows; ++r) dense_rows<S, 1>(four, columns, x + size_t(r) * columns, columns, sums, r);
      for (int i = wanted - from; i < 4; ++i)
        for (r = 0; r < rows; ++r) out[r * kBlockRows + n + i - (wanted - from)] = sums[i][r];
    }
  });
}

}  // namespace
}  // namespace bitstrata
