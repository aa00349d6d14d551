// Dense layers, from tensors to tensors: the short way of rnnkern/_fast.py.
#pragma once
#include <Python.h>

namespace rnnkern {
extern PyMethodDef kLayerMethods[];  // `bind` and `stack`, null-terminated
}
