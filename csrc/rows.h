// Rows of a padded batch, moved together and back: rnnkern/_packing.py.
#pragma once
#include <Python.h>

namespace rnnkern {
extern PyMethodDef kRowMethods[];  // `plan_rows` and `move_rows`, null-terminated
}
