// The Python module: turns numbers and tuples into the structs of api.h. Beside layer.cpp, rows.cpp, stream.cpp and
// tensors.cpp the only file that sees Python.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "layer.h"
#include "rows.h"
#include "stream.h"

namespace py = pybind11;

namespace rnnkern {
namespace {

const void* pointer(py::handle number) { return PyLong_AsVoidPtr(number.ptr()); }

// Those of a tuple, one after the other.
struct Addresses {
  const py::tuple& all;
  size_t at = 0;
  void* next() { return const_cast<void*>(pointer(all[at++])); }
};

int64_t integer(py::handle number) { return PyLong_AsLongLong(number.ptr()); }

const Kernels& kernels(const std::string& isa) { return choose_kernels(isa.c_str()); }

// Every row that a step will touch must lie in [0, S): a wrong length is an exception, never a wild access.
void check_rows(const Scan& s) {
  if (!s.lengths) {
    if (s.offsets) throw std::invalid_argument("offsets without lengths");
    if (s.S != s.T * s.B) throw std::invalid_argument("expected T*B rows, got " + std::to_string(s.S));
    return;
  }
  std::vector<int64_t> last(s.T + 1, 0);  // one past the highest batch row alive at each step
  for (int64_t b = 0; b < s.B; b++) {
    int64_t length = s.lengths[b];
    if (length < 0 || length > s.T)
      throw std::invalid_argument("lengths must lie in [0, " + std::to_string(s.T) + "], got " +
                                  std::to_string(length));
    if (length > 0) last[length - 1] = b + 1;
  }
  for (int64_t t = s.T - 1; t >= 0; t--) {
    if (last[t + 1] > last[t]) last[t] = last[t + 1];
    int64_t offset = s.offsets ? s.offsets[t] : t * s.B;
    if (last[t] && (offset < 0 || offset > s.S - last[t]))
      throw std::invalid_argument("step " + std::to_string(t) + " reaches beyond the " + std::to_string(s.S) +
                                  " rows given");
  }
}

// What both directions are given: sizes (T, B, S, N, I, H, P, models, threads, elements between rows of planes and of
// the product), layout (offsets, lengths, reset, its two strides), reset_states (pointer and two strides each), options
// (none, or the masks h, h_step and candidate with the scale of each, zoneout of h and c, the shares of both,
// cell_clip, proj_clip, grad_clip, eps, and, where any group has them, kSmalls for each), weights (w_hh, b_hh, w_hr,
// w_ih, b_ih, reverse for each group).
struct Common {
  std::vector<Weights> weights;
  Options options;
  std::vector<const void*> small;

  void fill(Scan& s, int cell, int dtype, const py::tuple& sizes, const py::tuple& layout,
            const py::tuple& reset_states, const py::tuple& given, const py::tuple& groups, const py::tuple& states) {
    s.cell = Cell(cell);
    s.dtype = DType(dtype);
    int64_t* size[] = {&s.T, &s.B, &s.S, &s.N, &s.I, &s.H, &s.P, &s.models};
    for (int i = 0; i < 8; i++) *size[i] = integer(sizes[i]);
    s.threads = int(integer(sizes[8]));
    s.planes_s = integer(sizes[9]);
    s.product_s = integer(sizes[10]);
    s.offsets = static_cast<const int64_t*>(pointer(layout[0]));
    s.lengths = static_cast<const int64_t*>(pointer(layout[1]));
    s.reset = static_cast<const uint8_t*>(pointer(layout[2]));
    s.reset_s = integer(layout[3]);
    s.reset_n = integer(layout[4]);
    for (size_t k = 0; 3 * k < reset_states.size(); k++) {
      s.reset_state[k] = pointer(reset_states[3 * k]);
      s.reset_state_n[k] = integer(reset_states[3 * k + 1]);
      s.reset_state_b[k] = integer(reset_states[3 * k + 2]);
    }
    if (given.size()) {
      Options& o = options;
      auto bytes = [&](int k) { return static_cast<const uint8_t*>(pointer(given[k])); };
      auto number = [&](int k) { return PyFloat_AsDouble(given[k].ptr()); };
      o.h = {bytes(0), number(1)};
      o.h_step = {bytes(2), number(3)};
      o.candidate = {bytes(4), number(5)};
      o.zoneout[0] = bytes(6);
      o.zoneout[1] = bytes(7);
      o.share[0] = number(8);
      o.share[1] = number(9);
      o.cell_clip = number(10);
      o.proj_clip = number(11);
      o.grad_clip = number(12);
      o.eps = number(13);
      for (size_t k = 14; k < given.size(); k++) small.push_back(pointer(given[k]));
      if (!small.empty()) o.small = small.data();
      s.options = &options;
    }
    weights.resize(s.N);
    for (int64_t g = 0; g < s.N; g++) {
      Weights& w = weights[g];
      const void** part[] = {&w.w_hh, &w.b_hh, &w.w_hr, &w.w_ih, &w.b_ih};
      for (int i = 0; i < 5; i++) *part[i] = pointer(groups[6 * g + i]);
      w.reverse = integer(groups[6 * g + 5]) != 0;
    }
    s.weights = weights.data();
    for (size_t k = 0; k < states.size(); k++) s.state[k] = pointer(states[k]);
    if (PyErr_Occurred()) throw py::error_already_set();
    check_rows(s);
  }
};

void forward(const std::string& isa, int cell, int dtype, const py::tuple& sizes, const py::tuple& layout,
             const py::tuple& reset_states, const py::tuple& options, const py::tuple& groups, const py::tuple& states,
             const py::tuple& input, const py::tuple& outputs) {
  Forward f;
  Common common;
  common.fill(f, cell, dtype, sizes, layout, reset_states, options, groups, states);
  f.gx = pointer(input[0]);
  f.gx_s = integer(input[1]);
  f.gx_n = integer(input[2]);
  f.x = pointer(input[3]);
  f.x_s = integer(input[4]);
  f.x_m = integer(input[5]);
  Addresses out{outputs};
  for (void** to : {&f.y, &f.planes, &f.product, &f.hidden}) *to = out.next();
  for (size_t k = 0; k < states.size(); k++) f.final_state[k] = out.next();
  for (size_t k = 1; k < states.size(); k++) f.seq[k] = out.next();
  if (PyErr_Occurred()) throw py::error_already_set();
  const Kernels& k = kernels(isa);
  py::gil_scoped_release nogil;
  k.forward(f);
}

void backward(const std::string& isa, int cell, int dtype, const py::tuple& sizes, const py::tuple& layout,
              const py::tuple& reset_states, const py::tuple& options, const py::tuple& groups, const py::tuple& states,
              const py::tuple& saved, const py::tuple& grads, const py::tuple& outputs) {
  Backward f;
  Common common;
  common.fill(f, cell, dtype, sizes, layout, reset_states, options, groups, states);
  const size_t count = states.size();
  Addresses from{saved}, out{outputs};
  for (const void** to : {&f.y, &f.planes, &f.product, &f.projected}) *to = from.next();
  for (size_t k = 1; k < count; k++) f.seq[k] = from.next();
  f.dy = pointer(grads[0]);
  f.dy_s = integer(grads[1]);
  f.dy_n = integer(grads[2]);
  Addresses above{grads, 3};
  for (size_t k = 0; k < count; k++) f.dfinal[k] = above.next();
  for (size_t k = 1; k < count; k++) f.dseq[k] = above.next();
  for (void** to : {&f.dgx, &f.dgh, &f.dproduct, &f.dh}) *to = out.next();
  for (size_t k = 0; k < count; k++) f.dstate[k] = out.next();
  for (size_t k = 0; k < count; k++) f.dreset_state[k] = out.next();
  std::vector<void*> dsmall;
  while (out.at < outputs.size()) dsmall.push_back(out.next());
  if (!dsmall.empty()) f.dsmall = dsmall.data();
  if (PyErr_Occurred()) throw py::error_already_set();
  const Kernels& k = kernels(isa);
  py::gil_scoped_release nogil;
  k.backward(f);
}

void gemm(const std::string& isa, int dtype, int64_t M, int64_t N, int64_t K, py::int_ a, int64_t a_m, int64_t a_k,
          py::int_ b, int64_t b_k, py::int_ out, int64_t out_m, bool add, int threads) {
  const Kernels& k = kernels(isa);
  if (!k.gemm) throw std::invalid_argument(std::string("no products of matrices with ") + k.name);
  Gemm g{DType(dtype), M,   N,   K,     pointer(a), pointer(b), const_cast<void*>(pointer(out)),
         a_m,          a_k, b_k, out_m, add,        threads};
  if (PyErr_Occurred()) throw py::error_already_set();
  py::gil_scoped_release nogil;
  k.gemm(g);
}

// h as it enters each row of a dense or packed batch: that after the step before in the walk's direction, or h0; zero
// where `reset` says so, which may be null. Rows of so many bytes; strides in bytes, those of `to` are the rows.
void entering(const py::tuple& rows, const py::tuple& layout, int64_t bytes, bool reverse) {
  char* to = static_cast<char*>(const_cast<void*>(pointer(rows[0])));
  const char *y = static_cast<const char*>(pointer(rows[1])), *h0 = static_cast<const char*>(pointer(rows[3]));
  const int64_t y_s = integer(rows[2]), h0_b = integer(rows[4]);
  Scan s;
  s.T = integer(layout[0]), s.B = integer(layout[1]), s.S = integer(layout[2]);
  s.offsets = static_cast<const int64_t*>(pointer(layout[3]));
  s.lengths = static_cast<const int64_t*>(pointer(layout[4]));
  s.reset = static_cast<const uint8_t*>(pointer(layout[5])), s.reset_s = integer(layout[6]);
  if (PyErr_Occurred()) throw py::error_already_set();
  check_rows(s);
  py::gil_scoped_release nogil;
  auto copy = [&](int64_t row, const char* from, int64_t stride, int64_t count) {
    if (stride == bytes) {
      std::memcpy(to + row * bytes, from, count * bytes);
    } else {
      for (int64_t i = 0; i < count; i++) std::memcpy(to + (row + i) * bytes, from + i * stride, bytes);
    }
  };
  auto first = [&](int64_t t) { return s.offsets ? s.offsets[t] : t * s.B; };
  int64_t alive = s.B;
  for (int64_t t = 0; t < s.T; t++) {
    while (s.lengths && alive && s.lengths[alive - 1] <= t) alive--;
    int64_t with = alive;  // those that the step before in the walk's direction has too
    if (reverse ? t + 1 == s.T : t == 0) with = 0;
    while (reverse && s.lengths && with && s.lengths[with - 1] <= t + 1) with--;
    if (with) copy(first(t), y + first(reverse ? t + 1 : t - 1) * y_s, y_s, with);
    if (with < alive) copy(first(t) + with, h0 + with * h0_b, h0_b, alive - with);
    for (int64_t i = first(t); s.reset && i < first(t) + alive; i++)
      if (s.reset[i * s.reset_s]) std::memset(to + i * bytes, 0, bytes);
  }
}

}  // namespace
}  // namespace rnnkern

PYBIND11_MODULE(_cpu, m) {
  using namespace rnnkern;
  m.doc() = "rnnkern's C++ scans. Takes addresses and sizes; rnnkern.backends.cpp checks them.";
  m.def("forward", &forward);
  for (PyMethodDef* methods : {kLayerMethods, kRowMethods})
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("backward", &backward);
  m.def("entering", &entering);
  m.def("gemm", &gemm);
  m.def(
      "gemm_pays", [](const std::string& isa) { return gemm_pays(kernels(isa)); },
      "Whether matrix products of this instruction set are faster here than torch's.");
  py::object stream = py::reinterpret_steal<py::object>(stream_type());
  if (!stream) throw py::error_already_set();
  m.attr("Stream") = stream;
  m.def(
      "chosen", [](const std::string& requested) { return std::string(kernels(requested).name); },
      "Name of the instruction set that a request ('' for the best) takes; raises with the reason where it cannot.");
  m.def("isas", [] {
    py::list names;
    for (const char* const* name = known_isas(); *name; name++) names.append(*name);
    return names;
  });
}
