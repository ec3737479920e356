#include "gram.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "processor.h"
#include "threads.h"

namespace bitstrata {

#if defined(BITSTRATA_HAVE_AVX512BF16)
void gram_tile_avx512bf16(const uint32_t* x, const uint32_t* const* y, int panels, int pairs, float* total,
                          int64_t stride, int rows, int columns);
#endif

bool gram_runs() {
#if defined(BITSTRATA_HAVE_AVX512BF16)
  return has_avx512_bf16();
#else
  return false;
#endif
}

#if defined(BITSTRATA_HAVE_AVX512BF16)
namespace {

constexpr int kPairs = 512;        // pairs of rows whose products are summed before they are added to the total
constexpr int kStrip = 8 * 16;     // columns of x that a thread takes at a time

int panels_of(int columns) { return (columns + 15) / 16; }

// [rows][columns] -> [panel of 16 columns][pair of rows][16] words, each the values of a column in both rows.
struct Packed {
  Packed(const uint16_t* values, int rows, int columns, int threads)
      : pairs((rows + 1) / 2), words(new uint32_t[size_t(panels_of(columns)) * pairs * 16]) {
    parallel_for(threads, panels_of(columns), [&](int begin, int end) {
      for (int panel = begin; panel < end; ++panel) {
        uint32_t* to = words.get() + size_t(panel) * pairs * 16;
        const int here = std::min(16, columns - 16 * panel);
        for (int pair = 0; pair < pairs; ++pair, to += 16) {
          const uint16_t* first = values + size_t(2 * pair) * columns + 16 * panel;
          const bool both = 2 * pair + 1 < rows;
          for (int c = 0; c < here; ++c) to[c] = first[c] | uint32_t(both ? first[columns + c] : 0) << 16;
          for (int c = here; c < 16; ++c) to[c] = 0;
        }
      }
    });
  }

  const uint32_t* at(int panel, int pair) const { return words.get() + (size_t(panel) * pairs + pair) * 16; }

  int pairs;
  std::unique_ptr<uint32_t[]> words;
};

}  // namespace

void add_gram(const uint16_t* x, const uint16_t* y, float* total, int rows, int x_columns, int y_columns, bool upper,
              int threads) {
  const Packed right(y, rows, y_columns, threads);
  const std::unique_ptr<Packed> own(x == y && x_columns == y_columns ? nullptr : new Packed(x, rows, x_columns, threads));
  const Packed& left = own ? *own : right;
  constexpr int wide = 16 * kGramPanels;
  const int strips = (x_columns + kStrip - 1) / kStrip, stripes = (y_columns + wide - 1) / wide;
  parallel_for(threads, strips * stripes, [&](int begin, int end) {
    for (int item = begin; item < end; ++item) {
      const int column = item / strips * wide, from = item % strips * kStrip, to = std::min(x_columns, from + kStrip);
      const int columns = std::min(wide, y_columns - column), panels = panels_of(columns);
      for (int pair = 0; pair < left.pairs; pair += kPairs) {
        const int pairs = std::min(kPairs, left.pairs - pair);
        const uint32_t* parts[kGramPanels] = {};
        for (int p = 0; p < panels; ++p) parts[p] = right.at(column / 16 + p, pair);
        for (int row = from; row < to && !(upper && row >= column + columns); row += kGramRows)
          gram_tile_avx512bf16(left.at(row / 16, pair) + row % 16, parts, panels, pairs,
                               total + int64_t(row) * y_columns + column, y_columns, std::min(kGramRows, to - row), columns);
      }
    }
  });
}
#else
void add_gram(const uint16_t*, const uint16_t*, float*, int, int, int, bool, int) {
  throw std::logic_error("no instructions for products of bf16 in this build");
}
#endif

}  // namespace bitstrata
