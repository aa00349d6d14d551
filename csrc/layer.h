// One dense layer in one direction, from tensors to tensors: the short way of rnnkern/_fast.py.
#pragma once
#include <Python.h>

namespace rnnkern {
extern PyMethodDef kLayerMethods[];  // `bind` and `layer`, null-terminated
}
