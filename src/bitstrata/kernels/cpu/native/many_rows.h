// Many activation rows at equal bits: see generic/many_rows.h for the arithmetic, which is that of few rows.
#pragma once
#include <vector>

#include "linear.h"

namespace bitstrata {

// As `linear`, of rows rows[0..count-1] of x alone, all at `bits` and never exact.
void many_rows(const Kernels& kernels, const std::vector<const Weight*>& weights, const Activations& x, const int* rows,
               int count, int bits, const std::vector<void*>& y, int threads);

}  // namespace bitstrata
