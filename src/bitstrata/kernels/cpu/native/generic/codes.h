// The inner loop of the solvers in solvers/joint.py: codes of a group, one column after the other.
#pragma once
#include <cstring>
#include <vector>

#include "call.h"

namespace bitstrata {
namespace {

// Rows first..first+kCodeLanes-1, or fewer. The loops over lanes are plain: every compiler turns them into vectors.
inline void choose_codes(const CodeProblem& problem, int64_t first, int lanes) {
  constexpr int L = kCodeLanes;
  const int g = problem.columns, tracks = int(problem.tracks.size()), top = problem.tracks.back().bits;
  const int64_t rows = problem.rows;
  std::vector<float> left(size_t(tracks) * g * L), tables, costs((size_t(2) << top) * L);  // bits ascend: fewer than 2^(top + 1) prefixes
  std::vector<size_t> start(tracks);
  for (int t = 0; t < tracks; ++t) {
    start[t] = tables.size();
    const size_t values = size_t(1) << problem.tracks[t].bits;
    tables.resize(start[t] + values * L);
    for (size_t c = 0; c < values; ++c)
      std::memcpy(&tables[start[t] + c * L], problem.tracks[t].levels + c * rows + first, lanes * sizeof(float));
    for (int k = 0; k < g; ++k)
      std::memcpy(&left[(size_t(t) * g + k) * L], problem.tracks[t].left + k * rows + first, lanes * sizeof(float));
  }
  alignas(64) float wanted[L], before[kMaxBits][L], moved[L], least[L];
  alignas(64) int32_t best[L];
  for (int column = 0; column < g; ++column) {
    int64_t* codes = problem.codes + column * rows + first;
    // the costs of every prefix, track by track: a code's cost is its prefix's at fewer bits and its own
    float* fewer = nullptr;
    int fewer_bits = 0;
    float* room = costs.data();
    for (int t = 0; t < tracks; ++t) {
      const CodeTrack& track = problem.tracks[t];
      const float* mine = &left[(size_t(t) * g + column) * L];
      const float weight = track.weights[column];
      if (problem.given) {  // coordinate descent: the best value is the present one and what its residual asks for
        const float scale = 1 / track.factors[size_t(column) * g + column];
        for (int l = 0; l < lanes; ++l)
          before[t][l] = tables[start[t] + size_t(codes[l] >> (top - track.bits)) * L + l];
        for (int l = 0; l < L; ++l) wanted[l] = (l < lanes ? before[t][l] : 0) + mine[l] * scale;
      } else {
        for (int l = 0; l < L; ++l) wanted[l] = mine[l];
      }
      float* found = room;
      room += (size_t(1) << track.bits) * L;
      const int shift = track.bits - fewer_bits;
      for (int c = 0; c < 1 << track.bits; ++c) {
        const float* value = &tables[start[t] + size_t(c) * L];
        float* cost = found + size_t(c) * L;
        if (fewer) {
          const float* base = fewer + size_t(c >> shift) * L;
          for (int l = 0; l < L; ++l) {
            const float d = wanted[l] - value[l];
            cost[l] = base[l] + weight * d * d;
          }
        } else {
          for (int l = 0; l < L; ++l) {
            const float d = wanted[l] - value[l];
            cost[l] = weight * d * d;
          }
        }
      }
      fewer = found;
      fewer_bits = track.bits;
    }
    for (int l = 0; l < L; ++l) least[l] = fewer[l], best[l] = 0;
    for (int c = 1; c < 1 << top; ++c) {
      const float* cost = fewer + size_t(c) * L;
      for (int l = 0; l < L; ++l) {
        const bool better = cost[l] < least[l];
        least[l] = better ? cost[l] : least[l];
        best[l] = better ? c : best[l];
      }
    }
    for (int t = 0; t < tracks; ++t) {
      const CodeTrack& track = problem.tracks[t];
      float* mine = &left[size_t(t) * g * L];
      for (int l = 0; l < L; ++l) moved[l] = 0;
      for (int l = 0; l < lanes; ++l) {
        const float value = tables[start[t] + size_t(best[l] >> (top - track.bits)) * L + l];
        moved[l] = problem.given ? value - before[t][l] : mine[size_t(column) * L + l] - value;
      }
      const float* factors = track.factors + size_t(column) * g;
      for (int k = column + 1; k < g; ++k) {
        float* row = mine + size_t(k) * L;
        const float factor = factors[k];
        for (int l = 0; l < L; ++l) row[l] -= factor * moved[l];
      }
    }
    for (int l = 0; l < lanes; ++l) codes[l] = best[l];
  }
}

}  // namespace
}  // namespace bitstrata
