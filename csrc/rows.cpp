#include "rows.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "api.h"
#include "tensors.h"
#include "threads.h"

namespace rnnkern {
namespace {

constexpr int64_t kShare = 256 << 10;  // bytes for a thread of its own
constexpr int64_t kAhead = 2048;       // bytes fetched before they are moved

struct Moving {
  const char* from;
  char* to;
  const int64_t* index;
  int64_t rows, bytes;
  int threads;
};

void move_share(void* context, int rank) {
  const Moving& m = *static_cast<Moving*>(context);
  const int64_t end = m.rows * (rank + 1) / m.threads, ahead = kAhead / (m.bytes + 1) + 1;
  for (int64_t i = m.rows * rank / m.threads; i < end; i++) {
    if (i + ahead < end && m.index[i + ahead] >= 0)
      for (int64_t k = 0; k < m.bytes; k += 64) __builtin_prefetch(m.from + m.index[i + ahead] * m.bytes + k);
    if (m.index[i] < 0)
      std::memset(m.to + i * m.bytes, 0, m.bytes);
    else
      std::memcpy(m.to + i * m.bytes, m.from + m.index[i] * m.bytes, m.bytes);
  }
}

// move_rows(x [R, W], index [S], threads) -> [S, W]: row index[i] of x, and zeros where that is negative. None where
// these are not plain tensors.
PyObject* move_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "move_rows takes 3 arguments, got %zd", count);
  View x, index;
  DType dtype;
  if (!bound() || !x.open(args[0]) || x.ndim() != 2 || !x.dtype(&dtype)) Py_RETURN_NONE;
  if (!index.open(args[1]) || index.ndim() != 1) Py_RETURN_NONE;
  const int64_t sizes[] = {index.size(0), x.size(1)};
  if (!index.is(kDLInt, 64, sizes, 1)) Py_RETURN_NONE;
  const int64_t* from = static_cast<const int64_t*>(index.data());
  for (int64_t i = 0; i < sizes[0]; i++)
    if (from[i] >= x.size(0)) return PyErr_Format(PyExc_IndexError, "row %lld of %lld", from[i], x.size(0));
  int64_t threads = PyLong_AsLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  void* to;
  PyObject* made = fresh(args[0], sizes, 2, false, &to);
  if (!made) return nullptr;
  Moving m{static_cast<char*>(x.data()), static_cast<char*>(to), from, sizes[0], sizes[1] * size_of(dtype), 1};
  const int64_t most = m.rows * m.bytes / kShare;
  m.threads = int(threads < most ? threads : most < 1 ? 1 : most);
  PyThreadState* released = m.rows * m.bytes > kShare ? PyEval_SaveThread() : nullptr;
  if (!run_parallel(m.threads, move_share, &m)) m.threads = 1, move_share(&m, 0);
  if (released) PyEval_RestoreThread(released);
  return made;
}

// plan_rows(lengths [B], T, batch_first) -> (order [B], back [B], sorted [B], offsets [steps], rows [S], inverse
// [T*B]): the batch from the longest on, its lengths so, the first row of every step in a packed batch, for each packed
// row that of the padded batch it is, and for each of these its packed row, -1 where there is none. None where
// `lengths` is not a plain tensor or one of them is not in [0, T].
PyObject* plan_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "plan_rows takes 3 arguments, got %zd", count);
  View view;
  if (!bound() || !view.open(args[0]) || view.ndim() != 1) Py_RETURN_NONE;
  const int64_t B = view.size(0), T = PyLong_AsLongLong(args[1]);
  const int batch_first = PyObject_IsTrue(args[2]);
  if (PyErr_Occurred()) return nullptr;
  if (!view.is(kDLInt, 64, &B, 1)) Py_RETURN_NONE;
  const int64_t* lengths = static_cast<const int64_t*>(view.data());
  std::vector<int64_t> alive(T + 1, 0);  // by length, then from it on
  int64_t steps = 0, S = 0;
  for (int64_t b = 0; b < B; b++) {
    if (lengths[b] < 0 || lengths[b] > T) Py_RETURN_NONE;
    alive[lengths[b]]++;
    steps = lengths[b] > steps ? lengths[b] : steps;
    S += lengths[b];
  }
  for (int64_t t = T - 1; t >= 0; t--) alive[t] += alive[t + 1];

  const int64_t sizes[] = {B, B, B, steps, S, T * B};
  PyObject* found = PyTuple_New(6);
  int64_t* to[6];
  for (int i = 0; found && i < 6; i++) {
    void* data;
    PyObject* made = fresh(args[0], sizes + i, 1, false, &data);
    if (!made) {
      Py_CLEAR(found);
      break;
    }
    PyTuple_SET_ITEM(found, i, made);
    to[i] = static_cast<int64_t*>(data);
  }
  if (!found) return nullptr;
  int64_t *order = to[0], *back = to[1], *sorted = to[2], *offsets = to[3], *rows = to[4], *inverse = to[5];
  std::vector<int64_t> place(alive.begin() + 1, alive.end());  // of the next sequence of each length
  place.push_back(0);
  for (int64_t b = 0; b < B; b++) {
    const int64_t k = place[lengths[b]]++;
    order[k] = b, back[b] = k, sorted[k] = lengths[b];
  }
  for (int64_t i = 0; i < T * B; i++) inverse[i] = -1;
  int64_t row = 0;
  for (int64_t t = 0; t < steps; t++) {
    offsets[t] = row;
    for (int64_t k = 0; k < alive[t + 1]; k++, row++) {
      rows[row] = batch_first ? order[k] * T + t : t * B + order[k];
      inverse[rows[row]] = row;
    }
  }
  return found;
}

}  // namespace

PyMethodDef kRowMethods[] = {
    fast<plan_rows>("plan_rows"), fast<move_rows>("move_rows"), {nullptr, nullptr, 0, nullptr}};

}  // namespace rnnkern
