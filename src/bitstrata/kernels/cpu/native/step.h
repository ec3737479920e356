// One decoding step of a whole model: up to kMaxRows rows, each one token of some sequence, through all decoder blocks and
// the output head, with one team of threads that stays awake meanwhile.
//
// A block is x += attention(norm(x)), x += mlp(norm(x)), with further norms where a model has them; x stays in float32.
// What a model is made of is found out in Python (runtime/batching/native.py), which also keeps the memory alive.
#pragma once
#include <memory>
#include <vector>

#include "product.h"

namespace bitstrata {

// A linear layer: planes or a dense matrix, and a bias if it has one.
struct Linear {
  const Weight* planes = nullptr;
  Dense dense{};
  const float* bias = nullptr;
  int place = -1;  // its column in the bits of a step; -1: dense

  int rows() const { return planes ? planes->layout.rows : dense.rows; }
  int columns() const { return planes ? planes->layout.columns : dense.columns; }
  int blocks() const { return (rows() + kBlockRows - 1) / kBlockRows; }
};

struct Norm {
  const float* weight = nullptr;  // null: there is none
  float epsilon = 0;
};

struct Block {
  Norm before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
  std::vector<Linear> qkv;      // three, or one with their rows one below the other
  std::vector<Linear> gate_up;  // two, or one
  Linear out, down;
  int heads = 0, key_heads = 0, width = 0;
  int window = 0;    // 0: none
  int rotary = 0;    // which of the step's tables of angles; -1: positions are not turned
  int rotated = 0;   // numbers of a head that are turned
  float scale = 1, softcap = 0;
  Activation activation = Activation::silu;

  int qkv_width() const { return (heads + 2 * key_heads) * width; }
};

// Where a block's keys and values lie: [key_heads][tokens][width] of `type`; or codes of `bits`, and their meaning.
struct Cache {
  void *keys = nullptr, *values = nullptr;
  uint16_t *key_meaning = nullptr, *value_meaning = nullptr;
  Type type = Type::f32;
  int bits = 0;  // 0: numbers
  int64_t tokens = 0;

  size_t head_bytes(int width) const { return bits ? code_bytes(width, bits) : width * size_of(type); }
};

struct Rows {
  int count;
  float* x;                     // [count][hidden], changed
  const int64_t* start;         // [count]: where in the caches a row's sequence begins
  const int64_t* position;      // [count]: how many tokens of it come before
  const int8_t* bits;           // [places][count]
  const float* const* cosine;   // of each table of angles: [count][rotated]
  const float* const* sine;
  int first_block, last_block;  // blocks first..last-1 are run
  const int* wanted;            // rows whose logits are; none: the head is not run
  int wanted_count;
  float* logits;                // [wanted_count][vocabulary]
};

class Step {
 public:
  Step(const Kernels& kernels, int hidden);
  std::vector<Block> blocks;
  Norm last;
  Linear head;
  float logit_softcap = 0;

  // Throws std::invalid_argument for bits that a layer does not have. caches: one a block.
  void run(const Rows& rows, const std::vector<Cache>& caches, int threads, bool exact);

 private:
  struct Memory;
  const Kernels& kernels_;
  const int hidden_;
  std::shared_ptr<Memory> memory_;
};

}  // namespace bitstrata
