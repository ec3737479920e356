#include "linear.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "threads.h"

namespace bitstrata {
namespace {

size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Activation rows of one pass, staged.
struct Staged {
  std::vector<float> exact;
  std::vector<int8_t> x;
  std::vector<float> scale, sum;
};

void check(const std::vector<const Weight*>& weights, const std::vector<Segment>& segments) {
  for (const Weight* weight : weights) {
    const Layout &layout = weight->layout, &first = weights[0]->layout;
    if (layout.columns != first.columns || layout.group_size != first.group_size)
      throw std::invalid_argument("weights that share activations must have equal columns and groups");
    for (const Segment& segment : segments) {
      if (segment.bits < 1 || segment.bits > kMaxBits || !weight->scales[segment.bits])
        throw std::invalid_argument("no scales for these bits");
      if (std::any_of(weight->planes, weight->planes + segment.bits, [](const uint8_t* plane) { return !plane; }))
        throw std::invalid_argument("a plane is missing");
    }
  }
}

// Segments of equal bits among rows begin..end-1 in the order given.
std::vector<Segment> segments_of(const std::vector<int>& order, const int8_t* row_bits, int bits, int begin, int end) {
  if (!row_bits) return {{bits, 0, end - begin, nullptr, nullptr}};
  std::vector<Segment> segments;
  for (int r = begin; r < end; ++r) {
    const int here = row_bits[order[r]];
    if (segments.empty() || segments.back().bits != here) segments.push_back({here, r - begin, r - begin, nullptr, nullptr});
    segments.back().end = r - begin + 1;
  }
  return segments;
}

void stage_rows(const Kernels& kernels, const Layout& layout, const Activations& x, const int* order, int rows,
                bool exact, int threads, Staged& staged) {
  const size_t padded = size_t(layout.units) * kUnitColumns;
  staged.exact.resize(padded * rows);
  if (!exact) {
    staged.x.resize(padded * rows);
    staged.scale.resize(size_t(layout.chunks) * kQuarters * rows);
    staged.sum.resize(size_t(layout.chunks) * rows);
  }
  parallel_for(rows * padded < 32768 ? 1 : threads, rows, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const char* row = static_cast<const char*>(x.data) + order[r] * x.stride * ptrdiff_t(size_of(x.type));
      kernels.stage(layout, row, x.type, &staged.exact[padded * r]);
      if (!exact)
        kernels.quantize(layout, &staged.exact[padded * r], &staged.x[padded * r],
                         &staged.scale[size_t(layout.chunks) * kQuarters * r], &staged.sum[size_t(layout.chunks) * r]);
    }
  });
}

}  // namespace

void linear(const Kernels& kernels, const std::vector<const Weight*>& weights, const Activations& x, int bits,
            const int8_t* row_bits, const std::vector<void*>& y, int threads, bool exact) {
  std::vector<int> order(x.rows);
  std::iota(order.begin(), order.end(), 0);
  if (row_bits)
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row_bits[a] < row_bits[b]; });
  thread_local Staged staged;
  const Layout& layout = weights[0]->layout;

  for (int base = 0; base < x.rows; base += kMaxRows) {
    const int rows = std::min(kMaxRows, x.rows - base);
    std::vector<Segment> shared = segments_of(order, row_bits, bits, base, base + rows);
    check(weights, shared);
    stage_rows(kernels, layout, x, &order[base], rows, exact, threads, staged);

    std::vector<FewRows> calls(weights.size());
    std::vector<std::vector<Segment>> segments(weights.size(), shared);
    std::vector<BlockFunction> functions(weights.size());
    std::vector<int> first_block(weights.size() + 1, 0);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Weight& weight = *weights[i];
      FewRows& call = calls[i];
      for (Segment& segment : segments[i])
        segment.scales = weight.scales[segment.bits], segment.units = weight.units(segment.bits);
      call.layout = &weight.layout;
      call.bits = shared.back().bits;  // ascending
      for (int plane = 0; plane < kMaxBits; ++plane)  // absent planes: any will do, see few_rows_pick
        call.planes[plane] = weight.planes[std::min(plane, call.bits - 1)];
      call.codebook = weight.codebook;
      call.segments = segments[i].data();
      call.segment_count = int(segments[i].size());
      call.rows = rows;
      call.x = staged.x.data();
      call.x_scale = staged.scale.data();
      call.x_sum = staged.sum.data();
      call.x_exact = staged.exact.data();
      if (!exact) functions[i] = kernels.few_rows(call);
      first_block[i + 1] = first_block[i] + weight.layout.blocks;
    }

    parallel_for(threads, first_block.back(), [&](int begin, int end) {
      float out[kMaxRows * kBlockRows];
      size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
      for (int at = begin; at < end; ++at) {
        while (at >= first_block[i + 1]) ++i;
        const Layout& here = weights[i]->layout;
        const int block = at - first_block[i], count = std::min(kBlockRows, here.rows - block * kBlockRows);
        if (exact) kernels.exact(calls[i], *weights[i], block, out);
        else functions[i](calls[i], block, out);
        for (int r = 0; r < rows; ++r) {
          const size_t to = size_t(order[base + r]) * here.rows + size_t(block) * kBlockRows;
          kernels.convert(out + r * kBlockRows, count, static_cast<char*>(y[i]) + to * size_of(x.type), x.type);
        }
      }
    });
  }
}

void decode(const Kernels& kernels, const Weight& weight, int bits, int first, int last, void* out, Type type,
            int threads) {
  check({&weight}, {{bits, 0, 0, nullptr, nullptr}});
  const int first_block = first / kBlockRows, blocks = (last + kBlockRows - 1) / kBlockRows - first_block;
  const size_t columns = weight.layout.columns;
  parallel_for(threads, blocks, [&](int begin, int end) {
    for (int block = begin; block < end; ++block) {
      char* rows = static_cast<char*>(out) + size_t(block) * kBlockRows * columns * size_of(type);
      kernels.decode(weight, bits, first_block + block, rows, type, ptrdiff_t(columns));
    }
  });
}

}  // namespace bitstrata
