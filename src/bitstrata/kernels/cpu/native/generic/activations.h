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
  using F = typename S::F;
  constexpr int width = 16, vectors = 4 / S::lanes, step = 4 * S::lanes;  // a chunk is a multiple of the width
  const int columns = kUnitColumns / layout.groups_per_unit;
  for (int chunk = 0; chunk < layout.chunks; ++chunk, staged += columns, x += columns, x_scale += kQuarters) {
    F most[vectors], odd[vectors];
    for (int v = 0; v < vectors; ++v) most[v] = odd[v] = S::floats(0);
    for (int k = 0; k < columns; k += width)
      for (int v = 0; v < vectors; ++v) {
        const F value = S::load_float(staged + k + v * step);
        most[v] = S::max(S::abs(value), most[v]);
        odd[v] = S::add(odd[v], S::sub(value, value));  // of infinity and NaN: NaN
      }
    alignas(64) float largest[width], unknown[width], inverse[width];
    for (int v = 0; v < vectors; ++v) {
      S::store_float(largest + v * step, most[v]);
      S::store_float(unknown + v * step, odd[v]);
    }
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const float *a = largest + 4 * quarter, *u = unknown + 4 * quarter;
      const float ab = a[0] < a[1] ? a[1] : a[0], cd = a[2] < a[3] ? a[3] : a[2], all = ab < cd ? cd : ab;
      const bool finite = (u[0] + u[1]) + (u[2] + u[3]) == 0, used = finite && all > 1e-30f;
      x_scale[quarter] = !finite ? float_of(0x7FC00000) : used ? all / 127 : 0;
      for (int j = 4 * quarter; j < 4 * quarter + 4; ++j) inverse[j] = used ? 127 / all : 0;
    }
    typename S::V total = S::zero();
    for (int k = 0; k < columns; k += width) {
      for (int v = 0; v < vectors; ++v)
        S::store_bytes(x + k + v * step, S::to_int(S::mul(S::load_float(staged + k + v * step), S::load_float(inverse + v * step))));
      total = S::dot(total, S::bytes(1), S::repeat(x + k));  // four neighbours: a quarter
    }
    int32_t sums[4 * S::lanes];
    S::store(sums, total);
    float sum = 0;
    for (int quarter = 0; quarter < kQuarters; ++quarter) sum += x_scale[quarter] * float(sums[quarter]);
    x_sum[chunk] = sum;
  }
}

}  // namespace
}  // namespace bitstrata
