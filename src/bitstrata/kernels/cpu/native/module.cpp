// Bindings. Tensors come as addresses: their shapes and dtypes are checked in Python, their memory is kept alive there.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>

#include "bindings.h"
#include "dispatch.h"
#include "gram.h"
#include "layout.h"
#include "linear.h"
#include "threads.h"

namespace nb = nanobind;

namespace bitstrata {

void bind_step(nb::module_& m);  // step_module.cpp

namespace {

void check_plane(int index) {
  if (index < 0 || index >= kMaxBits) throw std::out_of_range("planes are numbered 0 to 7");
}

void check_bits(int bits) {
  if (bits < 1 || bits > kMaxBits) throw std::out_of_range("bits must lie in 1..8");
}

void pack_plane(const Weight& weight, uintptr_t words, uintptr_t plane, int threads) {
  nb::gil_scoped_release release;
  const Layout& layout = weight.layout;
  const int stride = (layout.columns + 31) / 32;
  parallel_for(threads, layout.blocks, [&](int begin, int end) {
    std::vector<uint32_t> scratch(size_t(layout.units) * 4);
    for (int row = begin * kBlockRows; row < end * kBlockRows; ++row)
      pack_plane_row(layout, at<const uint32_t>(words) + size_t(row) * stride, at<uint8_t>(plane), row, scratch.data());
  });
}

void unpack_plane(const Weight& weight, uintptr_t plane, uintptr_t words, int threads) {
  nb::gil_scoped_release release;
  const Layout& layout = weight.layout;
  const int stride = (layout.columns + 31) / 32;
  parallel_for(threads, layout.rows, [&](int begin, int end) {
    std::vector<uint32_t> scratch(size_t(layout.units) * 4);
    for (int row = begin; row < end; ++row)
      unpack_plane_row(layout, at<const uint8_t>(plane), at<uint32_t>(words) + size_t(row) * stride, row, scratch.data());
  });
}

void run_linear(const std::string& isa, const std::vector<const Weight*>& weights, uintptr_t x, int type, int64_t stride,
                int rows, int bits, uintptr_t row_bits, const std::vector<uintptr_t>& y, int threads, bool exact) {
  if (weights.empty() || weights.size() != y.size()) throw std::invalid_argument("one output for each weight");
  const Kernels& kernels = kernels_named(isa);
  const Activations activations{at<const void>(x), type_of(type), ptrdiff_t(stride), rows};
  std::vector<void*> outputs;
  for (uintptr_t address : y) outputs.push_back(at<void>(address));
  nb::gil_scoped_release release;
  linear(kernels, weights, activations, bits, at<const int8_t>(row_bits), outputs, threads, exact);
}

// affine scales; `unit` matters if it is of bytes.
void pack_scales_of(const Weight& weight, int bits, uintptr_t scale, uintptr_t offset, uintptr_t unit, uintptr_t out) {
  check_bits(bits);
  const Layout& layout = weight.layout;
  if (!weight.has_bytes(bits))
    return pack_scales(layout, at<const uint16_t>(scale), at<const uint16_t>(offset), bits, at<uint16_t>(out));
  pack_scales(layout, at<const int8_t>(scale), at<const int8_t>(offset), bits, at<int8_t>(out));
  pack_units(layout, at<const uint16_t>(unit), reinterpret_cast<float*>(at<int8_t>(out) + weight.scale_count(bits)));
}

void unpack_scales_of(const Weight& weight, int bits, uintptr_t scale, uintptr_t offset, uintptr_t unit) {
  check_bits(bits);
  if (!weight.scales[bits]) throw std::invalid_argument("no scales for these bits");
  const void* packed = weight.scales[bits];
  if (!weight.has_bytes(bits))
    return unpack_scales(weight.layout, static_cast<const uint16_t*>(packed), bits, at<uint16_t>(scale), at<uint16_t>(offset));
  unpack_scales(weight.layout, static_cast<const int8_t*>(packed), bits, at<int8_t>(scale), at<int8_t>(offset));
  unpack_units(weight.layout, weight.units(bits), at<uint16_t>(unit));
}

void run_decode(const Weight& weight, const std::string& isa, int bits, int first, int last, uintptr_t out, int type,
                int threads) {
  const int rows = weight.layout.rows;
  if (first < 0 || first % kBlockRows || last > rows || first > last || (last % kBlockRows && last != rows))
    throw std::out_of_range("rows to decode must be whole blocks of the weight");
  const Kernels& kernels = kernels_named(isa);
  nb::gil_scoped_release release;
  decode(kernels, weight, bits, first, last, at<void>(out), type_of(type), threads);
}

void run_decode_rows(const Weight& weight, const std::string& isa, int bits, uintptr_t index, int count, uintptr_t out,
                     int type, int threads) {
  for (int i = 0; i < count; ++i)
    if (at<const int64_t>(index)[i] < 0 || at<const int64_t>(index)[i] >= weight.layout.rows)
      throw std::out_of_range("a row that the weight does not have");
  const Kernels& kernels = kernels_named(isa);
  nb::gil_scoped_release release;
  decode_rows(kernels, weight, bits, at<const int64_t>(index), count, at<void>(out), type_of(type), threads);
}

const Kernels& fastest() {
  for (const Choice& choice : choices())
    if (choice.runs) return *choice.kernels;
  throw std::logic_error("the scalar kernels run everywhere");
}

// Each track: (bits, levels, left, factors, weights), the last four addresses.
void choose(int64_t rows, int columns, const std::vector<std::tuple<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t>>& tracks,
            uintptr_t codes, bool given, int threads) {
  CodeProblem problem{rows, columns, given, {}, at<int64_t>(codes)};
  for (const auto& [bits, levels, left, factors, weights] : tracks) {
    check_bits(bits);
    if (!problem.tracks.empty() && bits <= problem.tracks.back().bits) throw std::invalid_argument("bits must ascend");
    problem.tracks.push_back({bits, at<const float>(levels), at<const float>(left), at<const float>(factors),
                              at<const float>(weights)});
  }
  if (problem.tracks.empty()) throw std::invalid_argument("a code needs a track");
  const Kernels& kernels = fastest();
  nb::gil_scoped_release release;
  parallel_for(threads, int((rows + kCodeLanes - 1) / kCodeLanes), [&](int begin, int end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.codes(problem, i * kCodeLanes, int(std::min<int64_t>(kCodeLanes, rows - i * kCodeLanes)));
  });
}

// The arrays are addresses.
void fit(int64_t rows, int columns, int bits, uintptr_t codes, uintptr_t metric, uintptr_t residual, float ridge,
         uintptr_t step, int threads) {
  check_bits(bits);
  const FitProblem problem{rows, columns, bits, at<const int64_t>(codes), at<const float>(metric),
                           at<const float>(residual), ridge, at<float>(step)};
  const Kernels& kernels = fastest();
  nb::gil_scoped_release release;
  parallel_for(threads, int((rows + kFitLanes - 1) / kFitLanes), [&](int begin, int end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.fit(problem, i * kFitLanes, int(std::min<int64_t>(kFitLanes, rows - i * kFitLanes)));
  });
}

// Reads every byte once, with the loads of the best instruction set; the sum keeps the compiler from leaving it out.
uint32_t read_all(uintptr_t address, size_t bytes, int threads) {
  nb::gil_scoped_release release;
  constexpr size_t piece = size_t(1) << 18;
  const Kernels& kernels = fastest();
  std::atomic<uint32_t> total{0};
  parallel_for(threads, int(bytes / piece), [&](int begin, int end) {
    total += kernels.read(at<const uint8_t>(address) + size_t(begin) * piece, size_t(end - begin) * piece);
  });
  return total;
}

// For tests of the pool: a piece of work for each of `threads` threads, which ends when all of them have come, or after
// ten seconds. Returns how many came; if they `fail`, those that are not the caller's find no memory.
int meet(int threads, bool fail) {
  nb::gil_scoped_release release;
  const std::thread::id caller = std::this_thread::get_id();
  std::mutex mutex;
  std::condition_variable all;
  std::set<std::thread::id> here;
  parallel_for(threads, threads, [&](int, int) {
    std::unique_lock<std::mutex> lock(mutex);
    here.insert(std::this_thread::get_id());
    all.notify_all();
    all.wait_for(lock, std::chrono::seconds(10), [&] { return int(here.size()) >= threads; });
    if (fail && std::this_thread::get_id() != caller) throw std::bad_alloc();
  });
  return int(here.size());
}

}  // namespace
}  // namespace bitstrata

NB_MODULE(_native, m) {
  using namespace bitstrata;
  nb::set_leak_warnings(false);  // weights that live until the interpreter ends are no leak
  m.doc() = "Native CPU kernels: weights in the blocked layout, and products with them.";
  m.def("instruction_sets", [] {
    nb::list all;
    for (const Choice& choice : choices()) all.append(nb::make_tuple(choice.kernels->name, choice.runs, choice.needs));
    return nb::tuple(all);
  });
  m.def("read_all", &read_all);
  m.def("linear", &run_linear);
  m.def("choose_codes", &choose);
  m.def("fit_codes", &fit);
  m.def("meet", &meet);
  m.def("gram_runs", &gram_runs);
  m.def("add_gram", [](uintptr_t x, uintptr_t y, uintptr_t total, int rows, int x_columns, int y_columns, bool upper,
                       int threads) {
    nb::gil_scoped_release release;
    add_gram(at<const uint16_t>(x), at<const uint16_t>(y), at<float>(total), rows, x_columns, y_columns, upper, threads);
  });
  bind_step(m);

  nb::class_<Weight>(m, "Weight")
      .def("__init__",
           [](Weight* self, int rows, int columns, int group_size, bool codebook, bool bytes) {
             if (rows < 1 || columns < 1 || group_size < 1) throw std::invalid_argument("a weight cannot be empty");
             new (self) Weight{Layout(rows, columns, codebook ? columns : group_size), codebook, bytes && !codebook};
           })
      .def_prop_ro("plane_bytes", [](const Weight& self) { return self.layout.plane_bytes; })
      .def("scales_bytes",
           [](const Weight& self, int bits) {
             check_bits(bits);
             return self.scales_bytes(bits);
           })
      .def("set_plane",
           [](Weight& self, int index, uintptr_t plane) {
             check_plane(index);
             self.planes[index] = at<const uint8_t>(plane);
           })
      .def("set_scales",
           [](Weight& self, int bits, uintptr_t scales) {
             check_bits(bits);
             self.scales[bits] = at<const void>(scales);
           })
      .def("pack_plane", &pack_plane)
      .def("unpack_plane", &unpack_plane)
      .def("pack_scales", &pack_scales_of)
      .def("unpack_scales", &unpack_scales_of)
      .def("decode", &run_decode)
      .def("decode_rows", &run_decode_rows);
}
