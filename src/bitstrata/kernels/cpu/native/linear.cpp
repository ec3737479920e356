#include "linear.h"

#include <algorithm>
#include <stdexcept>

#include "many_rows.h"
#include "product.h"
#include "threads.h"

namespace bitstrata {

void linear(const Kernels& kernels, const std::vector<const Weight*>& weights, const Activations& x, int bits,
            const int8_t* row_bits, const std::vector<void*>& y, int threads, bool exact) {
  const Layout& layout = weights[0]->layout;
  for (const Weight* weight : weights)
    if (weight->layout.columns != layout.columns || weight->layout.group_size != layout.group_size)
      throw std::invalid_argument("weights that share activations must have equal columns and groups");
  const Order sorted(row_bits, bits, x.rows);
  Order all(nullptr, 0, 0);  // rows of bits that few rows have, so that few passes mix bits
  all.segments.clear();
  for (const Segment& segment : sorted.segments) {
    const int begin = int(all.rows.size()), count = segment.end - segment.begin;
    if (!exact && count > kMaxRows) {
      many_rows(kernels, weights, x, &sorted.rows[segment.begin], count, segment.bits, y, threads);
      continue;
    }
    all.rows.insert(all.rows.end(), sorted.rows.begin() + segment.begin, sorted.rows.begin() + segment.end);
    all.segments.push_back({segment.bits, begin, begin + count, nullptr, nullptr});
  }
  const int few = int(all.rows.size());
  thread_local Staged own;
  Staged& staged = own;  // other threads mean this one's too

  for (int base = 0; base < few; base += kMaxRows) {
    const int rows = std::min(kMaxRows, few - base);
    const Order order = all.part(base, rows);
    std::vector<Product> products(weights.size());
    std::vector<int> first_block(weights.size() + 1, 0);
    staged.resize(layout, rows, exact, order.bits());
    for (size_t i = 0; i < weights.size(); ++i) {
      products[i].prepare(kernels, *weights[i], order, staged, exact);
      first_block[i + 1] = first_block[i] + products[i].blocks();
    }
    parallel_for(staged.padded.size() < 32768 ? 1 : threads, rows, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) {
        const char* row = static_cast<const char*>(x.data) + order.rows[r] * x.stride * ptrdiff_t(size_of(x.type));
        staged.put(kernels, layout, row, x.type, r, exact);
      }
    });
    parallel_for(threads, first_block.back(), [&](int begin, int end) {
      float out[kMaxRows * kBlockRows];
      size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
      for (int at = begin; at < end; ++at) {
        while (at >= first_block[i + 1]) ++i;
        const Layout& here = weights[i]->layout;
        const int block = at - first_block[i], count = std::min(kBlockRows, here.rows - block * kBlockRows);
        products[i].run(block, out);
        for (int r = 0; r < rows; ++r) {
          const size_t to = size_t(order.rows[r]) * here.rows + size_t(block) * kBlockRows;
          kernels.convert(out + r * kBlockRows, count, static_cast<char*>(y[i]) + to * size_of(x.type), x.type);
        }
      }
    });
  }
}

void decode(const Kernels& kernels, const Weight& weight, int bits, int first, int last, void* out, Type type,
            int threads) {
  Product().prepare(kernels, weight, Order(nullptr, bits, 0), Staged(), true);  // throws where something is missing
  const int first_block = first / kBlockRows, blocks = (last + kBlockRows - 1) / kBlockRows - first_block;
  const size_t columns = weight.layout.columns;
  parallel_for(threads, blocks, [&](int begin, int end) {
    for (int block = begin; block < end; ++block) {
      char* rows = static_cast<char*>(out) + size_t(block) * kBlockRows * columns * size_of(type);
      kernels.decode(weight, bits, first_block + block, rows, type, ptrdiff_t(columns));
    }
  });
}

void decode_rows(const Kernels& kernels, const Weight& weight, int bits, const int64_t* index, int count, void* out,
                 Type type, int threads) {
  Product().prepare(kernels, weight, Order(nullptr, bits, 0), Staged(), true);  // throws where something is missing
  const size_t stride = size_t(weight.layout.columns) * size_of(type);
  parallel_for(size_t(count) * weight.layout.columns < 32768 ? 1 : threads, count, [&](int begin, int end) {
    for (int i = begin; i < end; ++i)
      kernels.decode_row(weight, bits, int(index[i]), static_cast<char*>(out) + i * stride, type);
  });
}

}  // namespace bitstrata
