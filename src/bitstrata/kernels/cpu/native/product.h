// The pieces of which calls are made: activation rows in the form that products read, and one weight's product with them.
#pragma once
#include <vector>

#include "generic/call.h"

namespace bitstrata {

// Which row of a call comes in which place, sorted by bits, and which rows run at the same.
struct Order {
  std::vector<int> rows;
  std::vector<Segment> segments;  // without scales, bits ascending

  // Rows 0..count-1 at row_bits, or all at `bits` if that is null.
  Order(const int8_t* row_bits, int bits, int count);
  // Places first..first+count-1.
  Order part(int first, int count) const;
  int bits() const { return segments.back().bits; }  // the highest
};

// Activation rows, padded to a layout and quantized unless `exact`.
struct Staged {
  std::vector<float> padded;
  std::vector<int8_t> x;
  std::vector<float> scale, sum;

  void resize(const Layout& layout, int rows, bool exact);
  // One row of `type` to place `place`.
  void put(const Kernels& kernels, const Layout& layout, const void* row, Type type, int place, bool exact);
};

// y of one weight, a block of 16 of its rows at a time.
class Product {
 public:
  Product() = default;
  Product(Product&&) = default;  // what points into it lies on the heap
  // Throws std::invalid_argument if the weight lacks a plane or scales.
  void prepare(const Kernels& kernels, const Weight& weight, const Order& order, const Staged& staged, bool exact);
  int blocks() const { return weight_->layout.blocks; }
  // out [rows in the order][16]
  void run(int block, float* out) const;
  const FewRows& call() const { return call_; }

 private:
  const Kernels* kernels_ = nullptr;
  const Weight* weight_ = nullptr;
  std::vector<Segment> segments_;
  FewRows call_{};
  BlockFunction function_ = nullptr;  // null: exact
};

}  // namespace bitstrata
