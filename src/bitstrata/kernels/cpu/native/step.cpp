#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "threads.h"

namespace bitstrata {
namespace {

size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Rows of numbers that products read: in the order of each layer's bits, or as they are for dense matrices.
class Input {
 public:
  // Get ready for `layers`, which read the same; `bits` as in Rows.
  void prepare(const std::vector<const Linear*>& layers, const int8_t* bits, int rows, bool exact) {
    rows_ = rows, exact_ = exact, used_ = 0;
    is_dense_ = false;
    form_.assign(layers.size(), -1);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Linear& layer = *layers[i];
      if (!layer.planes) {
        is_dense_ = true, columns_ = layer.columns();
        continue;
      }
      const int8_t* own = bits + size_t(layer.place) * rows;
      const bool uniform = std::all_of(own, own + rows, [&](int8_t b) { return b == own[0]; });
      Order order(uniform ? nullptr : own, own[0], rows);
      int found = -1;
      for (int f = 0; f < used_ && found < 0; ++f) {
        const Layout& known = *forms_[f].layout;
        if (known.columns == layer.planes->layout.columns && known.group_size == layer.planes->layout.group_size &&
            forms_[f].order.rows == order.rows)
          found = f;
      }
      if (found < 0) {
        found = used_++;
        if (int(forms_.size()) < used_) forms_.emplace_back();
        forms_[found].layout = &layer.planes->layout;
        forms_[found].order = order;
        forms_[found].staged.resize(layer.planes->layout, rows, exact);
      }
      form_[i] = found;
      orders_.resize(std::max(orders_.size(), i + 1), Order(nullptr, 0, 0));
      orders_[i] = std::move(order);
    }
    if (is_dense_) dense_.resize(size_t(rows) * columns_);
    for (int f = 0; f < used_; ++f) {
      forms_[f].place.resize(rows);
      for (int place = 0; place < rows; ++place) forms_[f].place[forms_[f].order.rows[place]] = place;
    }
  }

  // Row `row` is `x` [columns].
  void put(const Kernels& kernels, int row, const float* x) {
    for (int f = 0; f < used_; ++f)
      forms_[f].staged.put(kernels, *forms_[f].layout, x, Type::f32, forms_[f].place[row], exact_);
    if (is_dense_) std::memcpy(&dense_[size_t(row) * columns_], x, size_t(columns_) * sizeof(float));
  }

  const Order& order(size_t layer) const { return orders_[layer]; }
  const Staged& staged(size_t layer) const { return forms_[form_[layer]].staged; }
  const float* dense() const { return dense_.data(); }

 private:
  struct Form {
    const Layout* layout = nullptr;
    Order order{nullptr, 0, 0};
    Staged staged;
    std::vector<int> place;  // of each row
  };
  std::vector<Form> forms_;
  std::vector<int> form_;
  std::vector<Order> orders_;
  std::vector<float> dense_;
  int rows_ = 0, columns_ = 0, used_ = 0;
  bool exact_ = false, is_dense_ = false;
};

// Layers that read the same rows, run together: a block of 16 outputs at a time, of all layers one after the other.
class Call {
 public:
  void prepare(const Kernels& kernels, const std::vector<const Linear*>& layers, const int8_t* bits, int rows, bool exact) {
    kernels_ = &kernels, layers_ = layers, rows_ = rows;
    input.prepare(layers, bits, rows, exact);
    products_.resize(std::max(products_.size(), layers.size()));
    first_.assign(1, 0);
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i]->planes) products_[i].prepare(kernels, *layers[i]->planes, input.order(i), input.staged(i), exact);
      first_.push_back(first_[i] + layers[i]->blocks());
    }
  }
  int blocks() const { return first_.back(); }

  // Calls use(layer, row, first output, how many, the outputs) for each row of block `at`, the bias added.
  template <class Use>
  void run(int at, Use use) const {
    size_t i = 0;
    while (at >= first_[i + 1]) ++i;
    run(i, at - first_[i], use);
  }
  template <class Use>
  void run(size_t i, int block, Use use) const {
    alignas(64) float out[kMaxRows * kBlockRows];
    const Linear& layer = *layers_[i];
    const int first = block * kBlockRows, count = std::min(kBlockRows, layer.rows() - first);
    if (layer.planes) products_[i].run(block, out);
    else kernels_->dense(layer.dense, input.dense(), rows_, block, out);
    for (int place = 0; place < rows_; ++place) {
      float* y = out + place * kBlockRows;
      if (layer.bias)
        for (int n = 0; n < count; ++n) y[n] += layer.bias[first + n];
      use(i, layer.planes ? input.order(i).rows[place] : place, first, count, y);
    }
  }

  Input input;

 private:
  const Kernels* kernels_ = nullptr;
  std::vector<const Linear*> layers_;
  std::vector<Product> products_;
  std::vector<int> first_;
  int rows_ = 0;
};

}  // namespace

// What a step writes on its way, kept for the next one.
struct Step::Memory {
  Call call, other;
  std::vector<float> qkv, mlp, gate, row, queries, piece_most, piece_total, piece_out;
  std::vector<int> first_piece;
};

Step::Step(const Kernels& kernels, int hidden) : kernels_(kernels), hidden_(hidden), memory_(new Memory) {}

void Step::run(const Rows& rows, const std::vector<Cache>& caches, int threads, bool exact) {
  if (caches.size() != blocks.size()) throw std::invalid_argument("one cache for each block");
  const Kernels& kernels = kernels_;
  const int count = rows.count, hidden = hidden_;
  Memory& memory = *memory_;
  const Awake awake(threads);
  memory.row.resize(size_t(count) * hidden);
  float* x = rows.x;

  const auto each_row = [&](auto body) {
    parallel_for(count > 1 ? threads : 1, count, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) body(r);
    });
  };
  const auto normed = [&](const Norm& norm, int r) -> const float* {
    if (!norm.weight) return x + size_t(r) * hidden;
    float* row = &memory.row[size_t(r) * hidden];
    kernels.rms_norm(x + size_t(r) * hidden, norm.weight, norm.epsilon, hidden, row);
    return row;
  };
  const auto over_blocks = [&](const Call& call, auto use) {
    parallel_for(threads, call.blocks(), [&](int begin, int end) {
      for (int at = begin; at < end; ++at) call.run(at, use);
    });
  };
  // x += layer(input), through `after` if there is such a norm
  const auto add_product = [&](Call& call, const Norm& after) {
    if (!after.weight) {
      over_blocks(call, [&](size_t, int r, int first, int n, const float* y) {
        float* to = x + size_t(r) * hidden + first;
        for (int i = 0; i < n; ++i) to[i] += y[i];
      });
      return;
    }
    over_blocks(call, [&](size_t, int r, int first, int n, const float* y) {
      std::memcpy(&memory.row[size_t(r) * hidden + first], y, size_t(n) * sizeof(float));
    });
    each_row([&](int r) {
      float* y = &memory.row[size_t(r) * hidden];
      kernels.rms_norm(y, after.weight, after.epsilon, hidden, y);
      for (int i = 0; i < hidden; ++i) x[size_t(r) * hidden + i] += y[i];
    });
  };

  for (int b = rows.first_block; b < rows.last_block; ++b) {
    const Block& block = blocks[b];
    const Cache& cache = caches[b];
    const int width = block.width, wide = padded(width), heads = block.heads, key_heads = block.key_heads;
    const int together = heads / key_heads, qkv_width = (heads + 2 * key_heads) * width;
    Call& call = memory.call;

    // queries, keys and values
    std::vector<const Linear*> layers;
    for (const Linear& layer : block.qkv) layers.push_back(&layer);
    call.prepare(kernels, layers, rows.bits, count, exact);
    each_row([&](int r) { call.input.put(kernels, r, normed(block.before_attention, r)); });
    memory.qkv.resize(size_t(count) * qkv_width);
    const int starts[] = {0, heads * width, (heads + key_heads) * width};
    over_blocks(call, [&](size_t i, int r, int first, int n, const float* y) {
      std::memcpy(&memory.qkv[size_t(r) * qkv_width + starts[i] + first], y, size_t(n) * sizeof(float));
    });

    // turned, and into the cache
    memory.queries.assign(size_t(count) * heads * wide, 0.0f);
    const auto place = [&](int r, int h) {
      const float *cosine = nullptr, *sine = nullptr;
      if (block.rotary >= 0) {
        cosine = rows.cosine[block.rotary] + size_t(r) * block.rotated;
        sine = rows.sine[block.rotary] + size_t(r) * block.rotated;
      }
      float* own = &memory.qkv[size_t(r) * qkv_width];
      float *key = own + (heads + h) * width, *value = own + (heads + key_heads + h) * width;
      const size_t at = (size_t(h) * cache.tokens + rows.start[r] + rows.position[r]) * width * size_of(cache.type);
      if (block.key_norm.weight) kernels.rms_norm(key, block.key_norm.weight, block.key_norm.epsilon, width, key);
      if (cosine) kernels.rotate(key, cosine, sine, block.rotated);
      kernels.convert(key, width, static_cast<char*>(cache.keys) + at, cache.type);
      kernels.convert(value, width, static_cast<char*>(cache.values) + at, cache.type);
      for (int g = h * together; g < (h + 1) * together; ++g) {
        float* query = own + g * width;
        if (block.query_norm.weight)
          kernels.rms_norm(query, block.query_norm.weight, block.query_norm.epsilon, width, query);
        if (cosine) kernels.rotate(query, cosine, sine, block.rotated);
        std::memcpy(&memory.queries[(size_t(r) * heads + g) * wide], query, size_t(width) * sizeof(float));
      }
    };

    // attention, a piece of the positions at a time
    memory.first_piece.assign(1, 0);
    bool apart = true;  // rows see no row of this step but themselves
    for (int r = 0; r < count; ++r) {
      const int64_t seen = rows.position[r] + 1, used = block.window ? std::min<int64_t>(seen, block.window) : seen;
      memory.first_piece.push_back(memory.first_piece[r] + int((used + kPiece - 1) / kPiece));
      for (int other = 0; other < r; ++other) apart &= rows.start[other] != rows.start[r];
    }
    const int pieces = memory.first_piece.back();
    memory.piece_most.resize(size_t(pieces) * heads), memory.piece_total.resize(size_t(pieces) * heads);
    memory.piece_out.resize(size_t(pieces) * heads * wide);
    const auto attend = [&](int r, int piece, int h) {
      const int64_t seen = rows.position[r] + 1, used = block.window ? std::min<int64_t>(seen, block.window) : seen;
      const size_t mine = size_t(memory.first_piece[r] + piece) * heads + h * together;
      Attend part{};
      part.keys = static_cast<char*>(cache.keys) + size_t(h) * cache.tokens * width * size_of(cache.type);
      part.values = static_cast<char*>(cache.values) + size_t(h) * cache.tokens * width * size_of(cache.type);
      part.type = cache.type;
      part.first = int(rows.start[r] + seen - used + piece * kPiece);
      part.count = int(std::min<int64_t>(kPiece, used - piece * kPiece));
      part.heads = together, part.width = part.value_width = width;
      part.scale = block.scale, part.softcap = block.softcap;
      part.query = &memory.queries[(size_t(r) * heads + h * together) * wide];
      part.most = &memory.piece_most[mine], part.total = &memory.piece_total[mine];
      part.out = &memory.piece_out[mine * wide];
      kernels.attend(part);
    };
    const bool at_once = apart && pieces == count;
    parallel_for(threads, count * key_heads, [&](int begin, int end) {
      for (int at = begin; at < end; ++at) {
        place(at / key_heads, at % key_heads);
        if (at_once) attend(at / key_heads, 0, at % key_heads);
      }
    });
    if (!at_once)
      parallel_for(threads, pieces * key_heads, [&](int begin, int end) {
        for (int at = begin; at < end; ++at) {
          const int piece = at / key_heads;
          const int r = int(std::upper_bound(memory.first_piece.begin(), memory.first_piece.end(), piece) -
                            memory.first_piece.begin()) - 1;
          attend(r, piece - memory.first_piece[r], at % key_heads);
        }
      });

    // pieces put together, and the output projection
    call.prepare(kernels, {&block.out}, rows.bits, count, exact);
    each_row([&](int r) {
      float* out = &memory.qkv[size_t(r) * qkv_width];  // its queries are not needed any more
      for (int h = 0; h < heads; ++h) {
        float most = block.sinks ? block.sinks[h] : -INFINITY, total = 0;
        for (int piece = memory.first_piece[r]; piece < memory.first_piece[r + 1]; ++piece)
          most = std::max(most, memory.piece_most[size_t(piece) * heads + h]);
        if (block.sinks) total = std::exp(block.sinks[h] - most);
        std::fill_n(out + h * width, width, 0.0f);
        for (int piece = memory.first_piece[r]; piece < memory.first_piece[r + 1]; ++piece) {
          const size_t at = size_t(piece) * heads + h;
          const float share = std::exp(memory.piece_most[at] - most);
          total += share * memory.piece_total[at];
          for (int i = 0; i < width; ++i) out[h * width + i] += share * memory.piece_out[at * wide + i];
        }
        for (int i = 0; i < width; ++i) out[h * width + i] /= total;
      }
      call.input.put(kernels, r, out);
    });
    add_product(call, block.after_attention);

    // feed-forward: a block of gates and of what they let through in one piece of work
    layers.clear();
    for (const Linear& layer : block.gate_up) layers.push_back(&layer);
    call.prepare(kernels, layers, rows.bits, count, exact);
    each_row([&](int r) { call.input.put(kernels, r, normed(block.before_mlp, r)); });
    const bool split = block.gate_up.size() == 2;
    const int inner = block.down.columns(), inner_blocks = (inner + kBlockRows - 1) / kBlockRows;
    memory.mlp.resize(size_t(count) * inner);
    parallel_for(threads, inner_blocks, [&](int begin, int end) {
      alignas(64) float gates[kMaxRows * kBlockRows];
      for (int at = begin; at < end; ++at) {
        call.run(0, at, [&](size_t, int r, int, int n, const float* y) {
          std::memcpy(gates + r * kBlockRows, y, size_t(n) * sizeof(float));
        });
        call.run(split ? 1 : 0, split ? at : inner_blocks + at, [&](size_t, int r, int, int n, const float* y) {
          kernels.activate(block.activation, gates + r * kBlockRows, y, n,
                           &memory.mlp[size_t(r) * inner + at * kBlockRows]);
        });
      }
    });
    Call& down = memory.other;
    down.prepare(kernels, {&block.down}, rows.bits, count, exact);
    each_row([&](int r) { down.input.put(kernels, r, &memory.mlp[size_t(r) * inner]); });
    add_product(down, block.after_mlp);
  }

  if (rows.wanted_count == 0) return;
  // the head, for the rows whose logits are wanted, as a call of so many rows
  const int wanted = rows.wanted_count;
  std::vector<int8_t> bits(wanted);
  Linear own = head;
  if (own.planes) {
    for (int w = 0; w < wanted; ++w) bits[w] = rows.bits[size_t(head.place) * count + rows.wanted[w]];
    own.place = 0;
  }
  Call& call = memory.call;
  call.prepare(kernels, {&own}, bits.data(), wanted, exact);
  for (int w = 0; w < wanted; ++w) call.input.put(kernels, w, normed(last, rows.wanted[w]));
  const size_t vocabulary = size_t(own.rows());
  over_blocks(call, [&](size_t, int w, int first, int n, const float* y) {
    float* to = rows.logits + w * vocabulary + first;
    if (logit_softcap > 0)
      for (int i = 0; i < n; ++i) to[i] = logit_softcap * std::tanh(y[i] / logit_softcap);
    else std::memcpy(to, y, size_t(n) * sizeof(float));
  });
}

}  // namespace bitstrata
