// Bindings of Step. What a model is made of comes as dictionaries with the names of step.h's members; tensors come as
// addresses, as in module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "dispatch.h"
#include "step.h"

namespace nb = nanobind;

namespace bitstrata {
namespace {

template <class T>
T get(const nb::dict& from, const char* key) {
  return nb::cast<T>(from[key]);
}

Norm norm_of(const nb::dict& from) {
  return {at<const float>(get<uintptr_t>(from, "weight")), get<float>(from, "epsilon")};
}

Linear linear_of(const nb::dict& from) {
  Linear linear;
  linear.bias = at<const float>(get<uintptr_t>(from, "bias"));
  linear.place = get<int>(from, "place");
  if (linear.place >= 0) linear.planes = nb::cast<const Weight*>(from["planes"]);
  else linear.dense = {at<const void>(get<uintptr_t>(from, "dense")), type_of(get<int>(from, "type")),
                       get<int>(from, "rows"), get<int>(from, "columns")};
  return linear;
}

std::vector<Linear> linears_of(const nb::list& from) {
  std::vector<Linear> linears;
  for (nb::handle item : from) linears.push_back(linear_of(nb::cast<nb::dict>(item)));
  return linears;
}

int rows_of(const std::vector<Linear>& linears) {
  int rows = 0;
  for (const Linear& linear : linears) rows += linear.rows();
  return rows;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

Block block_of(const nb::dict& from, int hidden) {
  Block block;
  block.before_attention = norm_of(nb::cast<nb::dict>(from["before_attention"]));
  block.after_attention = norm_of(nb::cast<nb::dict>(from["after_attention"]));
  block.before_mlp = norm_of(nb::cast<nb::dict>(from["before_mlp"]));
  block.after_mlp = norm_of(nb::cast<nb::dict>(from["after_mlp"]));
  block.query_norm = norm_of(nb::cast<nb::dict>(from["query_norm"]));
  block.key_norm = norm_of(nb::cast<nb::dict>(from["key_norm"]));
  block.qkv = linears_of(nb::cast<nb::list>(from["qkv"]));
  block.gate_up = linears_of(nb::cast<nb::list>(from["gate_up"]));
  block.out = linear_of(nb::cast<nb::dict>(from["out"]));
  block.down = linear_of(nb::cast<nb::dict>(from["down"]));
  block.heads = get<int>(from, "heads"), block.key_heads = get<int>(from, "key_heads");
  block.width = get<int>(from, "width"), block.window = get<int>(from, "window");
  block.rotary = get<int>(from, "rotary"), block.rotated = get<int>(from, "rotated");
  block.scale = get<float>(from, "scale"), block.softcap = get<float>(from, "softcap");
  block.activation = static_cast<Activation>(get<int>(from, "activation"));

  const int inner = block.down.columns();
  require(block.key_heads > 0 && block.heads % block.key_heads == 0, "heads must be a multiple of key heads");
  require(block.qkv.size() == 1 || block.qkv.size() == 3, "queries, keys and values are one layer or three");
  require(block.gate_up.size() == 1 || block.gate_up.size() == 2, "gate and up are one layer or two");
  require(rows_of(block.qkv) == (block.heads + 2 * block.key_heads) * block.width, "the heads do not fill the layer");
  require(rows_of(block.gate_up) == 2 * inner, "gate, up and down do not fit");
  require(block.gate_up.size() == 2 || inner % kBlockRows == 0, "gate and up of one layer must be whole blocks");
  for (const Linear& linear : block.qkv) require(linear.columns() == hidden, "a layer does not read the hidden state");
  for (const Linear& linear : block.gate_up) require(linear.columns() == hidden, "a layer does not read the hidden state");
  require(block.out.columns() == block.heads * block.width && block.out.rows() == hidden, "the output projection does not fit");
  require(block.down.rows() == hidden, "down does not write the hidden state");
  require(block.rotary < 0 || (block.rotated % 2 == 0 && block.rotated <= block.width), "angles do not fit a head");
  return block;
}

// What Python holds: a Step, the caches that it writes, and how many tables of angles there are.
struct Session {
  Step step;
  std::vector<Cache> caches;
  int hidden;
};

void run(Session& self, uintptr_t x, const std::vector<int64_t>& start, const std::vector<int64_t>& position,
         uintptr_t bits, const std::vector<uintptr_t>& cosine, const std::vector<uintptr_t>& sine,
         int first_block, int last_block, const std::vector<int>& wanted, uintptr_t logits, int threads, bool exact) {
  const int count = int(start.size());
  if (count < 1 || count > kMaxRows || position.size() != start.size()) throw std::invalid_argument("too many rows, or none");
  if (self.caches.size() != self.step.blocks.size()) throw std::invalid_argument("the caches are not set");
  if (first_block < 0 || last_block > int(self.step.blocks.size())) throw std::out_of_range("blocks that are not there");
  for (int row : wanted)
    if (row < 0 || row >= count) throw std::out_of_range("logits of a row that is not there");
  for (int r = 0; r < count; ++r)
    for (const Cache& cache : self.caches)
      if (start[r] < 0 || position[r] < 0 || start[r] + position[r] >= cache.tokens) throw std::out_of_range("no room in the cache");
  for (const Block& block : self.step.blocks)
    if (block.rotary >= int(cosine.size()) || block.rotary >= int(sine.size())) throw std::out_of_range("a table of angles is missing");
  std::vector<const float*> cosines, sines;
  for (uintptr_t address : cosine) cosines.push_back(at<const float>(address));
  for (uintptr_t address : sine) sines.push_back(at<const float>(address));
  const Rows rows{count, at<float>(x), start.data(), position.data(), at<const int8_t>(bits), cosines.data(), sines.data(),
                  first_block, last_block, wanted.data(), int(wanted.size()), at<float>(logits)};
  nb::gil_scoped_release release;
  self.step.run(rows, self.caches, threads, exact);
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<Session>(m, "Step")
      .def("__init__",
           [](Session* self, const std::string& isa, int hidden, const nb::list& blocks, const nb::dict& last,
              const nb::dict& head, float logit_softcap) {
             Step step(kernels_named(isa), hidden);
             for (nb::handle block : blocks) step.blocks.push_back(block_of(nb::cast<nb::dict>(block), hidden));
             step.last = norm_of(last);
             step.head = linear_of(head);
             step.logit_softcap = logit_softcap;
             require(step.head.columns() == hidden, "the head does not read the hidden state");
             new (self) Session{std::move(step), {}, hidden};
           })
      .def("set_caches",
           // meanings: none if the caches hold numbers of `type`, else they hold codes of `bits`
           [](Session& self, const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values,
              const std::vector<uintptr_t>& key_meanings, const std::vector<uintptr_t>& value_meanings, int type, int bits,
              int64_t tokens) {
             const size_t count = self.step.blocks.size(), meanings = bits ? count : 0;
             if (keys.size() != count || values.size() != count || key_meanings.size() != meanings ||
                 value_meanings.size() != meanings)
               throw std::invalid_argument("one cache for each block");
             if (bits != 0 && bits != 4 && bits != 8) throw std::invalid_argument("codes have 4 or 8 bits");
             self.caches.clear();
             for (size_t i = 0; i < count; ++i) {
               Cache cache{at<void>(keys[i]), at<void>(values[i])};
               if (bits) cache.key_meaning = at<uint16_t>(key_meanings[i]), cache.value_meaning = at<uint16_t>(value_meanings[i]);
               cache.type = type_of(type), cache.bits = bits, cache.tokens = tokens;
               self.caches.push_back(cache);
             }
           })
      .def("run", &run);
}

}  // namespace bitstrata
