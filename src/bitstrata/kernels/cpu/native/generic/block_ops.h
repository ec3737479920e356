// What a decoder block does between its products, in float32 on rows that lie in the cache: norms, rotary positions,
// attention over stored keys and values, activations, and products with matrices that are not quantized.
#pragma once
#include <cmath>
#include <cstring>

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

template <class S>
inline void to_floats(const void* from, Type type, size_t first, int count, float* out) {
  if (type == Type::f32) {
    std::memcpy(out, static_cast<const float*>(from) + first, size_t(count) * sizeof(float));
    return;
  }
  const uint16_t* words = static_cast<const uint16_t*>(from) + first;
  int k = 0;
  if (type == Type::bf16) {
    for (; k < count; ++k) out[k] = bfloat_to_float(words[k]);
    return;
  }
  constexpr int step = 4 * S::lanes;
  for (; k + step <= count; k += step) S::store_float(out + k, S::load_half(words + k));
  for (; k < count; ++k) out[k] = half_to_float(words[k]);
}

// Queries of one group of heads, `Heads` of them from `first`, against keys and values of a piece, in float32 and padded.
template <class S, int Heads>
void attend_heads(const Attend& call, int first, const float* keys, const float* values, int width, int value_width,
                  float* scores) {
  using F = typename S::F;
  constexpr int step = 4 * S::lanes, at_once = 4;
  const int count = call.count;
  const float* query[Heads];
  for (int h = 0; h < Heads; ++h) query[h] = call.query + size_t(first + h) * width;
  for (int t = 0; t < count; t += at_once) {
    const float* key[at_once];
    for (int i = 0; i < at_once; ++i) key[i] = keys + size_t(t + i < count ? t + i : count - 1) * width;
    F sum[Heads][at_once];
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < at_once; ++i) sum[h][i] = S::floats(0);
    for (int k = 0; k < width; k += step)
      for (int i = 0; i < at_once; ++i) {
        const F part = S::load_float(key[i] + k);
        for (int h = 0; h < Heads; ++h) sum[h][i] = S::fma(S::load_float(query[h] + k), part, sum[h][i]);
      }
    for (int h = 0; h < Heads; ++h) {
      float lanes[step];
      S::store_float(lanes, S::sum4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]));
      for (int i = 0; i < at_once && t + i < count; ++i) {
        float total = 0;
        for (int lane = 0; lane < S::lanes; ++lane) total += lanes[4 * lane + i];
        scores[size_t(h) * kPiece + t + i] = total * call.scale;
      }
    }
  }
  for (int h = 0; h < Heads; ++h) {
    float* score = scores + size_t(h) * kPiece;
    if (call.softcap > 0)
      for (int t = 0; t < count; ++t) score[t] = call.softcap * tanh_of(score[t] / call.softcap);
    float most = score[0], total[kWidth] = {};
    for (int t = 1; t < count; ++t) most = score[t] > most ? score[t] : most;
    int t = 0;
    for (; t + kWidth <= count; t += kWidth)
      for (int j = 0; j < kWidth; ++j) total[j] += score[t + j] = exp_of(score[t + j] - most);
    for (; t < count; ++t) total[0] += score[t] = exp_of(score[t] - most);
    call.most[first + h] = most;
    call.total[first + h] = total_of(total);
  }
  for (int k = 0; k < value_width; k += step) {
    F sum[Heads];
    for (int h = 0; h < Heads; ++h) sum[h] = S::floats(0);
    for (int t = 0; t < count; ++t) {
      const F value = S::load_float(values + size_t(t) * value_width + k);
      for (int h = 0; h < Heads; ++h) sum[h] = S::fma(S::floats(scores[size_t(h) * kPiece + t]), value, sum[h]);
    }
    for (int h = 0; h < Heads; ++h) S::store_float(call.out + size_t(first + h) * value_width + k, sum[h]);
  }
}

template <class S>
void attend(const Attend& call) {
  const int width = padded(call.width), value_width = padded(call.value_width);
  thread_local std::vector<float> room;
  room.resize(size_t(kPiece) * (width + value_width) + 4 * kPiece);
  float *keys = room.data(), *values = keys + size_t(kPiece) * width, *scores = values + size_t(kPiece) * value_width;
  auto widen = [&](const void* from, int narrow, int wide, float* out) {
    for (int t = 0; t < call.count; ++t) {
      to_floats<S>(from, call.type, size_t(call.first + t) * narrow, narrow, out + size_t(t) * wide);
      for (int k = narrow; k < wide; ++k) out[size_t(t) * wide + k] = 0;
    }
  };
  widen(call.keys, call.width, width, keys);
  widen(call.values, call.value_width, value_width, values);
  int head = 0;
  for (; head + 4 <= call.heads; head += 4) attend_heads<S, 4>(call, head, keys, values, width, value_width, scores);
  const int left = call.heads - head;
  if (left == 3) attend_heads<S, 3>(call, head, keys, values, width, value_width, scores);
  if (left == 2) attend_heads<S, 2>(call, head, keys, values, width, value_width, scores);
  if (left == 1) attend_heads<S, 1>(call, head, keys, values, width, value_width, scores);
}

// 16 rows of a matrix that is not quantized from `block` on, times rows of x (float32, padded to whole kWidth with
// zeros): out [rows][16].
template <class S>
void dense_block(const Dense& matrix, const float* x, int rows, int block, float* out) {
  const int columns = matrix.columns, stride = padded(columns);
  thread_local std::vector<float> room;
  room.assign(size_t(stride), 0.0f);
  for (int n = 0; n < kBlockRows; ++n) {
    const int row = block * kBlockRows + n;
    if (row >= matrix.rows) {
      for (int r = 0; r < rows; ++r) out[r * kBlockRows + n] = 0;
      continue;
    }
    to_floats<S>(matrix.data, matrix.type, size_t(row) * columns, columns, room.data());
    for (int r = 0; r < rows; ++r) {
      const float *left = room.data(), *right = x + size_t(r) * stride;
      float sums[2][kWidth] = {};
      int k = 0;
      for (; k + 2 * kWidth <= stride; k += 2 * kWidth)
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < kWidth; ++j) sums[i][j] += left[k + i * kWidth + j] * right[k + i * kWidth + j];
      for (; k < stride; k += kWidth)
        for (int j = 0; j < kWidth; ++j) sums[0][j] += left[k + j] * right[k + j];
      for (int j = 0; j < kWidth; ++j) sums[0][j] += sums[1][j];
      out[r * kBlockRows + n] = total_of(sums[0]);
    }
  }
}

}  // namespace
}  // namespace bitstrata
