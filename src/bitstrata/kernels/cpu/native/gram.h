// x^T y of two bf16 matrices, added to an fp32 one: the second moments of calibration.
#pragma once
#include <cstdint>

namespace bitstrata {

constexpr int kGramRows = 8;    // columns of x in a tile
constexpr int kGramPanels = 3;  // panels of 16 columns of y in a tile

// Whether this processor has instructions for it.
bool gram_runs();

// total [x_columns][y_columns] += x^T y, x [rows][x_columns], y [rows][y_columns]. `upper`: tiles that lie wholly below
// the diagonal are left as they are. The result does not depend on the number of threads.
void add_gram(const uint16_t* x, const uint16_t* y, float* total, int rows, int x_columns, int y_columns, bool upper,
              int threads);

}  // namespace bitstrata
