// The native side of rnnkern.Stream.
#pragma once
#include <Python.h>

namespace rnnkern {
// The type `Stream`, a new reference, or null with an exception set.
PyObject* stream_type();
}  // namespace rnnkern
