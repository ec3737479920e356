#include "product.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace bitstrata {

Order::Order(const int8_t* row_bits, int bits, int count) : rows(count) {
  std::iota(rows.begin(), rows.end(), 0);
  if (!row_bits) {
    segments = {{bits, 0, count, nullptr, nullptr}};
    return;
  }
  std::stable_sort(rows.begin(), rows.end(), [&](int a, int b) { return row_bits[a] < row_bits[b]; });
  for (int place = 0; place < count; ++place) {
    const int here = row_bits[rows[place]];
    if (segments.empty() || segments.back().bits != here) segments.push_back({here, place, place, nullptr, nullptr});
    segments.back().end = place + 1;
  }
}

Order Order::part(int first, int count) const {
  Order some(nullptr, 0, 0);
  some.rows.assign(rows.begin() + first, rows.begin() + first + count);
  some.segments.clear();
  for (Segment segment : segments) {
    segment.begin = std::max(segment.begin - first, 0), segment.end = std::min(segment.end - first, count);
    if (segment.begin < segment.end) some.segments.push_back(segment);
  }
  return some;
}

void Staged::resize(const Layout& layout, int rows, bool exact, int bits) {
  const size_t columns = size_t(layout.units) * kUnitColumns;
  padded.resize(columns * rows);
  if (exact) return;
  x.resize(columns * rows);
  scale.resize(size_t(layout.chunks) * kQuarters * rows);
  sum.resize(size_t(layout.chunks) * rows);
  rest.resize(bits < kFineBits ? 0 : x.size());
  fine_sum.resize(bits < kFineBits ? 0 : sum.size());
}

void Staged::put(const Kernels& kernels, const Layout& layout, const void* row, Type type, int place, bool exact) {
  float* out = &padded[size_t(layout.units) * kUnitColumns * place];
  kernels.stage(layout, row, type, out);
  if (exact) return;
  const size_t at = size_t(layout.units) * kUnitColumns * place, chunk = size_t(layout.chunks) * place;
  const bool fine = !rest.empty();
  kernels.quantize(layout, out, {&x[at], fine ? &rest[at] : nullptr, &scale[chunk * kQuarters], &sum[chunk],
                                 fine ? &fine_sum[chunk] : nullptr});
}

void Product::prepare(const Kernels& kernels, const Weight& weight, const Order& order, const Staged& staged, bool exact) {
  kernels_ = &kernels, weight_ = &weight;
  segments_ = order.segments;
  for (Segment& segment : segments_) {
    if (segment.bits < 1 || segment.bits > kMaxBits || !weight.scales[segment.bits])
      throw std::invalid_argument("no scales for these bits");
    if (std::any_of(weight.planes, weight.planes + segment.bits, [](const uint8_t* plane) { return !plane; }))
      throw std::invalid_argument("a plane is missing");
    segment.scales = weight.scales[segment.bits], segment.units = weight.units(segment.bits);
  }
  call_.layout = &weight.layout;
  call_.bits = order.bits();
  for (int plane = 0; plane < kMaxBits; ++plane)  // absent planes: any will do, see few_rows_pick
    call_.planes[plane] = weight.planes[std::min(plane, call_.bits - 1)];
  call_.codebook = weight.codebook;
  call_.segments = segments_.data();
  call_.segment_count = int(segments_.size());
  call_.rows = int(order.rows.size());
  call_.x = staged.x.data(), call_.rest = staged.rest.data();
  call_.x_scale = staged.scale.data(), call_.x_sum = staged.sum.data(), call_.fine_sum = staged.fine_sum.data();
  call_.x_exact = staged.padded.data();
  function_ = exact ? nullptr : kernels.few_rows(call_);
}

void Product::run(int block, float* out) const {
  if (function_) function_(call_, block, out);
  else kernels_->exact(call_, *weight_, block, out);
}

}  // namespace bitstrata
