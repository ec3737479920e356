#include "many_rows.h"

#include <algorithm>
#include <cstring>

#include "product.h"
#include "threads.h"

namespace bitstrata {
namespace {

constexpr int kPassRows = 44 * kPanelRows;  // whose panels lie in memory at a time
constexpr int kPartRows = 5 * kPanelRows;   // fewest for which a block's levels are made once more, so that every thread has work
constexpr size_t kStagger = 192;  // between blocks: side by side in the cache, not in the same sets

// Rows of x in the order of generic/many_rows.h.
struct Panels {
  std::vector<int8_t> x, rest;
  std::vector<float> scale, sum;
  bool fine = false;  // whether there is a rest

  void resize(const Layout& layout, int count, bool fine) {
    const size_t rows = size_t(count) * kPanelRows, chunks = rows * layout.chunks;
    x.resize(std::max(x.size(), rows * layout.units * kUnitColumns));  // never less: growing again would clear it
    if (fine) rest.resize(x.size());
    scale.resize(std::max(scale.size(), chunks * kQuarters));
    sum.resize(std::max(sum.size(), chunks));
    this->fine = fine;
  }

  Panel at(const Layout& layout, int index) {
    const size_t row = size_t(index) * kPanelRows;
    const size_t at = row * layout.units * kUnitColumns;
    return {&x[at], fine ? &rest[at] : nullptr, &scale[row * layout.chunks * kQuarters], &sum[row * layout.chunks]};
  }

  // Row `place` is row 0 of `staged`, or zeros if that is null.
  void put(const Layout& layout, int place, const Staged* staged) {
    const Panel panel = at(layout, place / kPanelRows);
    const float unit = panel.rest ? kRestUnit : 1;
    const int row = place % kPanelRows, slots = kSlots / layout.groups_per_unit;
    for (int chunk = 0; chunk < layout.chunks; ++chunk) {
      panel.sum[size_t(chunk) * kPanelRows + row] = !staged ? 0 : panel.rest ? staged->fine_sum[chunk] : staged->sum[chunk];
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const size_t part = size_t(chunk) * kQuarters + quarter;
        panel.scale[part * kPanelRows + row] = staged ? staged->scale[part] * unit : 0;
        for (int s = 0; s < slots; ++s) {
          const size_t to = ((part * slots + s) * kPanelRows + row) * 4, from = (size_t(chunk) * slots + s) * 16 + quarter * 4;
          auto copy = [&](int8_t* bytes, const int8_t* source) {
            if (source) std::memcpy(bytes + to, source + from, 4);
            else std::memset(bytes + to, 0, 4);
          };
          copy(panel.x, staged ? staged->x.data() : nullptr);
          if (panel.rest) copy(panel.rest, staged ? staged->rest.data() : nullptr);
        }
      }
    }
  }
};

// Memory for the levels of a tile of blocks.
class Tile {
 public:
  void resize(const Layout& layout, int blocks) {
    constexpr int sets = 2;  // at most
    const size_t levels = size_t(layout.units) * kUnitColumns * kBlockRows * sets + kStagger;
    level_.resize(std::max(level_.size(), blocks * levels + kWordBytes));
    const size_t steps = size_t(layout.chunks) * kBlockRows;
    numbers_.resize(std::max(numbers_.size(), blocks * steps * (sets + 1)));
    const size_t skip = -reinterpret_cast<uintptr_t>(level_.data()) % kWordBytes;
    this->blocks.resize(blocks);
    for (int i = 0; i < blocks; ++i)
      this->blocks[i] = {level_.data() + skip + i * levels, &numbers_[i * steps * (sets + 1)],
                         &numbers_[i * steps * (sets + 1) + steps * sets], nullptr};
  }
  std::vector<BlockLevels> blocks;

 private:
  std::vector<uint8_t> level_;
  std::vector<float> numbers_;
};

}  // namespace

void many_rows(const Kernels& kernels, const std::vector<const Weight*>& weights, const Activations& x, const int* rows,
               int count, int bits, const std::vector<void*>& y, int threads) {
  const Layout& layout = weights[0]->layout;
  const Staged none;
  std::vector<Product> products(weights.size());
  std::vector<int> first_tile(weights.size() + 1, 0);
  for (size_t i = 0; i < weights.size(); ++i) {
    products[i].prepare(kernels, *weights[i], Order(nullptr, bits, 0), none, false);
    first_tile[i + 1] = first_tile[i] + (weights[i]->layout.blocks + kernels.tile_blocks - 1) / kernels.tile_blocks;
  }
  const int tiles = first_tile.back();
  thread_local Panels own;
  Panels& panels = own;  // other threads mean this one's too

  for (int base = 0; base < count; base += kPassRows) {
    const int pass = std::min(kPassRows, count - base), panel_count = (pass + kPanelRows - 1) / kPanelRows;
    panels.resize(layout, panel_count, bits >= kFineBits);
    parallel_for(threads, panel_count, [&](int begin, int end) {
      thread_local Staged staged;
      staged.resize(layout, 1, false, bits);
      for (int place = begin * kPanelRows; place < end * kPanelRows; ++place) {
        if (place < pass) {
          const char* row = static_cast<const char*>(x.data) + rows[base + place] * x.stride * ptrdiff_t(size_of(x.type));
          staged.put(kernels, layout, row, x.type, 0, false);
        }
        panels.put(layout, place, place < pass ? &staged : nullptr);
      }
    });
    // few tiles for many threads: each is made several times, for a part of the rows
    const int parts = std::clamp((4 * threads + tiles - 1) / tiles, 1, std::max(1, pass / kPartRows));
    parallel_for(threads, tiles * parts, [&](int begin, int end) {
      thread_local Tile tile;
      tile.resize(layout, kernels.tile_blocks);
      std::vector<float> out(size_t(kernels.tile_blocks) * kPanelRows * kBlockRows);
      std::vector<float*> outs;
      std::vector<BlockLevels> shown;
      for (int b = 0; b < kernels.tile_blocks; ++b) outs.push_back(&out[size_t(b) * kPanelRows * kBlockRows]);
      size_t i = 0;
      int made = -1;
      for (int at = begin; at < end; ++at) {
        const int tile_number = at / parts, part = at % parts;
        while (tile_number >= first_tile[i + 1]) ++i;
        const Weight& weight = *weights[i];
        const int sets = bits > 4 && !weight.codebook ? 2 : 1;
        const int first = (tile_number - first_tile[i]) * kernels.tile_blocks;
        const int blocks = std::min(kernels.tile_blocks, weight.layout.blocks - first);
        if (made != tile_number) {
          shown = tile.blocks;
          for (int b = 0; b < kernels.tile_blocks; ++b) {
            if (b >= blocks) {  // computed twice, used once
              shown[b] = shown[0];
              continue;
            }
            const float* units = weight.units(bits);
            shown[b].units = units ? units + size_t(first + b) * kBlockRows : nullptr;
            kernels.levels(products[i].call(), first + b, shown[b]);
          }
          made = tile_number;
        }
        for (int panel = panel_count * part / parts; panel < panel_count * (part + 1) / parts; ++panel) {
          kernels.panel(layout, sets, shown.data(), panels.at(layout, panel), outs.data());
          for (int r = 0; r < std::min(kPanelRows, pass - panel * kPanelRows); ++r) {
            const size_t row = size_t(rows[base + panel * kPanelRows + r]) * weight.layout.rows;
            for (int b = 0; b < blocks; ++b) {
              const int column = (first + b) * kBlockRows, width = std::min(kBlockRows, weight.layout.rows - column);
              kernels.convert(outs[b] + r * kBlockRows, width, static_cast<char*>(y[i]) + (row + column) * size_of(x.type),
                              x.type);
            }
          }
        }
      }
    });
  }
}

}  // namespace bitstrata
