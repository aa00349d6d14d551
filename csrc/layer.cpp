// The short way through a call: a step of a small layer takes a few microseconds, and reading a dozen tensors in Python
// takes as long. Plain C functions for the same reason. What does not fit gets None, and goes the general way.
#include "layer.h"

#include <exception>

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

// layer(isa, cell, gates, H, P, threads, kind, x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0) -> (y, h_n, c_n) or None.
// kind: 0 for a cell's step (x and states have no time and no layers; h_n is y, so None), 1 for a layer, 2 for one that
// is batch first. P is 0 without a projection. Absent tensors are None; absent states are zero. c_n is None but for
// LSTM; c_0 and c_n are in the accumulation dtype.
PyObject* layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kNumbers = 6;
  if (count != 15) return PyErr_Format(PyExc_TypeError, "layer takes 15 arguments, got %zd", count);
  const char* isa = PyUnicode_AsUTF8(args[0]);
  long number[kNumbers];
  for (int i = 0; i < kNumbers; i++) number[i] = PyLong_AsLong(args[i + 1]);
  if (!isa || PyErr_Occurred()) return nullptr;
  PyObject* const* tensor = args + 1 + kNumbers;

  Weights w;
  Forward f;
  f.cell = Cell(number[0]), f.N = 1, f.weights = &w, f.threads = int(number[4]);
  int64_t rows = number[1] * number[2];
  int kind = int(number[5]), ndim = kind ? 3 : 2;
  bool two = f.cell == Cell::lstm, projected = number[3] != 0;
  View x;
  if (!bound() || !x.open(tensor[0]) || x.ndim() != ndim || !x.dtype(&f.dtype)) Py_RETURN_NONE;
  f.x = x.data();
  f.T = kind ? x.size(kind == 2) : 1, f.B = x.size(kind == 1), f.I = x.size(ndim - 1);
  if (kind == 2 && f.T != 1 && f.B != 1) Py_RETURN_NONE;
  f.S = f.T * f.B, f.H = number[2], f.P = projected ? number[3] : f.H, f.x_s = f.x_m = f.I;
  bool narrow = f.dtype == DType::bf16 || f.dtype == DType::f16;
  // A state is [1, B, width], in a cell [B, width].
  const int64_t w_ih[] = {rows, f.I}, w_hh[] = {rows, f.P}, w_hr[] = {f.P, f.H}, h_sizes[] = {1, f.B, f.P},
                c_sizes[] = {1, f.B, f.H};
  const int64_t *h_shape = h_sizes + !kind, *c_shape = c_sizes + !kind;
  if (!address(tensor[1], f.dtype, w_ih, 2, &w.w_ih) || !address(tensor[2], f.dtype, w_hh, 2, &w.w_hh) ||
      !address(tensor[3], f.dtype, &rows, 1, &w.b_ih) || !address(tensor[4], f.dtype, &rows, 1, &w.b_hh) ||
      !address(tensor[5], f.dtype, w_hr, 2, &w.w_hr) || !address(tensor[6], f.dtype, h_shape, ndim, &f.state[0]) ||
      !address(tensor[7], narrow ? DType::f32 : f.dtype, c_shape, ndim, &f.state[1]))
    Py_RETURN_NONE;
  if (!w.w_ih || !w.w_hh || projected != (w.w_hr != nullptr)) Py_RETURN_NONE;

  const int64_t y_sizes[] = {kind == 2 ? f.B : f.T, kind == 2 ? f.T : f.B, f.P};
  Results results;
  PyObject *&y = results.made[0], *&h_n = results.made[1], *&c_n = results.made[2];
  if (!(y = fresh(tensor[0], y_sizes + !kind, ndim, false, &f.y))) return nullptr;
  if (kind && !(h_n = fresh(y, h_shape, ndim, false, &f.final_state[0]))) return nullptr;
  if (two && !(c_n = fresh(h_n ? h_n : y, c_shape, ndim, narrow, &f.final_state[1]))) return nullptr;
  PyThreadState* released = nullptr;
  try {
    const Kernels& k = choose_kernels(isa);
    if (f.S * rows * (f.I + f.P) > kLong) released = PyEval_SaveThread();
    k.forward(f);
    if (released) PyEval_RestoreThread(released);
  } catch (const std::exception& error) {
    if (released) PyEval_RestoreThread(released);
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  return results.release();
}

}  // namespace

PyMethodDef kLayerMethods[] = {fast<bind>("bind"), fast<layer>("layer"), {nullptr, nullptr, 0, nullptr}};

}  // namespace rnnkern
