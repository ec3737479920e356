// The least squares of the solvers in solvers/joint.py: how coefficients of a group should change, row by row.
#pragma once
#include <cstring>
#include <vector>

#include "call.h"

namespace bitstrata {
namespace {

typedef float Lanes __attribute__((vector_size(kFitLanes * sizeof(float)), aligned(4), may_alias));
constexpr int kFitColumns = 8;  // columns of the metric at a time

inline const Lanes& lanes_at(const float* place) { return *reinterpret_cast<const Lanes*>(place); }

// U' x for the columns k..k+count-1 of x [g][lanes]: U' is the metric above the diagonal and half of it on it, so that
// the metric is U' + U'^T. `metric` is symmetric, and columns are read along its rows.
inline void fit_half_product(const float* metric, int g, int k, int count, const float* x, Lanes* out) {
  for (int i = 0; i < count; ++i) {
    out[i] = lanes_at(x + size_t(k + i) * kFitLanes) * (0.5f * metric[size_t(k + i) * g + k + i]);
    for (int j = i + 1; j < count; ++j) out[i] += lanes_at(x + size_t(k + j) * kFitLanes) * metric[size_t(k + i) * g + k + j];
  }
  if (count == kFitColumns) {
    Lanes sum[kFitColumns];
    for (int i = 0; i < kFitColumns; ++i) sum[i] = out[i];
    for (int j = k + kFitColumns; j < g; ++j) {
      const Lanes value = lanes_at(x + size_t(j) * kFitLanes);
      const float* row = metric + size_t(j) * g + k;
#pragma GCC unroll 8
      for (int i = 0; i < kFitColumns; ++i) sum[i] += value * row[i];
    }
    for (int i = 0; i < kFitColumns; ++i) out[i] = sum[i];
  }
}

// Rows first..first+lanes-1, or fewer. With basis b_0 .. b_{p-1} of signs and b_p of ones, solves in double
// (b_i^T M b_j + ridge) x = b_i^T residual. Sums over columns are made in float for a few of them, then in double.
inline void fit_codes(const FitProblem& problem, int64_t first, int lanes) {
  constexpr int L = kFitLanes;
  const int g = problem.columns, bits = problem.bits, size = bits + 1;
  const int64_t rows = problem.rows;
  std::vector<float> basis(size_t(size) * g * L), residual(size_t(g) * L);
  for (int k = 0; k < g; ++k) {
    const int64_t* codes = problem.codes + k * rows + first;
    std::memcpy(&residual[size_t(k) * L], problem.residual + k * rows + first, lanes * sizeof(float));
    for (int i = 0; i < bits; ++i) {
      float* to = &basis[(size_t(i) * g + k) * L];
      const int place = bits - 1 - i;
      for (int l = 0; l < lanes; ++l) to[l] = codes[l] >> place & 1 ? 1.0f : -1.0f;
    }
    float* ones = &basis[(size_t(bits) * g + k) * L];
    for (int l = 0; l < L; ++l) ones[l] = 1;
  }
  double normal[kMaxBits + 1][kMaxBits + 1][L] = {}, right[kMaxBits + 1][L] = {};
  for (int k = 0; k < g; k += kFitColumns) {
    const int count = g - k < kFitColumns ? g - k : kFitColumns;
    Lanes half[kMaxBits + 1][kFitColumns];
    for (int i = 0; i < size; ++i) fit_half_product(problem.metric, g, k, count, &basis[size_t(i) * g * L], half[i]);
    for (int i = 0; i < size; ++i) {
      const float* mine = &basis[(size_t(i) * g + k) * L];
      for (int j = i; j < size; ++j) {
        const float* other = &basis[(size_t(j) * g + k) * L];
        Lanes sum = {};
        for (int c = 0; c < count; ++c)
          sum += lanes_at(mine + size_t(c) * L) * half[j][c] + lanes_at(other + size_t(c) * L) * half[i][c];
        for (int l = 0; l < L; ++l) normal[i][j][l] += sum[l];
      }
      Lanes sum = {};
      for (int c = 0; c < count; ++c) sum += lanes_at(mine + size_t(c) * L) * lanes_at(&residual[size_t(k + c) * L]);
      for (int l = 0; l < L; ++l) right[i][l] += sum[l];
    }
  }
  // elimination without pivots: the matrix is positive definite
  double ridge[L] = {};
  for (int i = 0; i < size; ++i)
    for (int l = 0; l < L; ++l) ridge[l] += normal[i][i][l];
  for (int l = 0; l < L; ++l) {
    ridge[l] *= problem.ridge / size;
    if (!(ridge[l] > 1e-30)) ridge[l] = 1e-30;
  }
  for (int i = 0; i < size; ++i)
    for (int l = 0; l < L; ++l) normal[i][i][l] += ridge[l];
  for (int i = 0; i < size; ++i)
    for (int r = i + 1; r < size; ++r) {
      double factor[L];
      for (int l = 0; l < L; ++l) factor[l] = normal[i][r][l] / normal[i][i][l];
      for (int c = r; c < size; ++c)
        for (int l = 0; l < L; ++l) normal[r][c][l] -= factor[l] * normal[i][c][l];
      for (int l = 0; l < L; ++l) right[r][l] -= factor[l] * right[i][l];
    }
  for (int i = size - 1; i >= 0; --i) {
    for (int c = i + 1; c < size; ++c)
      for (int l = 0; l < L; ++l) right[i][l] -= normal[i][c][l] * right[c][l];
    for (int l = 0; l < L; ++l) right[i][l] /= normal[i][i][l];
    for (int l = 0; l < lanes; ++l) problem.step[i * rows + first + l] = float(right[i][l]);
  }
}

}  // namespace
}  // namespace bitstrata
