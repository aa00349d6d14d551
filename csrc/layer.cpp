// The short way through a call: a step of a small layer takes a few microseconds, and reading a dozen tensors in Python
// takes as long. Plain C functions for the same reason. What does not fit gets None, and goes the general way.
#include "layer.h"

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "tensors.h"

namespace rnnkern {
namespace {

// Results that are given to the caller, or to nobody.
struct Results {
  static constexpr int kCount = 4;
  PyObject* made[kCount] = {};
  ~Results() {
    for (PyObject* object : made) Py_XDECREF(object);
  }
  PyObject* release() {
    PyObject* tuple = PyTuple_New(kCount);
    if (!tuple) return nullptr;
    for (int i = 0; i < kCount; i++) {
      PyTuple_SET_ITEM(tuple, i, made[i] ? made[i] : Py_NewRef(Py_None));
      made[i] = nullptr;
    }
    return tuple;
  }
};

// Where segments begin and rows end, as every layer of a call meets it.
class Segments {
 public:
  // From tensor = {reset, reset_state h, c, lengths}, each of them or None; whether they fit the call. `rows` are the
  // first two sizes of the input: where it is batch first, both layouts are one in memory.
  bool open(PyObject* const* tensor, const Forward& f, const int64_t* rows, int64_t groups, DType wide) {
    View mask, ends;
    if (tensor[3] != Py_None) {
      if (!ends.open(tensor[3]) || !ends.is(kDLInt, 64, &f.B, 1)) return false;
      lengths_ = static_cast<const int64_t*>(ends.data());
      for (int64_t b = 0; b < f.B; b++)
        if (lengths_[b] < 0 || lengths_[b] > f.T) return false;
    }
    if (tensor[0] == Py_None) return tensor[1] == Py_None && tensor[2] == Py_None;
    if (!mask.open(tensor[0]) || !mask.is(kDLBool, 8, rows, 2)) return false;
    mask_ = static_cast<const uint8_t*>(mask.data());
    if (f.N > 1) both_directions(f);
    for (int k = 0; k < kStates; k++) {
      const int64_t width = k ? f.H : f.P;
      int64_t sizes[] = {groups, f.B, width};
      const DType dtype = k ? wide : f.dtype;
      if (!address(tensor[1 + k], dtype, sizes, 3, &state_[k])) {
        sizes[1] = 1;
        if (!address(tensor[1 + k], dtype, sizes, 3, &state_[k])) return false;
      }
      of_group_[k] = sizes[1] * width, of_row_[k] = sizes[1] > 1 ? width : 0;
      bytes_[k] = size_of(dtype);
    }
    return true;
  }

  // Of the groups from `first` on.
  void give(Forward& f, int64_t first) const {
    f.lengths = lengths_, f.reset = mask_;
    f.reset_s = both_.empty() ? 1 : f.N, f.reset_n = both_.empty() ? 0 : 1;
    for (int k = 0; k < kStates; k++) {
      if (state_[k]) f.reset_state[k] = static_cast<const char*>(state_[k]) + first * of_group_[k] * bytes_[k];
      f.reset_state_n[k] = of_group_[k], f.reset_state_b[k] = of_row_[k];
    }
  }

  // Rows past a length are nobody's step.
  void clear(void* rows, int64_t bytes) const {
    if (lengths_) std::memset(rows, 0, bytes);
  }

 private:
  // A boundary before step t of a row that goes on is met by the way back as it enters t - 1.
  void both_directions(const Forward& f) {
    both_.resize(f.S * 2);
    for (int64_t t = 0; t < f.T; t++)
      for (int64_t b = 0; b < f.B; b++) {
        const int64_t at = t * f.B + b;
        both_[at * 2] = mask_[at];
        both_[at * 2 + 1] = t + 1 < (lengths_ ? lengths_[b] : f.T) && mask_[at + f.B];
      }
    mask_ = both_.data();
  }

  const int64_t* lengths_ = nullptr;
  const uint8_t* mask_ = nullptr;
  std::vector<uint8_t> both_;        // [S, 2]
  static constexpr int kStates = 2;  // h and c; cells with more go the general way
  const void* state_[kStates] = {};
  int64_t of_group_[kStates] = {}, of_row_[kStates] = {}, bytes_[kStates] = {};
};

// stack(isa, cell, gates, H, P, threads, kind, layers, directions, bias, keep, x, h_0, c_0, reset, reset_h, reset_c,
// lengths, *weights) -> (y, h_n, c_n, states) or None. kind: 0 for a cell's step (x and states have no time and no
// layers; h_n is y, so None), 1 for layers, 2 for layers that are batch first. P is 0 without a projection. Weights are
// in torch's order, w_ih, w_hh, b_ih, b_hh, w_hr of every layer and direction. Absent states are None, and zero. c_n is
// None but for LSTM; every c is in the accumulation dtype. With `keep`, states is a tuple with (h,) or (h, c) of every
// layer, after every step, of which the last h is y.
PyObject* stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kNumbers = 10, kFirst = 1 + kNumbers + 7;
  if (count < kFirst) return PyErr_Format(PyExc_TypeError, "stack takes %d arguments or more, got %zd", kFirst, count);
  const char* isa = PyUnicode_AsUTF8(args[0]);
  long number[kNumbers];
  for (int i = 0; i < kNumbers; i++) number[i] = PyLong_AsLong(args[i + 1]);
  if (!isa || PyErr_Occurred()) return nullptr;
  PyObject* const* tensor = args + 1 + kNumbers;
  const int64_t layers = number[6], directions = number[7];
  const bool bias = number[8] != 0, keep = number[9] != 0, projected = number[3] != 0,
             two = Cell(number[0]) == Cell::lstm;
  const int64_t per = 2 + 2 * bias + projected;
  if (layers < 1 || directions < 1 || directions > 2 || count != kFirst + layers * directions * per) Py_RETURN_NONE;

  Forward f;
  f.cell = Cell(number[0]), f.N = directions, f.threads = int(number[4]);
  const int64_t rows = number[1] * number[2];
  const int kind = int(number[5]), ndim = kind ? 3 : 2;
  View x;
  if (!bound() || !x.open(tensor[0]) || x.ndim() != ndim || !x.dtype(&f.dtype)) Py_RETURN_NONE;
  f.T = kind ? x.size(kind == 2) : 1, f.B = x.size(kind == 1);
  if (kind == 2 && f.T != 1 && f.B != 1) Py_RETURN_NONE;
  const int64_t width = x.size(ndim - 1);
  f.S = f.T * f.B, f.H = number[2], f.P = projected ? number[3] : f.H;
  const DType wide = f.dtype == DType::f64 ? DType::f64 : DType::f32;
  // A state is [layers * directions, B, width], in a cell [B, width].
  const int64_t h_sizes[] = {layers * directions, f.B, f.P}, c_sizes[] = {layers * directions, f.B, f.H};
  const int64_t *h_shape = h_sizes + !kind, *c_shape = c_sizes + !kind;
  const void *h_0 = nullptr, *c_0 = nullptr;
  if (!address(tensor[1], f.dtype, h_shape, ndim, &h_0) || !address(tensor[2], wide, c_shape, ndim, &c_0))
    Py_RETURN_NONE;
  std::vector<Weights> all(layers * directions);
  for (int64_t k = 0; k < layers * directions; k++) {
    PyObject* const* own = tensor + 7 + k * per;
    const int64_t w_ih[] = {rows, k < directions ? width : directions * f.P}, w_hh[] = {rows, f.P}, w_hr[] = {f.P, f.H};
    all[k].reverse = k % directions != 0;
    if (!address(own[0], f.dtype, w_ih, 2, &all[k].w_ih) || !address(own[1], f.dtype, w_hh, 2, &all[k].w_hh))
      Py_RETURN_NONE;
    if (bias &&
        (!address(own[2], f.dtype, &rows, 1, &all[k].b_ih) || !address(own[3], f.dtype, &rows, 1, &all[k].b_hh)))
      Py_RETURN_NONE;
    if (projected && !address(own[per - 1], f.dtype, w_hr, 2, &all[k].w_hr)) Py_RETURN_NONE;
    if (!all[k].w_ih || !all[k].w_hh || bias != (all[k].b_ih && all[k].b_hh) || projected != (all[k].w_hr != nullptr))
      Py_RETURN_NONE;
  }

  const int64_t bytes = size_of(f.dtype), wide_bytes = size_of(wide);
  const int64_t y_sizes[] = {kind == 2 ? f.B : f.T, kind == 2 ? f.T : f.B, directions * f.P};
  Segments segments;
  if (!segments.open(tensor + 3, f, y_sizes, layers * directions, wide)) Py_RETURN_NONE;

  const int64_t seq_sizes[] = {y_sizes[0], y_sizes[1], directions * f.H};
  const int64_t y_bytes = f.S * directions * f.P * bytes, seq_bytes = f.S * directions * f.H * wide_bytes;
  Results results;
  PyObject *&y = results.made[0], *&h_n = results.made[1], *&c_n = results.made[2], *&states = results.made[3];
  void *last, *h_final = nullptr, *c_final = nullptr;
  if (!(y = fresh(tensor[0], y_sizes + !kind, ndim, false, &last))) return nullptr;
  if (kind && !(h_n = fresh(y, h_shape, ndim, false, &h_final))) return nullptr;
  if (two && !(c_n = fresh(h_n ? h_n : y, c_shape, ndim, wide != f.dtype, &c_final))) return nullptr;
  std::vector<void*> h_kept, c_kept;  // of every layer, to keep
  if (keep) {
    h_kept.assign(layers, last), c_kept.assign(layers, nullptr);
    if (!(states = PyTuple_New(layers))) return nullptr;
    for (int64_t k = 0; k < layers; k++) {
      PyObject* kept = PyTuple_New(1 + two);
      if (!kept) return nullptr;
      PyTuple_SET_ITEM(states, k, kept);
      PyObject* h = k == layers - 1 ? Py_NewRef(y) : fresh(y, y_sizes, ndim, false, &h_kept[k]);
      if (!h) return nullptr;
      PyTuple_SET_ITEM(kept, 0, h);
      if (!two) continue;
      PyObject* c = fresh(y, seq_sizes, ndim, wide != f.dtype, &c_kept[k]);
      if (!c) return nullptr;
      PyTuple_SET_ITEM(kept, 1, c);
    }
  }
  PyThreadState* released = nullptr;
  try {
    const Kernels& kernels = choose_kernels(isa);
    // Outputs of the layers below the last, each of which is read by the next.
    std::unique_ptr<char[]> between[2];
    for (int64_t k = 0; !keep && k < layers - 1 && k < 2; k++) between[k].reset(new char[y_bytes]);
    if (layers * directions * f.S * rows * (width + f.P) > kLong) released = PyEval_SaveThread();
    for (int64_t k = 0; k < layers; k++) {
      const int64_t done = k * directions * f.B;
      f.weights = all.data() + k * directions;
      f.x = k ? f.y : x.data(), f.I = f.x_s = f.x_m = k ? directions * f.P : width;
      f.y = keep ? h_kept[k] : k == layers - 1 ? last : between[k % 2].get();
      if (keep) f.seq[1] = c_kept[k];
      segments.clear(f.y, y_bytes);
      if (f.seq[1]) segments.clear(f.seq[1], seq_bytes);
      segments.give(f, k * directions);
      f.state[0] = h_0 ? static_cast<const char*>(h_0) + done * f.P * bytes : nullptr;
      f.state[1] = c_0 ? static_cast<const char*>(c_0) + done * f.H * wide_bytes : nullptr;
      f.final_state[0] = h_final ? static_cast<char*>(h_final) + done * f.P * bytes : nullptr;
      f.final_state[1] = c_final ? static_cast<char*>(c_final) + done * f.H * wide_bytes : nullptr;
      kernels.forward(f);
    }
    if (released) PyEval_RestoreThread(released);
  } catch (const std::bad_alloc&) {
    if (released) PyEval_RestoreThread(released);
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    if (released) PyEval_RestoreThread(released);
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  return results.release();
}

}  // namespace

PyMethodDef kLayerMethods[] = {fast<bind>("bind"), fast<stack>("stack"), {nullptr, nullptr, 0, nullptr}};

}  // namespace rnnkern
