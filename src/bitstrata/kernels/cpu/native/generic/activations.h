// Activations: padded to the layout as float32, then to int8 by chunks.
//
// A chunk (a group, or 128 columns of a wider one) has the scale max|x| / 127. A chunk whose largest magnitude is
// below 1e-30 counts as zero; one that holds infinity or NaN makes the row's result NaN.
#pragma once
#include "call.h"
#include "half.h"

namespace bitstrata {
namespace {

template <class S>
void stage_columns(const void* x, Type type, int first, int count, float* out) {
  if (type == Type::f32) {
    std::memcpy(out, static_cast<const float*>(x) + first, size_t(count) * sizeof(float));
    return;
  }
  const auto* words = static_cast<const uint16_t*>(x) + first;
  if (type == Type::bf16) {
    for (int k = 0; k < count; ++k) out[k] = bfloat_to_float(words[k]);
    return;
  }
  constexpr int step = 4 * S::lanes;
  int k = 0;
  for (; k + step <= count; k += step) S::store_float(out + k, S::load_half(words + k));
  for (; k < count; ++k) out[k] = half_to_float(words[k]);
}

template <class S>
void stage(const Layout& layout, const void* x, Type type, float* out) {
  int done = 0;
  for (int group = 0; group < layout.stored_groups; ++group) {
    const int start = group_start(layout, group), count = group_columns(layout, group);
    for (; done < start; ++done) out[done] = 0;
    stage_columns<S>(x, type, group * layout.group_size, count, out + start);
    done = start + count;
  }
  for (; done < layout.units * kUnitColumns; ++done) out[done] = 0;
}

template <class S>
void quantize(const Layout& layout, const float* staged, int8_t* x, float* x_scale, float* x_sum) {
  constexpr int width = 16;  // a chunk is a multiple of it
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const int columns = kUnitColumns / layout.groups_per_unit;
  for (int chunk = 0; chunk < layout.chunks; ++chunk, staged += columns, x += columns) {
    float most[width] = {};
    bool finite = true;
    for (int k = 0; k < columns; k += width) {
      int odd = 0;
      for (int j = 0; j < width; ++j) {
        const float magnitude = float_of(bits_of(staged[k + j]) & 0x7FFFFFFF);
        most[j] = most[j] < magnitude ? magnitude : most[j];
        odd |= (bits_of(staged[k + j]) & 0x7F800000) == 0x7F800000;
      }
      finite &= !odd;
    }
    float largest = 0;
    for (int j = 0; j < width; ++j) largest = largest < most[j] ? most[j] : largest;
    const float inverse = finite && largest > 1e-30f ? 127 / largest : 0;
    int total = 0;
    for (int k = 0; k < columns; ++k) {
      const int value = finite ? int(bits_of(staged[k] * inverse + round) - bits_of(round)) : 0;
      x[k] = int8_t(value);
      total += value;
    }
    const float scale = finite ? (inverse > 0 ? largest / 127 : 0) : float_of(0x7FC00000);
    x_scale[chunk] = scale;
    x_sum[chunk] = scale * float(total);
  }
}

}  // namespace
}  // namespace bitstrata
