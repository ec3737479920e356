// The kernels of one instruction set, from its Simd.
#pragma once
#include "activations.h"
#include "decode.h"
#include "few_rows.h"

namespace bitstrata {
namespace {

template <class S>
constexpr Kernels kernels_of(const char* name) {
  return {name, few_rows_function<S>, exact_block<S>, stage<S>, quantize<S>, decode_block<S>, convert<S>};
}

}  // namespace
}  // namespace bitstrata
