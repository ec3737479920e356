#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "threads.h"

namespace bitstrata {
namespace {

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
        forms_[found].bits = 0;
      }
      form_[i] = found;
      forms_[found].bits = std::max(forms_[found].bits, order.bits());
      orders_.resize(std::max(orders_.size(), i + 1), Order(nullptr, 0, 0));
      orders_[i] = std::move(order);
    }
    if (is_dense_) dense_.resize(size_t(rows) * columns_);
    for (int f = 0; f < used_; ++f) {
      forms_[f].staged.resize(*forms_[f].layout, rows, exact, forms_[f].bits);
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
    int bits = 0;  // the highest among its layers
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
  Call call, down;
  std::vector<float> row, qkv, queries, mlp, piece_most, piece_total, piece_out;
  std::vector<int> first_piece;  // of each row
};

Step::Step(const Kernels& kernels, int hidden) : kernels_(kernels), hidden_(hidden), memory_(new Memory) {}

namespace {

// One step on its way through the blocks.
template <class Memory>
struct Run {
  const Kernels& kernels;
  const Rows& rows;
  Memory& memory;
  const int hidden, threads;
  const bool exact;

  float* x(int r) const { return rows.x + size_t(r) * hidden; }

  template <class Body>
  void each_row(Body body) const {
    parallel_for(rows.count > 1 ? threads : 1, rows.count, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) body(r);
    });
  }

  template <class Use>
  void over_blocks(const Call& call, Use use) const {
    parallel_for(threads, call.blocks(), [&](int begin, int end) {
      for (int at = begin; at < end; ++at) call.run(at, use);
    });
  }

  const float* normed(const Norm& norm, int r) const {
    if (!norm.weight) return x(r);
    float* row = &memory.row[size_t(r) * hidden];
    kernels.rms_norm(x(r), norm.weight, norm.epsilon, hidden, row);
    return row;
  }

  // x += what `call` makes of its input, through `after` if there is such a norm.
  void add_product(const Call& call, const Norm& after) const {
    if (!after.weight) {
      over_blocks(call, [&](size_t, int r, int first, int n, const float* y) {
        for (int i = 0; i < n; ++i) x(r)[first + i] += y[i];
      });
      return;
    }
    over_blocks(call, [&](size_t, int r, int first, int n, const float* y) {
      std::memcpy(&memory.row[size_t(r) * hidden + first], y, size_t(n) * sizeof(float));
    });
    each_row([&](int r) {
      float* y = &memory.row[size_t(r) * hidden];
      kernels.rms_norm(y, after.weight, after.epsilon, hidden, y);
      for (int i = 0; i < hidden; ++i) x(r)[i] += y[i];
    });
  }

  // Queries, keys and values of every row, one after the other in memory.qkv.
  void project(const Block& block) const {
    std::vector<const Linear*> layers;
    for (const Linear& layer : block.qkv) layers.push_back(&layer);
    memory.call.prepare(kernels, layers, rows.bits, rows.count, exact);
    each_row([&](int r) { memory.call.input.put(kernels, r, normed(block.before_attention, r)); });
    const int starts[] = {0, block.heads * block.width, (block.heads + block.key_heads) * block.width};
    memory.qkv.resize(size_t(rows.count) * block.qkv_width());
    over_blocks(memory.call, [&](size_t i, int r, int first, int n, const float* y) {
      std::memcpy(&memory.qkv[size_t(r) * block.qkv_width() + starts[i] + first], y, size_t(n) * sizeof(float));
    });
  }

  // Row r's key and value of key head `h` into the cache, and the queries that look at them into memory.queries; all
  // turned by the row's position.
  void place(const Block& block, const Cache& cache, int r, int h) const {
    const int width = block.width, together = block.heads / block.key_heads;
    const float *cosine = nullptr, *sine = nullptr;
    if (block.rotary >= 0) {
      cosine = rows.cosine[block.rotary] + size_t(r) * block.rotated;
      sine = rows.sine[block.rotary] + size_t(r) * block.rotated;
    }
    const auto turn = [&](float* head, const Norm& norm) {
      if (norm.weight) kernels.rms_norm(head, norm.weight, norm.epsilon, width, head);
      if (cosine) kernels.rotate(head, cosine, sine, block.rotated);
    };
    float* own = &memory.qkv[size_t(r) * block.qkv_width()];
    float *key = own + (block.heads + h) * width, *value = key + block.key_heads * width;
    turn(key, block.key_norm);
    const size_t at = size_t(h) * cache.tokens + rows.start[r] + rows.position[r];
    const auto store = [&](float* head, void* to, uint16_t* meaning) {
      char* place = static_cast<char*>(to) + at * cache.head_bytes(width);
      if (cache.bits) kernels.encode(head, width, cache.bits, reinterpret_cast<uint8_t*>(place), meaning + 2 * at);
      else kernels.convert(head, width, place, cache.type);
    };
    store(key, cache.keys, cache.key_meaning);
    store(value, cache.values, cache.value_meaning);
    for (int g = h * together; g < (h + 1) * together; ++g) {
      turn(own + g * width, block.query_norm);
      if (cache.bits) kernels.mix(own + g * width, width);  // as the keys are
      float* query = &memory.queries[(size_t(r) * block.heads + g) * padded(width)];
      std::memcpy(query, own + g * width, size_t(width) * sizeof(float));
    }
  }

  int64_t seen(const Block& block, int r) const {
    const int64_t all = rows.position[r] + 1;
    return block.window ? std::min<int64_t>(all, block.window) : all;
  }

  // Row r's queries of key head `h` against one piece of the positions that it sees.
  void attend(const Block& block, const Cache& cache, int r, int piece, int h) const {
    const int width = block.width, together = block.heads / block.key_heads;
    const size_t head = size_t(h) * cache.tokens * cache.head_bytes(width), meaning = 2 * size_t(h) * cache.tokens;
    const size_t mine = size_t(memory.first_piece[r] + piece) * block.heads + h * together;
    const int64_t used = seen(block, r);
    Attend part{};
    part.keys = static_cast<char*>(cache.keys) + head;
    part.values = static_cast<char*>(cache.values) + head;
    part.key_meaning = cache.key_meaning + meaning, part.value_meaning = cache.value_meaning + meaning;
    part.type = cache.type, part.bits = cache.bits;
    part.first = int(rows.start[r] + rows.position[r] + 1 - used + piece * kPiece);
    part.count = int(std::min<int64_t>(kPiece, used - piece * kPiece));
    part.heads = together, part.width = width;
    part.scale = block.scale, part.softcap = block.softcap;
    part.query = &memory.queries[(size_t(r) * block.heads + h * together) * padded(width)];
    part.most = &memory.piece_most[mine], part.total = &memory.piece_total[mine];
    part.out = &memory.piece_out[mine * padded(width)];
    kernels.attend(part);
  }

  // All of that; in one loop where no row sees another one of this step, and each sees a single piece.
  void attend_all(const Block& block, const Cache& cache) const {
    memory.first_piece.assign(1, 0);
    bool apart = true;
    for (int r = 0; r < rows.count; ++r) {
      memory.first_piece.push_back(memory.first_piece[r] + int((seen(block, r) + kPiece - 1) / kPiece));
      for (int other = 0; other < r; ++other) apart &= rows.start[other] != rows.start[r];
    }
    const int pieces = memory.first_piece.back(), wide = padded(block.width);
    memory.queries.assign(size_t(rows.count) * block.heads * wide, 0.0f);
    memory.piece_most.resize(size_t(pieces) * block.heads), memory.piece_total.resize(size_t(pieces) * block.heads);
    memory.piece_out.resize(size_t(pieces) * block.heads * wide);
    const bool at_once = apart && pieces == rows.count;
    parallel_for(threads, rows.count * block.key_heads, [&](int begin, int end) {
      for (int at = begin; at < end; ++at) {
        place(block, cache, at / block.key_heads, at % block.key_heads);
        if (at_once) attend(block, cache, at / block.key_heads, 0, at % block.key_heads);
      }
    });
    if (at_once) return;
    parallel_for(threads, pieces * block.key_heads, [&](int begin, int end) {
      for (int at = begin; at < end; ++at) {
        const int piece = at / block.key_heads;
        const auto after = std::upper_bound(memory.first_piece.begin(), memory.first_piece.end(), piece);
        const int r = int(after - memory.first_piece.begin()) - 1;
        attend(block, cache, r, piece - memory.first_piece[r], at % block.key_heads);
      }
    });
  }

  // Row r's pieces put together: out [heads][width].
  void join(const Block& block, const Cache& cache, int r, float* out) const {
    const int width = block.width, wide = padded(width);
    for (int h = 0; h < block.heads; ++h, out += width) {
      float most = -INFINITY, total = 0;
      for (int piece = memory.first_piece[r]; piece < memory.first_piece[r + 1]; ++piece)
        most = std::max(most, memory.piece_most[size_t(piece) * block.heads + h]);
      std::fill_n(out, width, 0.0f);
      for (int piece = memory.first_piece[r]; piece < memory.first_piece[r + 1]; ++piece) {
        const size_t at = size_t(piece) * block.heads + h;
        const float share = std::exp(memory.piece_most[at] - most);
        total += share * memory.piece_total[at];
        for (int i = 0; i < width; ++i) out[i] += share * memory.piece_out[at * wide + i];
      }
      for (int i = 0; i < width; ++i) out[i] /= total;
      if (cache.bits) kernels.mix(out, width);  // as the values are
    }
  }

  void attention(const Block& block, const Cache& cache) const {
    project(block);
    attend_all(block, cache);
    memory.call.prepare(kernels, {&block.out}, rows.bits, rows.count, exact);
    each_row([&](int r) {
      float* out = &memory.qkv[size_t(r) * block.qkv_width()];  // its queries are not needed any more
      join(block, cache, r, out);
      memory.call.input.put(kernels, r, out);
    });
    add_product(memory.call, block.after_attention);
  }

  // A block of gates and of what they let through is one piece of work.
  void feed_forward(const Block& block) const {
    std::vector<const Linear*> layers;
    for (const Linear& layer : block.gate_up) layers.push_back(&layer);
    memory.call.prepare(kernels, layers, rows.bits, rows.count, exact);
    each_row([&](int r) { memory.call.input.put(kernels, r, normed(block.before_mlp, r)); });
    const bool split = block.gate_up.size() == 2;
    const int inner = block.down.columns(), blocks = (inner + kBlockRows - 1) / kBlockRows;
    memory.mlp.resize(size_t(rows.count) * inner);
    parallel_for(threads, blocks, [&](int begin, int end) {
      alignas(64) float gates[kMaxRows * kBlockRows];
      for (int at = begin; at < end; ++at) {
        memory.call.run(0, at, [&](size_t, int r, int, int n, const float* y) {
          std::memcpy(gates + r * kBlockRows, y, size_t(n) * sizeof(float));
        });
        memory.call.run(split ? 1 : 0, split ? at : blocks + at, [&](size_t, int r, int, int n, const float* y) {
          float* to = &memory.mlp[size_t(r) * inner + at * kBlockRows];
          kernels.activate(block.activation, gates + r * kBlockRows, y, n, to);
        });
      }
    });
    memory.down.prepare(kernels, {&block.down}, rows.bits, rows.count, exact);
    each_row([&](int r) { memory.down.input.put(kernels, r, &memory.mlp[size_t(r) * inner]); });
    add_product(memory.down, block.after_mlp);
  }

  // Logits of the rows that are wanted, as a call of so many rows.
  void logits(const Linear& head, const Norm& last, float softcap) const {
    const int wanted = rows.wanted_count;
    std::vector<int8_t> bits(wanted);
    Linear own = head;
    if (own.planes) {
      for (int w = 0; w < wanted; ++w) bits[w] = rows.bits[size_t(head.place) * rows.count + rows.wanted[w]];
      own.place = 0;
    }
    memory.call.prepare(kernels, {&own}, bits.data(), wanted, exact);
    for (int w = 0; w < wanted; ++w) memory.call.input.put(kernels, w, normed(last, rows.wanted[w]));
    const size_t vocabulary = size_t(own.rows());
    over_blocks(memory.call, [&](size_t, int w, int first, int n, const float* y) {
      float* to = rows.logits + w * vocabulary + first;
      std::memcpy(to, y, size_t(n) * sizeof(float));
      if (softcap > 0)
        for (int i = 0; i < n; ++i) to[i] = softcap * std::tanh(to[i] / softcap);
    });
  }
};

}  // namespace

void Step::run(const Rows& rows, const std::vector<Cache>& caches, int threads, bool exact) {
  if (caches.size() != blocks.size()) throw std::invalid_argument("one cache for each block");
  const Awake awake(threads);
  memory_->row.resize(size_t(rows.count) * hidden_);
  const Run<Memory> run{kernels_, rows, *memory_, hidden_, threads, exact};
  for (int b = rows.first_block; b < rows.last_block; ++b) {
    run.attention(blocks[b], caches[b]);
    run.feed_forward(blocks[b]);
  }
  if (rows.wanted_count > 0) run.logits(head, last, logit_softcap);
}

}  // namespace bitstrata
