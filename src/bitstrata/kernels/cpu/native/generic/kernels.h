// The kernels of one instruction set, from its Simd.
#pragma once
#include "activations.h"
#include "block_ops.h"
#include "codes.h"
#include "decode.h"
#include "few_rows.h"
#include "fit.h"
#include "many_rows.h"

namespace bitstrata {
namespace {

// Reads bytes [0, count) in words of 512 bytes as fast as this instruction set can; returns something of their values.
template <class S>
uint32_t read_bytes(const uint8_t* bytes, size_t count) {
  using V = typename S::V;
  constexpr int width = 16 * S::lanes, at_once = 8;
  V sum[at_once];
  for (auto& part : sum) part = S::zero();
  for (size_t i = 0; i + width * at_once <= count; i += width * at_once)
    for (int j = 0; j < at_once; ++j) sum[j] = S::add16(sum[j], S::load(bytes + i + j * width));
  uint32_t total = 0, part[width / 4];
  for (auto& v : sum) {
    S::store(part, v);
    for (uint32_t value : part) total += value;
  }
  return total;
}

template <class S>
constexpr Kernels kernels_of(const char* name) {
  return {name, few_rows_function<S>, block_levels_of<S>, panel_product_of<S>, S::tile_blocks, exact_block<S>, stage<S>,
          quantize<S>, decode_block<S>, decode_row<S>, convert<S>, read_bytes<S>, choose_codes, fit_codes, rms_norm<S>, rotate<S>,
          activate<S>, attend<S>, mix<S>, encode<S>, dense_block<S>};
}

}  // namespace
}  // namespace bitstrata
