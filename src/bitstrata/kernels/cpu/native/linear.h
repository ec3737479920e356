// One call: activations of any row count and type, one or several weights that share them.
#pragma once
#include <vector>

#include "generic/call.h"

namespace bitstrata {

struct Activations {
  const void* data;
  Type type;
  ptrdiff_t stride;  // between rows, in elements
  int rows;
};

// y[i] [rows, N_i] contiguous, of the activations' type, gets x W_i^T. Row r is computed at row_bits[r], or at `bits`
// if row_bits is null. `exact` leaves activations and weights in float32 instead of int8 and byte levels.
// Throws std::invalid_argument if the weights do not share their columns and groups, or lack a plane or scales.
void linear(const Kernels& kernels, const std::vector<const Weight*>& weights, const Activations& x, int bits,
            const int8_t* row_bits, const std::vector<void*>& y, int threads, bool exact);

// Weight rows first..last-1 at `bits` into out [last - first][columns]; `first` a multiple of 16.
void decode(const Kernels& kernels, const Weight& weight, int bits, int first, int last, void* out, Type type,
            int threads);

// Weight rows index[0..count-1] at `bits` into out [count][columns].
void decode_rows(const Kernels& kernels, const Weight& weight, int bits, const int64_t* index, int count, void* out,
                 Type type, int threads);

}  // namespace bitstrata
