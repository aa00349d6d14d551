// The short way through a call: a step of a small layer takes a few microseconds, and reading a dozen tensors in Python
// takes as long. Plain C functions for the same reason. What does not fit gets None, and goes the general way.
#include "layer.h"

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
  PyObject* made[3] = {};
  ~Results() {
    for (PyObject* object : made) Py_XDECREF(object);
  }
  PyObject* release() {
    PyObject* tuple = PyTuple_New(3);
    if (!tuple) return nullptr;
    for (int i = 0; i < 3; i++) {
      PyTuple_SET_ITEM(tuple, i, made[i] ? made[i] : Py_NewRef(Py_None));
      made[i] = nullptr;
    }
    return tuple;
  }
};

// stack(isa, cell, gates, H, P, threads, kind, layers, directions, bias, x, h_0, c_0, *weights) -> (y, h_n, c_n) or
// None. kind: 0 for a cell's step (x and states have no time and no layers; h_n is y, so None), 1 for layers, 2 for
// layers that are batch first. P is 0 without a projection. Weights are in torch's order, w_ih, w_hh, b_ih, b_hh, w_hr
// of every layer and direction. Absent states are None, and zero. c_n is None but for LSTM; c_0 and c_n are in the
// accumulation dtype.
PyObject* stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kNumbers = 9, kFirst = 1 + kNumbers + 3;
  if (count < kFirst) return PyErr_Format(PyExc_TypeError, "stack takes %d arguments or more, got %zd", kFirst, count);
  const char* isa = PyUnicode_AsUTF8(args[0]);
  long number[kNumbers];
  for (int i = 0; i < kNumbers; i++) number[i] = PyLong_AsLong(args[i + 1]);
  if (!isa || PyErr_Occurred()) return nullptr;
  PyObject* const* tensor = args + 1 + kNumbers;
  const int64_t layers = number[6], directions = number[7];
  const bool bias = number[8] != 0, projected = number[3] != 0, two = Cell(number[0]) == Cell::lstm;
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
    PyObject* const* own = tensor + 3 + k * per;
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

  const int64_t y_sizes[] = {kind == 2 ? f.B : f.T, kind == 2 ? f.T : f.B, directions * f.P};
  Results results;
  PyObject *&y = results.made[0], *&h_n = results.made[1], *&c_n = results.made[2];
  void *last, *h_final = nullptr, *c_final = nullptr;
  if (!(y = fresh(tensor[0], y_sizes + !kind, ndim, false, &last))) return nullptr;
  if (kind && !(h_n = fresh(y, h_shape, ndim, false, &h_final))) return nullptr;
  if (two && !(c_n = fresh(h_n ? h_n : y, c_shape, ndim, wide != f.dtype, &c_final))) return nullptr;
  const int64_t bytes = f.dtype == DType::f64   ? 8
                        : f.dtype == DType::f32 ? 4
                                                : 2,
                wide_bytes = wide == f.dtype ? bytes : 4;
  PyThreadState* released = nullptr;
  try {
    const Kernels& kernels = choose_kernels(isa);
    // Outputs of the layers below the last, each of which is read by the next.
    std::unique_ptr<char[]> between[2];
    for (int64_t k = 0; k < layers - 1 && k < 2; k++) between[k].reset(new char[f.S * directions * f.P * bytes]);
    if (layers * directions * f.S * rows * (width + f.P) > kLong) released = PyEval_SaveThread();
    for (int64_t k = 0; k < layers; k++) {
      const int64_t done = k * directions * f.B;
      f.weights = all.data() + k * directions;
      f.x = k ? f.y : x.data(), f.I = f.x_s = f.x_m = k ? directions * f.P : width;
      f.y = k == layers - 1 ? last : between[k % 2].get();
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
