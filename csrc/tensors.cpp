#include "tensors.h"

namespace rnnkern {
namespace {

// What `bind` was given, kept for good.
struct {
  const DLExchange* exchange = nullptr;
  PyObject *tensor, *parameter, *empty_like, *acc_dtype, *is_neg, *new_empty, *dtype_name;
} torch;

bool answers_true(PyObject* answer) {
  bool yes = answer != Py_False;  // an error too: then this is no plain tensor
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return yes;
}

}  // namespace

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

bool bound() { return torch.exchange != nullptr; }

bool View::look(PyObject* object) { return torch.exchange->view(object, &t_) == 0; }

bool View::open(PyObject* object) {
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

bool View::dtype(DType* type) const {
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

bool View::is(DType wanted, const int64_t* sizes, int ndim) const {
  DType own;
  return dtype(&own) && own == wanted && is(t_.code, t_.bits, sizes, ndim);
}

bool View::is(uint8_t code, int bits, const int64_t* sizes, int ndim) const {
  if (t_.ndim != ndim || t_.code != code || t_.bits != bits) return false;
  for (int i = 0; i < ndim; i++)
    if (t_.shape[i] != sizes[i]) return false;
  return true;
}

bool address(PyObject* object, DType dtype, const int64_t* sizes, int ndim, const void** data) {
  if (object == Py_None) return true;
  View view;
  if (!view.open(object) || !view.is(dtype, sizes, ndim)) return false;
  *data = view.data();
  return true;
}

// empty_like costs half of what new_empty does.
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
  if (made && reinterpret_cast<PyObject*>(Py_TYPE(made)) != torch.tensor) {
    PyErr_Format(PyExc_TypeError, "a mode makes %s of new tensors, which have no numbers to write",
                 Py_TYPE(made)->tp_name);
    Py_CLEAR(made);
  }
  if (made && !view.look(made)) Py_CLEAR(made);
  if (made) *data = view.data();
  return made;
}

}  // namespace rnnkern
