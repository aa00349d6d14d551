// The short way through a call: a step of a small layer takes a few microseconds, and reading a dozen tensors in Python
// takes as long. Plain C functions for the same reason. What does not fit gets None, and goes the general way.
#include "layer.h"

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "tensors.h"
#include "threads.h"

namespace rnnkern {
namespace {

// Results that are given to the caller, or to nobody.
struct Results {
  static constexpr int kCount = 3;
  PyObject* made[kCount] = {};
  ~Results() {
    for (PyObject* object : made) Py_XDECREF(object);
  }
  PyObject* release() {
    PyObject* tuple = PyTuple_New(kCount);
    if (!tuple) return nullptr;
    for (int i = 0; i < kCount; i++) {
      PyTuple_SET_ITEM(tuple, i, made[i] ? made[i] : Py_NewRef(Py_None));
      made[i] = nullptr;
    }
    return tuple;
  }
};

// Those of a tuple with so many, none of them None, or as many of None for None; null: something else.
PyObject* const* each(PyObject* given, int count) {
  static PyObject* const none[kMaxStates] = {Py_None, Py_None, Py_None, Py_None};
  if (given == Py_None) return none;
  if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != count) return nullptr;
  for (int k = 0; k < count; k++)
    if (PyTuple_GET_ITEM(given, k) == Py_None) return nullptr;
  return PySequence_Fast_ITEMS(given);
}

// Where segments begin and rows end, as every layer of a call meets it.
class Segments {
 public:
  // Each of them or None; whether they fit the call. `rows` are the first two sizes of the input: where it is batch
  // first, both layouts are one in memory.
  bool open(PyObject* reset, PyObject* reset_state, PyObject* lengths, const Forward& f, const int64_t* rows,
            int64_t groups, DType wide) {
    View mask, ends;
    if (lengths != Py_None) {
      if (!ends.open(lengths) || !ends.is(kDLInt, 64, &f.B, 1)) return false;
      lengths_ = static_cast<const int64_t*>(ends.data());
      for (int64_t b = 0; b < f.B; b++)
        if (lengths_[b] < 0 || lengths_[b] > f.T) return false;
    }
    if (reset == Py_None) return reset_state == Py_None;
    count_ = states_of(f.cell);
    PyObject* const* state = each(reset_state, count_);
    if (!state || !mask.open(reset) || !mask.is(kDLBool, 8, rows, 2)) return false;
    mask_ = static_cast<const uint8_t*>(mask.data());
    if (f.N > 1) both_directions(f);
    for (int k = 0; k < count_; k++) {
      const int64_t width = k ? f.H : f.P;
      int64_t sizes[] = {groups, f.B, width};
      const DType dtype = k ? wide : f.dtype;
      if (!address(state[k], dtype, sizes, 3, &state_[k])) {
        sizes[1] = 1;
        if (!address(state[k], dtype, sizes, 3, &state_[k])) return false;
      }
      of_group_[k] = sizes[1] * width, of_row_[k] = sizes[1] > 1 ? width : 0;
      bytes_[k] = size_of(dtype);
    }
    return true;
  }

  // Of the groups from `first` on.
  void give(Forward& f, int64_t first) const {
    f.lengths = lengths_, f.reset = mask_;
    f.reset_s = both_.empty() ? 1 : f.N, f.reset_n = both_.empty() ? 0 : 1;
    for (int k = 0; k < count_; k++) {
      if (state_[k]) f.reset_state[k] = static_cast<const char*>(state_[k]) + first * of_group_[k] * bytes_[k];
      f.reset_state_n[k] = of_group_[k], f.reset_state_b[k] = of_row_[k];
    }
  }

  // Rows past a length are nobody's step. By all threads: memory that is touched for the first time takes longer than
  // to write zeros.
  void clear(void* rows, int64_t bytes, const Forward& f) const {
    if (!lengths_ || !bytes) return;
    prefer_large_pages(rows, bytes);
    Clearing c{lengths_, static_cast<char*>(rows), f.T, f.B, bytes / (f.T * f.B), bytes < kShared ? 1 : f.threads};
    if (!run_parallel(c.threads, clear_share, &c)) c.threads = 1, clear_share(&c, 0);
  }

 private:
  static constexpr int64_t kShared = 512 << 10;  // bytes that are worth more than one thread
  struct Clearing {
    const int64_t* lengths;
    char* rows;
    int64_t T, B, bytes;
    int threads;
  };

  static void clear_share(void* context, int rank) {
    const Clearing& c = *static_cast<Clearing*>(context);
    for (int64_t t = c.T * rank / c.threads; t < c.T * (rank + 1) / c.threads; t++)
      for (int64_t b = 0; b < c.B; b++)
        if (t >= c.lengths[b]) std::memset(c.rows + (t * c.B + b) * c.bytes, 0, c.bytes);
  }

  // A boundary before step t of a row that goes on is met by the way back as it enters t - 1.
  void both_directions(const Forward& f) {
    both_.resize(f.S * 2);
    for (int64_t t = 0; t < f.T; t++)
      for (int64_t b = 0; b < f.B; b++) {
        const int64_t at = t * f.B + b;
        both_[at * 2] = mask_[at];
        both_[at * 2 + 1] = t + 1 < (lengths_ ? lengths_[b] : f.T) && mask_[at + f.B];
      }
    mask_ = both_.data();
  }

  const int64_t* lengths_ = nullptr;
  const uint8_t* mask_ = nullptr;
  std::vector<uint8_t> both_;  // [S, 2]
  int count_ = 0;              // of the states
  const void* state_[kMaxStates] = {};
  int64_t of_group_[kMaxStates] = {}, of_row_[kMaxStates] = {}, bytes_[kMaxStates] = {};
};

// The weights of one direction, which reads `width` features or, with 0, pre-activations and has no w_ih and b_ih; with
// heads above 0, these are the first dimension of each, and have an entry each in `to`. Whether they fit.
bool open_weights(PyObject* const* own, const Forward& f, int64_t rows, int64_t width, bool bias, bool projected,
                  int64_t heads, Weights* to) {
  auto fits = [&](PyObject* given, int64_t height, int64_t across, const void** data, bool wanted) {
    const int64_t sizes[] = {heads, height, across};
    const int skipped = heads ? 0 : 1, ndim = across ? 3 : 2;
    return address(given, f.dtype, sizes + skipped, ndim - skipped, data) && (*data != nullptr) == wanted;
  };
  Weights w;
  if (!fits(own[0], rows, width, &w.w_ih, width != 0)) return false;
  if (!fits(own[1], rows, is_diagonal(f.cell) ? 0 : f.P, &w.w_hh, true)) return false;
  if (bias && (!fits(own[2], rows, 0, &w.b_ih, width != 0) || !fits(own[3], rows, 0, &w.b_hh, true))) return false;
  if (projected && !fits(own[2 + 2 * bias], f.P, f.H, &w.w_hr, true)) return false;
  auto next = [&](const void** part, int64_t numbers) {
    if (*part) *part = static_cast<const char*>(*part) + numbers * size_of(f.dtype);
  };
  for (int64_t head = 0; head < (heads ? heads : 1); head++) {
    to[head] = w;
    next(&w.w_ih, rows * width), next(&w.w_hh, rows * f.P), next(&w.b_ih, rows), next(&w.b_hh, rows);
  }
  return true;
}

// A state of all groups as a call has it, [layers * directions, B, heads * width], and as a scan takes and gives it:
// [layers * directions * heads, B, width]. With one head or one row these are the same in memory.
class State {
 public:
  void open(const void* first, void* last, int64_t outer, int64_t B, int64_t heads, int64_t bytes) {
    first_ = static_cast<const char*>(first), last_ = static_cast<char*>(last);
    outer_ = outer, B_ = B, heads_ = heads, bytes_ = bytes;
    if (heads == 1 || B == 1) return;
    if (first) {
      entering_.resize(outer * B * heads * bytes);
      walk([&](int64_t whole, int64_t apart) { std::memcpy(&entering_[apart], first_ + whole, bytes_); });
    }
    if (last) leaving_.resize(outer * B * heads * bytes);
  }
  void give(Forward& f, int k, int64_t group) {
    const int64_t at = group * B_ * bytes_;
    f.state[k] = first_ ? (entering_.empty() ? first_ : entering_.data()) + at : nullptr;
    f.final_state[k] = last_ ? (leaving_.empty() ? last_ : leaving_.data()) + at : nullptr;
  }
  void close() {
    if (!leaving_.empty())
      walk([&](int64_t whole, int64_t apart) { std::memcpy(last_ + whole, &leaving_[apart], bytes_); });
  }

 private:
  // Where a head's row is in either.
  template <class Copy>
  void walk(const Copy& copy) const {
    for (int64_t o = 0; o < outer_; o++)
      for (int64_t b = 0; b < B_; b++)
        for (int64_t head = 0; head < heads_; head++)
          copy(((o * B_ + b) * heads_ + head) * bytes_, ((o * heads_ + head) * B_ + b) * bytes_);
  }

  const char* first_ = nullptr;  // null: zero
  char* last_ = nullptr;         // null: nobody asks for it
  int64_t outer_ = 0, B_ = 0, heads_ = 1, bytes_ = 0;
  std::vector<char> entering_, leaving_;
};

// stack(isa, cell, gates, H, P, threads, kind, layers, directions, heads, bias, keep, x, hx, reset, reset_state,
// lengths, *weights) -> (y, states, kept) or None. kind: 0 for a cell's step (x and states have no time and no layers,
// and the first state is y), 1 for layers, 2 for layers that are batch first. P is 0 without a projection. Weights are
// in torch's order, w_ih, w_hh, b_ih, b_hh, w_hr of every layer and direction; with heads above 0, these are the first
// dimension of each. A w_ih of None, of one layer, says that x is the pre-activations, and there is no b_ih. hx and
// reset_state are tuples or, for zeros, None. States beyond h are in the accumulation dtype. With `keep`, kept has a
// tuple of the states of every layer after every step, of which the last h is y.
PyObject* stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kNumbers = 11, kTensors = 5, kFirst = 1 + kNumbers + kTensors;
  if (count < kFirst) return PyErr_Format(PyExc_TypeError, "stack takes %d arguments or more, got %zd", kFirst, count);
  const char* isa = PyUnicode_AsUTF8(args[0]);
  long number[kNumbers];
  for (int i = 0; i < kNumbers; i++) number[i] = PyLong_AsLong(args[i + 1]);
  if (!isa || PyErr_Occurred()) return nullptr;
  PyObject* const* tensor = args + 1 + kNumbers;
  PyObject* const* weight = args + kFirst;
  const int64_t layers = number[6], directions = number[7], heads = number[8] ? number[8] : 1;
  const bool headed = number[8] != 0, bias = number[9] != 0, keep = number[10] != 0, projected = number[3] != 0;
  const int64_t per = 2 + 2 * bias + projected;
  if (layers < 1 || directions < 1 || directions > 2 || count != kFirst + layers * directions * per) Py_RETURN_NONE;
  if (heads < 1 || number[2] % heads || (headed && (projected || tensor[2] != Py_None))) Py_RETURN_NONE;

  Forward f;
  f.cell = Cell(number[0]), f.N = directions * heads, f.threads = int(number[4]);
  f.H = number[2] / heads, f.P = projected ? number[3] : f.H;
  const int64_t rows = number[1] * f.H;
  const int kind = int(number[5]), ndim = kind ? 3 : 2, K = states_of(f.cell);
  View x;
  if (!bound() || !x.open(tensor[0]) || x.ndim() != ndim || !x.dtype(&f.dtype)) Py_RETURN_NONE;
  f.T = kind ? x.size(kind == 2) : 1, f.B = x.size(kind == 1);
  if (kind == 2 && f.T != 1 && f.B != 1) Py_RETURN_NONE;
  const int64_t width = x.size(ndim - 1), above = f.N * f.P;  // features that the first layer reads, and the others
  f.S = f.T * f.B;
  const DType wide = f.dtype == DType::f64 ? DType::f64 : DType::f32;
  const bool given = weight[0] == Py_None;
  if (given && (layers != 1 || width != f.N * rows)) Py_RETURN_NONE;
  std::vector<Weights> all(layers * f.N);
  for (int64_t k = 0; k < layers * directions; k++, weight += per) {
    const int64_t reads = given ? 0 : k < directions ? width : above;
    if (!open_weights(weight, f, rows, reads, bias, projected, number[8], all.data() + k * heads)) Py_RETURN_NONE;
    for (int64_t head = 0; head < heads; head++) all[k * heads + head].reverse = k % directions != 0;
  }

  PyObject* const* hx = each(tensor[1], K);
  const int64_t outer = layers * directions;
  // A state is [layers * directions, B, width], in a cell [B, width].
  const int64_t h_sizes[] = {outer, f.B, heads * f.P}, c_sizes[] = {outer, f.B, heads * f.H};
  const void* first[kMaxStates] = {};
  if (!hx) Py_RETURN_NONE;
  for (int k = 0; k < K; k++)
    if (!address(hx[k], k ? wide : f.dtype, (k ? c_sizes : h_sizes) + !kind, ndim, &first[k])) Py_RETURN_NONE;
  const int64_t y_sizes[] = {kind == 2 ? f.B : f.T, kind == 2 ? f.T : f.B, above};
  Segments segments;
  if (!segments.open(tensor[2], tensor[3], tensor[4], f, y_sizes, outer, wide)) Py_RETURN_NONE;

  const int64_t bytes = size_of(f.dtype), wide_bytes = size_of(wide);
  const int64_t seq_sizes[] = {y_sizes[0], y_sizes[1], f.N * f.H};
  const int64_t y_bytes = f.S * above * bytes, seq_bytes = f.S * f.N * f.H * wide_bytes;
  Results results;
  PyObject *&y = results.made[0], *&states = results.made[1], *&kept = results.made[2];
  void *y_data, *last[kMaxStates] = {};
  if (!(y = fresh(tensor[0], y_sizes + !kind, ndim, false, &y_data)) || !(states = PyTuple_New(K))) return nullptr;
  for (int k = 0; k < K; k++) {
    const int64_t* sizes = (k ? c_sizes : h_sizes) + !kind;
    PyObject* like = k ? PyTuple_GET_ITEM(states, k - 1) : y;
    PyObject* made = k || kind ? fresh(like, sizes, ndim, k && wide != f.dtype, &last[k]) : Py_NewRef(y);
    if (!made) return nullptr;
    PyTuple_SET_ITEM(states, k, made);
  }
  std::vector<void*> seq[kMaxStates];  // of every layer, to keep
  if (keep) {
    for (int k = 0; k < K; k++) seq[k].assign(layers, y_data);
    if (!(kept = PyTuple_New(layers))) return nullptr;
    for (int64_t n = 0; n < layers; n++) {
      PyObject* own = PyTuple_New(K);
      if (!own) return nullptr;
      PyTuple_SET_ITEM(kept, n, own);
      for (int k = 0; k < K; k++) {
        const bool is_y = !k && n == layers - 1;
        PyObject* made =
            is_y ? Py_NewRef(y) : fresh(y, k ? seq_sizes : y_sizes, ndim, k && wide != f.dtype, &seq[k][n]);
        if (!made) return nullptr;
        PyTuple_SET_ITEM(own, k, made);
      }
    }
  }
  PyThreadState* released = nullptr;
  try {
    const Kernels& kernels = choose_kernels(isa);
    State state[kMaxStates];
    for (int k = 0; k < K; k++) state[k].open(first[k], last[k], outer, f.B, heads, k ? f.H * wide_bytes : f.P * bytes);
    // Outputs of the layers below the last, each of which is read by the next.
    std::unique_ptr<char[]> between[2];
    for (int64_t n = 0; !keep && n < layers - 1 && n < 2; n++) between[n].reset(new char[y_bytes]);
    if (layers * f.N * f.S * rows * (width + f.P) > kLong) released = PyEval_SaveThread();
    if (given) f.gx = x.data(), f.gx_s = width, f.gx_n = rows;
    for (int64_t n = 0; n < layers; n++) {
      f.weights = all.data() + n * f.N;
      if (!given) f.x = n ? f.y : x.data(), f.I = f.x_s = f.x_m = n ? above : width;
      f.y = keep ? seq[0][n] : n == layers - 1 ? y_data : between[n % 2].get();
      segments.clear(f.y, y_bytes, f);
      for (int k = 1; keep && k < K; k++) segments.clear(f.seq[k] = seq[k][n], seq_bytes, f);
      segments.give(f, n * directions);
      for (int k = 0; k < K; k++) state[k].give(f, k, n * f.N);
      kernels.forward(f);
    }
    for (int k = 0; k < K; k++) state[k].close();
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
