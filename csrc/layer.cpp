// The short way through a call: a step of a small layer takes a few microseconds, and reading a dozen tensors in Python
// takes as long. Plain C functions for the same reason. What does not fit gets None, and goes the general way.
#include "layer.h"

#include <exception>

#include "api.h"
#include "exchange.h"

namespace rnnkern {
namespace {

// What `bind` was given, kept for good.
struct {
  const DLExchange* exchange = nullptr;
  PyObject *tensor, *parameter, *empty_like, *acc_dtype, *is_neg, *new_empty, *dtype_name;
} torch;

// bind(table, Tensor, Parameter, empty_like, float32): whether this torch's table is one that is understood here.
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "bind takes 5 arguments, got %zd", count);
  const void* table = PyCapsule_GetPointer(args[0], DLExchange::kName);
  if (!table) return nullptr;
  const DLExchange* exchange = static_cast<const DLExchange*>(table);
  while (exchange && exchange->version.major != DLExchange::kMajor) exchange = exchange->older;
  if (!exchange || !exchange->view) Py_RETURN_FALSE;
  PyObject** kept[] = {&torch.tensor, &torch.parameter, &torch.empty_like, &torch.acc_dtype};
  for (int i = 0; i < 4; i++) {
    Py_INCREF(args[i + 1]);
    *kept[i] = args[i + 1];
  }
  torch.is_neg = PyUnicode_InternFromString("is_neg");
  torch.new_empty = PyUnicode_InternFromString("new_empty");
  torch.dtype_name = PyTuple_Pack(1, PyUnicode_InternFromString("dtype"));
  torch.exchange = exchange;
  Py_RETURN_TRUE;
}

bool answers_true(PyObject* answer) {
  bool yes = answer != Py_False;  // an error too: then this is no plain tensor
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return yes;
}

// A contiguous CPU tensor of torch's own type, whose numbers are what lies in memory: not one that is negated when
// read. One left over from a transform has no memory, and the exchange refuses it.
class View {
 public:
  // Any tensor, for one that was made here.
  bool look(PyObject* object) { return torch.exchange->view(object, &t_) == 0; }

  bool open(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch.tensor && type != torch.parameter) return false;
    if (answers_true(PyObject_CallMethodNoArgs(object, torch.is_neg))) return false;
    if (!look(object)) {
      PyErr_Clear();
      return false;
    }
    if (!t_.data || t_.device_type != kDLCpu || t_.lanes != 1) return false;  // no data: a tensor that stands for zeros
    int64_t stride = 1;
    for (int i = t_.ndim - 1; i >= 0; i--) {
      if (t_.strides && t_.shape[i] != 1 && t_.strides[i] != stride) return false;
      stride *= t_.shape[i];
    }
    return stride > 0;
  }

  int ndim() const { return t_.ndim; }
  int64_t size(int i) const { return t_.shape[i]; }
  void* data() const { return static_cast<char*>(t_.data) + t_.byte_offset; }

  bool dtype(DType* type) const {
    if (t_.code == kDLBfloat && t_.bits == 16) return *type = DType::bf16, true;
    if (t_.code != kDLFloat) return false;
    switch (t_.bits) {
      case 64:
        return *type = DType::f64, true;
      case 32:
        return *type = DType::f32, true;
      case 16:
        return *type = DType::f16, true;
    }
    return false;
  }

  bool is(DType wanted, const int64_t* sizes, int ndim) const {
    DType own;
    if (t_.ndim != ndim || !dtype(&own) || own != wanted) return false;
    for (int i = 0; i < ndim; i++)
      if (t_.shape[i] != sizes[i]) return false;
    return true;
  }

 private:
  DLTensor t_;
};

// Whether `object` is absent or a tensor of these sizes and this dtype; its address then.
bool address(PyObject* object, DType dtype, const int64_t* sizes, int ndim, const void** data) {
  if (object == Py_None) return true;
  View view;
  if (!view.open(object) || !view.is(dtype, sizes, ndim)) return false;
  *data = view.data();
  return true;
}

// A new tensor of these sizes, of `like`'s dtype or the accumulation dtype; empty_like costs half of what new_empty
// does.
PyObject* fresh(PyObject* like, const int64_t* sizes, int ndim, bool accumulate, void** data) {
  View view;
  if (!view.look(like)) return nullptr;
  bool same = view.ndim() == ndim;
  for (int i = 0; same && i < ndim; i++) same = view.size(i) == sizes[i];
  PyObject *made = nullptr, *names = accumulate ? torch.dtype_name : nullptr;
  if (same) {
    PyObject* args[] = {like, torch.acc_dtype};
    made = PyObject_Vectorcall(torch.empty_like, args, 1, names);
  } else {
    PyObject* shape = PyTuple_New(ndim);
    for (int i = 0; shape && i < ndim; i++) PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(sizes[i]));
    PyObject* args[] = {like, shape, torch.acc_dtype};
    if (shape) made = PyObject_VectorcallMethod(torch.new_empty, args, 2, names);
    Py_XDECREF(shape);
  }
  if (made && !view.look(made)) Py_CLEAR(made);
  if (made) *data = view.data();
  return made;
}

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
  if (!torch.exchange || !x.open(tensor[0]) || x.ndim() != ndim || !x.dtype(&f.dtype)) Py_RETURN_NONE;
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
    released = PyEval_SaveThread();
    k.forward(f);
    PyEval_RestoreThread(released);
  } catch (const std::exception& error) {
    if (released) PyEval_RestoreThread(released);
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  return results.release();
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef fast(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef kLayerMethods[] = {fast<bind>("bind"), fast<layer>("layer"), {nullptr, nullptr, 0, nullptr}};

}  // namespace rnnkern
