// Tensors looked at and made from C, at a tenth of what asking them in Python costs.
#pragma once
#include <Python.h>

#include "api.h"
#include "exchange.h"

namespace rnnkern {

// bind(table, Tensor, Parameter, empty_like, float32): whether this torch's table is one that is understood here.
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count);
bool bound();

// A contiguous CPU tensor of torch's own type, whose numbers are what lies in memory: not one that is negated when
// read. One left over from a transform has no memory, and the exchange refuses it.
class View {
 public:
  bool look(PyObject* object);  // any tensor, for one that was made here
  bool open(PyObject* object);

  int ndim() const { return t_.ndim; }
  int64_t size(int i) const { return t_.shape[i]; }
  void* data() const { return static_cast<char*>(t_.data) + t_.byte_offset; }
  bool dtype(DType* type) const;
  bool is(DType wanted, const int64_t* sizes, int ndim) const;
  bool is(uint8_t code, int bits, const int64_t* sizes, int ndim) const;

 private:
  DLTensor t_;
};

// Whether `object` is absent or a tensor of these sizes and this dtype; its address then.
bool address(PyObject* object, DType dtype, const int64_t* sizes, int ndim, const void** data);

// Multiplications in a call that takes 20 us and more, beside which handing the interpreter's lock over is small.
constexpr int64_t kLong = 1000 * 1000;

// A new tensor of these sizes, of `like`'s dtype or the accumulation dtype.
PyObject* fresh(PyObject* like, const int64_t* sizes, int ndim, bool accumulate, void** data);

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef fast(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace rnnkern
