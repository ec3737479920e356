// Activations: padded to the layout as float32, then to int8.
//
// A chunk is a group of columns, or 128 of a wider group. It has four scales, for the columns whose number modulo 16 is
// 0-3, 4-7, 8-11 and 12-15: max|x| / 127 of them. (A quarter of the columns; which ones is of no matter, so they are
// those that the kernels sum up together.) A quarter whose largest magnitude is below 1e-30 counts as zero; one that
// holds infinity or NaN makes the row's result NaN.
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
  for (int chunk = 0; chunk < layout.chunks; ++chunk, staged += columns, x += columns, x_scale += kQuarters) {
    float most[width] = {}, inverse[width];
    uint32_t odd[width] = {};
    for (int k = 0; k < columns; k += width)
      for (int j = 0; j < width; ++j) {
        const uint32_t magnitude = bits_of(staged[k + j]) & 0x7FFFFFFF;
        most[j] = most[j] < float_of(magnitude) ? float_of(magnitude) : most[j];
        odd[j] |= magnitude >= 0x7F800000;
      }
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      float largest = 0;
      bool finite = true;
      for (int j = 4 * quarter; j < 4 * quarter + 4; ++j) {
        largest = largest < most[j] ? most[j] : largest;
        finite &= !odd[j];
      }
      const bool used = finite && largest > 1e-30f;
      x_scale[quarter] = !finite ? float_of(0x7FC00000) : used ? largest / 127 : 0;
      for (int j = 4 * quarter; j < 4 * quarter + 4; ++j) inverse[j] = used ? 127 / largest : 0;
    }
    int total[width] = {};
    for (int k = 0; k < columns; k += width)
      for (int j = 0; j < width; ++j) {
        const float scaled = odd[j] ? 0 : staged[k + j] * inverse[j];
        const int value = int(bits_of(scaled + round)) - int(bits_of(round));
        x[k + j] = int8_t(value);
        total[j] += value;
      }
    float sum = 0;
    for (int j = 0; j < width; ++j) sum += x_scale[j / 4] * float(total[j]);
    x_sum[chunk] = sum;
  }
}

}  // namespace
}  // namespace bitstrata
