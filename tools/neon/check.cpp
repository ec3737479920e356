// The neon kernels against the scalar ones, in one program for 64-bit Arm. `check` uses neither heap nor system
// calls, so that an emulator of the processor alone can run it (emulate.py).
#include <cstdint>
#include <cstring>

#include "generic/call.h"

namespace bitstrata {
extern const Kernels kNeon, kScalar;
}

namespace {

using namespace bitstrata;

constexpr int kN = 29, kK = 301, kUnits = 12, kBlocks = 2;  // as many units as any group size below asks for
uint8_t planes[kMaxBits][kBlocks * kUnits * kQuads * kWordBytes];
uint16_t scales[kBlocks * kBlockRows << kMaxBits];
float source[kMaxRows * kK], staged[kMaxRows * kUnits * kUnitColumns];
int8_t x[kMaxRows * kUnits * kUnitColumns], rest[kMaxRows * kUnits * kUnitColumns];
float x_scale[kMaxRows * kUnits * 4 * kQuarters], x_sum[kMaxRows * kUnits * 4], fine_sum[kMaxRows * kUnits * 4];
alignas(64) uint8_t level[2 * kUnits * kUnitColumns * kBlockRows];
float step[2 * kUnits * 4 * kBlockRows], low[kUnits * 4 * kBlockRows];
int8_t panel_x[2][kPanelRows * kUnits * kUnitColumns];
float panel_scale[kPanelRows * kUnits * 4 * kQuarters], panel_sum[kPanelRows * kUnits * 4];
float tile[2][kBlockRows * kK], out[2][kMaxRows * kBlockRows];
uint32_t state = 1;

uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

uint16_t half_of(float value) {  // normal numbers only
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 0x3FF));
}

}  // namespace

// The largest difference over all outputs; what: 0 few rows, 1 decoded tiles (any difference counts), 2 exact rows,
// 3 many rows against few of the same kernels (any difference counts).
extern "C" float check(int bits, int group_size, int rows, int codebook, int low_bits, int what) {
  Layout layout(kN, kK, codebook ? kK : group_size);
  for (auto& plane : planes)
    for (auto& byte : plane) byte = uint8_t(random_bits());
  for (auto& value : scales) value = half_of((int(random_bits() % 2001) - 700) / 1000.f + 0.0001f);
  for (auto& value : source) value = (int(random_bits() % 2001) - 1000) / 300.f;
  Weight weight{layout, codebook != 0};
  for (int i = 0; i < kMaxBits; ++i) weight.planes[i] = planes[i];
  for (int i = 1; i <= kMaxBits; ++i) weight.scales[i] = scales;

  float worst = 0;
  if (what == 1) {
    for (int block = 0; block < layout.blocks; ++block)
      for (int type = 0; type < 3; ++type) {
        std::memset(tile, 0, sizeof tile);
        kNeon.decode(weight, bits, block, tile[0], Type(type), kK);
        kScalar.decode(weight, bits, block, tile[1], Type(type), kK);
        if (std::memcmp(tile[0], tile[1], sizeof tile[0])) worst = 1e9f;
      }
    return worst;
  }
  const int padded = layout.units * kUnitColumns;
  for (int r = 0; r < rows; ++r) {
    kNeon.stage(layout, source + r * kK, Type::f32, staged + r * padded);
    kNeon.quantize(layout, staged + r * padded,
                   {x + r * padded, rest + r * padded, x_scale + r * layout.chunks * kQuarters,
                    x_sum + r * layout.chunks, fine_sum + r * layout.chunks});
  }
  const Segment mixed[] = {{low_bits, 0, 1, scales}, {bits, 1, rows, scales}}, uniform[] = {{bits, 0, rows, scales}};
  FewRows call{};
  call.layout = &layout;
  for (int i = 0; i < kMaxBits; ++i) call.planes[i] = planes[i];
  call.bits = bits;
  call.codebook = codebook != 0;
  call.segments = low_bits ? mixed : uniform;
  call.segment_count = low_bits ? 2 : 1;
  call.rows = rows;
  call.x = x;
  call.rest = rest;
  call.fine_sum = fine_sum;
  call.x_scale = x_scale;
  call.x_sum = x_sum;
  call.x_exact = staged;
  if (what == 3) {
    const bool fine = bits >= kFineBits;
    const int slots = kSlots / layout.groups_per_unit, sets = bits > 4 && !codebook ? 2 : 1;
    for (int r = 0; r < kPanelRows; ++r)  // the rows in turn
      for (int chunk = 0; chunk < layout.chunks; ++chunk) {
        panel_sum[chunk * kPanelRows + r] = (fine ? fine_sum : x_sum)[r % rows * layout.chunks + chunk];
        for (int part = chunk * kQuarters; part < (chunk + 1) * kQuarters; ++part) {
          const float unit = fine ? kRestUnit : 1;
          panel_scale[part * kPanelRows + r] = x_scale[r % rows * layout.chunks * kQuarters + part] * unit;
          for (int s = 0; s < slots; ++s)
            for (int which = 0; which < 2; ++which)
              std::memcpy(panel_x[which] + ((part * slots + s) * kPanelRows + r) * 4,
                          (which ? rest : x) + r % rows * padded + (chunk * slots + s) * 16 + part % kQuarters * 4, 4);
        }
      }
    for (const Kernels* kernels : {&kNeon, &kScalar}) {
      static float panels[kBlockRows * kPanelRows];
      for (int block = 0; block < layout.blocks; ++block) {
        const BlockLevels levels{level, step, low, nullptr};
        float* into = panels;
        kernels->levels(call, block, levels);
        kernels->panel(layout, sets, &levels, {panel_x[0], fine ? panel_x[1] : nullptr, panel_scale, panel_sum}, &into);
        kernels->few_rows(call)(call, block, out[0]);
        for (int i = 0; i < kPanelRows * kBlockRows; ++i)
          if (panels[i] != out[0][i / kBlockRows % rows * kBlockRows + i % kBlockRows]) worst = 1e9f;
      }
    }
    return worst;
  }
  for (int block = 0; block < layout.blocks; ++block) {
    if (what == 0) {
      kNeon.few_rows(call)(call, block, out[0]);
      kScalar.few_rows(call)(call, block, out[1]);
    } else {
      kNeon.exact(call, weight, block, out[0]);
      kScalar.exact(call, weight, block, out[1]);
    }
    for (int i = 0; i < rows * kBlockRows; ++i) {
      const float difference = out[0][i] < out[1][i] ? out[1][i] - out[0][i] : out[0][i] - out[1][i];
      if (!(difference <= worst)) worst = difference;
    }
  }
  return worst;
}

int main() { return 0; }
