// What the bindings and the kernels of an instruction set say to each other.
#pragma once
#include <vector>

#include "layout.h"

namespace bitstrata {

enum class Type { f32, f16, bf16 };
constexpr size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// A weight in the blocked layout; the memory belongs to the caller.
struct Weight {
  Layout layout;
  bool codebook;
  bool bytes;  // scales of up to kByteBits bits are bytes
  const uint8_t* planes[kMaxBits] = {};
  const void* scales[kMaxBits + 1] = {};  // by bits; null where there is none

  bool has_bytes(int bits) const { return bytes && bits <= kByteBits; }
  size_t scale_count(int bits) const { return size_t(layout.blocks) * layout.groups * (bits + 1) * kBlockRows; }
  // Where the rows' units are behind the scales; null if they are fp16.
  const float* units(int bits) const {
    if (!has_bytes(bits)) return nullptr;
    return reinterpret_cast<const float*>(static_cast<const char*>(scales[bits]) + scale_count(bits));
  }
  size_t scales_bytes(int bits) const {
    const size_t rows = size_t(layout.blocks) * kBlockRows;
    if (codebook) return (rows << bits) * 2;
    return has_bytes(bits) ? scale_count(bits) + rows * sizeof(float) : scale_count(bits) * 2;
  }
};

// Rows begin..end-1 of x at `bits`, with the scales of these bits.
struct Segment {
  int bits, begin, end;
  const void* scales;  // scales or table of the blocked layout
  const float* units;   // of the rows, if the scales are bytes; else null
};

// Where a row of activations goes as int8, see generic/activations.h; as in FewRows. `rest` and `fine_sum` may be null.
struct Quantized {
  int8_t *x, *rest;
  float *scale, *sum, *fine_sum;
};
constexpr float kRestUnit = 1.0f / 128;  // what the rest counts, in units of x

struct FewRows {
  const Layout* layout;
  const uint8_t* planes[kMaxBits];  // as many as `bits`; 4 or 8 if there are several segments
  int bits;                         // the highest bits among the segments
  bool codebook;
  const Segment* segments;
  int segment_count;
  int rows;              // 1..kMaxRows
  const int8_t* x;       // [rows][units][128]
  const int8_t* rest;    // the same; of rows of kFineBits bits or more
  const float* x_scale;  // [rows][chunks][4]
  const float* x_sum;    // [rows][chunks]: sum of the chunk's x, as quantized
  const float* fine_sum; // the same with the rest
  const float* x_exact;  // [rows][units][128]; set if activations are not quantized
};

// A block of weight rows as byte levels, see generic/many_rows.h.
struct BlockLevels {
  uint8_t* level;
  float* step;         // [chunks][sets][16]
  float* low;          // [chunks][16]
  const float* units;  // [16], if the scales are bytes; else null
};

// kPanelRows quantized rows of x, see generic/many_rows.h.
constexpr int kPanelRows = 12;
struct Panel {
  int8_t* x;
  int8_t* rest;  // null: there is none, else `scale` is in its units
  float* scale;  // [chunks][4][kPanelRows]
  float* sum;    // [chunks][kPanelRows]
};

// Rows 16 * block .. + 15 of y for all rows of x: out [rows][16].
using BlockFunction = void (*)(const FewRows& call, int block, float* out);

// One precision in the choice of codes: floats, rows last.
struct CodeTrack {
  int bits;
  const float* levels;   // [2^bits][rows]: the value of every code
  const float* left;     // [columns][rows]: what is wanted, or the residual if codes are given
  const float* factors;  // [columns][columns]: how the choice of a column moves `left` of those after it
  const float* weights;  // [columns]: of its squared error
};

// A matrix that is not quantized: [rows][columns] of `type`.
struct Dense {
  const void* data;
  Type type;
  int rows, columns;
};

enum class Activation { silu, gelu_tanh, gelu, relu };

// Attention of the query heads that share a key-value head over `count` stored positions from `first` on, at most kPiece:
// the largest score, the sum of e^(score - largest), and the values weighted by these. Rows of queries and of `out` are
// padded to `padded` numbers, queries with zeros; keys and values are not.
constexpr int kPiece = 256;
constexpr int padded(int count) { return (count + 15) / 16 * 16; }
struct Attend {
  const void *keys, *values;  // [positions][width] of `type`
  const uint16_t *key_meaning, *value_meaning;
  Type type;
  int bits;  // 0, else keys and values are codes and their meaning
  int first, count, heads, width;
  float scale, softcap;  // softcap 0: none
  const float* query;    // [heads][width]
  float *most, *total;   // [heads]
  float* out;            // [heads][width]
};

// Keys and values as codes, see generic/cached.h: of each position code_bytes, and a step and an offset, both bf16.
constexpr int kPacked = 32;             // codes of 4 bits that are packed together
constexpr float kByteBase = 128;        // what codes of 8 bits are stored without
constexpr float kSmallestStep = 1e-30f; // a smaller one counts as 0
constexpr int code_stride(int width, int bits) { return bits == 4 ? (width + kPacked - 1) / kPacked * kPacked : width; }
constexpr int code_bytes(int width, int bits) { return code_stride(width, bits) * bits / 8; }

// Codes of a group, column by column. `given`: start from the codes there are, see solvers/joint.py.
struct CodeProblem {
  int64_t rows;
  int columns;
  bool given;
  std::vector<CodeTrack> tracks;  // bits ascending
  int64_t* codes;                 // [columns][rows]
};
constexpr int kCodeLanes = 32;  // rows at a time

// Coefficients of a group, given its codes: how they should change, see generic/fit.h and solvers/joint.py.
struct FitProblem {
  int64_t rows;
  int columns, bits;
  const int64_t* codes;   // [columns][rows], of `bits`
  const float* metric;    // [columns][columns], symmetric
  const float* residual;  // [columns][rows]
  float ridge;            // of the mean of the normal matrix's diagonal
  float* step;            // [bits + 1][rows]
};
constexpr int kFitLanes = 16;  // rows at a time

// The functions of one instruction set.
struct Kernels {
  const char* name;
  BlockFunction (*few_rows)(const FewRows& call);
  // Many rows: a block of the weight of `call`, whose rows of x are not looked at; and `tile_blocks` blocks times a panel
  // -> out [kPanelRows][16] of each. Weights of more than four bits have two sets of levels, those of a codebook one.
  void (*levels)(const FewRows& call, int block, const BlockLevels& out);
  void (*panel)(const Layout& layout, int sets, const BlockLevels* blocks, const Panel& panel, float* const* out);
  int tile_blocks;
  // The same from float activations and weights, from `call.x_exact`.
  void (*exact)(const FewRows& call, const Weight& weight, int block, float* out);
  // A row of x, padded with zeros to the layout: x [columns] of `type` -> out [units][128].
  void (*stage)(const Layout& layout, const void* x, Type type, float* out);
  // A staged row to int8, see activations.h.
  void (*quantize)(const Layout& layout, const float* staged, Quantized out);
  // A block of weight rows at `bits` -> out [rows of the block][columns] of `type`; stride between rows in elements.
  void (*decode)(const Weight& weight, int bits, int block, void* out, Type type, ptrdiff_t stride);
  // One row of the weight -> out [columns].
  void (*decode_row)(const Weight& weight, int bits, int row, void* out, Type type);
  void (*convert)(const float* values, int count, void* out, Type type);
  // The yardstick of memory: reads every byte, see generic/kernels.h.
  uint32_t (*read)(const uint8_t* bytes, size_t count);
  // Rows first..first+lanes-1 of a problem, see generic/codes.h.
  void (*codes)(const CodeProblem& problem, int64_t first, int lanes);
  // The same of another, see generic/fit.h.
  void (*fit)(const FitProblem& problem, int64_t first, int lanes);
  // Of a decoder block, see generic/block_ops.h.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int count, float* out);
  void (*rotate)(float* head, const float* cosine, const float* sine, int count);
  void (*activate)(Activation kind, const float* gate, const float* up, int count, float* out);
  void (*attend)(const Attend& call);
  void (*mix)(float* head, int width);
  void (*encode)(float* head, int width, int bits, uint8_t* codes, uint16_t* meaning);
  void (*dense)(const Dense& matrix, const float* x, int rows, int block, float* out);
};

}  // namespace bitstrata
