// rnnkern.Stream as a Python type of plain C functions, for a step takes a few microseconds: it owns a Stepper and
// takes tensors. What does not fit gets None with nothing done, and rnnkern/stream.py finds out what it is. With a head
// it runs the loop of rnnkern.generate as well.
#include "stream.h"

#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "generate.h"
#include "tensors.h"

namespace rnnkern {
namespace {

struct Object {
  PyObject_HEAD StreamShape shape;
  const Kernels* kernels;
  std::unique_ptr<Stepper> stepper;
  std::vector<uint8_t> active;  // [B], of the call that runs
  PyObject* like = nullptr;     // a tensor of y's sizes: what is made like it costs half of what sizes do
  bool long_steps = false;      // such that other Python threads should run meanwhile
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

Object* own(PyObject* self) { return reinterpret_cast<Object*>(self); }

// One call at a time: two threads would find states half written.
class Turn {
 public:
  explicit Turn(PyObject* self) : busy_(own(self)->busy), taken_(!busy_.test_and_set(std::memory_order_acquire)) {
    if (!taken_)
      PyErr_SetString(PyExc_RuntimeError,
                      "this Stream is in use by another thread: give every thread a Stream of its own, or let them "
                      "take turns");
  }
  ~Turn() {
    if (taken_) busy_.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  explicit operator bool() const { return taken_; }

 private:
  std::atomic_flag& busy_;
  bool taken_;
};

bool arguments(const char* name, Py_ssize_t wanted, Py_ssize_t count) {
  if (count != wanted) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, wanted, count);
  return count == wanted;
}

// The rows that a call is for: None, a bool mask [B], or int64 indices without repetition.
bool choose_rows(Object* o, PyObject* rows, const uint8_t** active) {
  *active = nullptr;
  if (rows == Py_None) return true;
  View view;
  if (!view.open(rows) || view.ndim() != 1) return false;
  const int64_t B = o->shape.B, given = view.size(0);
  if (view.is(kDLBool, 8, &B, 1)) {
    // A copy, for another thread may write to the mask while the call runs.
    const uint8_t* mask = static_cast<const uint8_t*>(view.data());
    o->active.assign(mask, mask + B);
  } else if (view.is(kDLInt, 64, &given, 1)) {
    o->active.assign(B, 0);
    const int64_t* index = static_cast<const int64_t*>(view.data());
    for (int64_t i = 0; i < given; i++) {
      int64_t row = index[i] < 0 ? index[i] + B : index[i];
      if (row < 0 || row >= B || o->active[row]) return false;
      o->active[row] = 1;
    }
  } else {
    return false;
  }
  *active = o->active.data();
  return true;
}

void run(Object* o, const StreamCall& call, bool alone) {
  if (alone) return o->stepper->run(call);
  PyThreadState* released = PyEval_SaveThread();
  o->stepper->run(call);
  PyEval_RestoreThread(released);
}

// step(x, rows, out) -> y or None
PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (!arguments("step", 3, count)) return nullptr;
  Object* o = own(self);
  const StreamShape& s = o->shape;
  const int64_t x_sizes[] = {s.B, s.I}, y_sizes[] = {s.B, s.P};
  StreamCall call;
  View x, y;
  if (!x.open(args[0]) || !x.is(s.dtype, x_sizes, 2)) Py_RETURN_NONE;
  bool given = args[2] != Py_None;
  if (given && (!y.open(args[2]) || !y.is(s.dtype, y_sizes, 2))) Py_RETURN_NONE;
  Turn turn(self);
  if (!turn) return nullptr;
  if (!choose_rows(o, args[1], &call.active)) Py_RETURN_NONE;
  call.x = x.data(), call.x_b = s.I, call.y_b = s.P;
  if (given) call.y = y.data();
  if (!given && !o->like && !(o->like = fresh(args[0], y_sizes, 2, false, &call.y))) return nullptr;
  PyObject* result = given ? Py_NewRef(args[2]) : fresh(o->like, y_sizes, 2, false, &call.y);
  if (result) run(o, call, !o->long_steps);
  return result;
}

// run(x, y, batch_first) -> whether it fits: x [T, B, I] and y [T, B, P], or [B, T, ...]
PyObject* run_chunk(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (!arguments("run", 3, count)) return nullptr;
  Object* o = own(self);
  const StreamShape& s = o->shape;
  bool batch_first = args[2] == Py_True;
  StreamCall call;
  View x, y;
  if (!x.open(args[0]) || x.ndim() != 3 || !y.open(args[1])) Py_RETURN_FALSE;
  int64_t T = call.T = x.size(batch_first), first = batch_first ? s.B : T, second = batch_first ? T : s.B;
  const int64_t x_sizes[] = {first, second, s.I}, y_sizes[] = {first, second, s.P};
  if (!x.is(s.dtype, x_sizes, 3) || !y.is(s.dtype, y_sizes, 3)) Py_RETURN_FALSE;
  Turn turn(self);
  if (!turn) return nullptr;
  int64_t rows_apart = batch_first ? T : 1, steps_apart = batch_first ? 1 : s.B;
  call.x = x.data(), call.x_t = steps_apart * s.I, call.x_b = rows_apart * s.I;
  call.y = y.data(), call.y_t = steps_apart * s.P, call.y_b = rows_apart * s.P;
  run(o, call, false);
  Py_RETURN_TRUE;
}

DType sum_dtype(const StreamShape& s) { return s.dtype == DType::f64 ? DType::f64 : DType::f32; }

// pack(w_ih, w_hh, b_ih, b_hh, w_hr, s_ih, s_hh, s_hr of every layer; w, b, s of the head) -> whether they fit
PyObject* pack(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Object* o = own(self);
  const StreamShape& s = o->shape;
  constexpr int kPerLayer = 8;
  if (!arguments("pack", kPerLayer * s.layers + (s.V ? 3 : 0), count)) return nullptr;
  const int64_t rows = gates(s);
  const DType sums = sum_dtype(s);
  std::vector<StreamLayer> layers(s.layers);
  auto weights = [&](PyObject* object, int64_t height, int64_t width, const void** data) {
    const int64_t sizes[] = {height, width};
    View view;
    if (!view.open(object)) return false;
    *data = view.data();
    if (s.form == Form::int8) return view.is(kDLInt, 8, sizes, 2);
    return view.is(s.form == Form::bf16 ? DType::bf16 : sums, sizes, 2);
  };
  auto scales = [&](PyObject* object, int64_t height, const float** data) {
    const void* found = nullptr;
    bool fits = address(object, DType::f32, &height, 1, &found);
    *data = static_cast<const float*>(found);
    return fits && (found != nullptr) == (s.form == Form::int8);
  };
  for (int64_t k = 0; k < s.layers; k++, args += kPerLayer) {
    StreamLayer& l = layers[k];
    if ((k || s.I) && !weights(args[0], rows, k ? s.P : s.I, &l.w_ih)) Py_RETURN_FALSE;
    if (!address(args[2], sums, &rows, 1, &l.b_ih) || !address(args[3], sums, &rows, 1, &l.b_hh) ||
        !scales(args[5], rows, &l.s_ih))
      Py_RETURN_FALSE;
    if (is_diagonal(s.cell)) {  // a vector, kept as the biases are
      if (!address(args[1], sums, &rows, 1, &l.w_hh) || !l.w_hh) Py_RETURN_FALSE;
    } else if (!weights(args[1], rows, s.P / s.groups, &l.w_hh) || !scales(args[6], rows, &l.s_hh)) {
      Py_RETURN_FALSE;
    }
    if (s.projected && (!weights(args[4], s.P, s.H, &l.w_hr) || !scales(args[7], s.P, &l.s_hr))) Py_RETURN_FALSE;
  }
  StreamHead head;
  if (s.V && (!weights(args[0], s.V, s.P, &head.w) || !address(args[1], sums, &s.V, 1, &head.b) ||
              !scales(args[2], s.V, &head.s)))
    Py_RETURN_FALSE;
  Turn turn(self);
  if (!turn) return nullptr;
  o->stepper->pack(layers.data(), head);
  Py_RETURN_TRUE;
}

// The attention of a generate call, (additive, fed, keys, values, lengths, query, score, readout, readout before), or
// null where something does not fit.
std::unique_ptr<Attention> attention_of(Object* o, PyObject* given, GenerateCall* call) {
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != 9) return nullptr;
  PyObject* const* args = &PyTuple_GET_ITEM(given, 0);
  const StreamShape& s = o->shape;
  const DType sums = sum_dtype(s), kept = s.dtype == DType::bf16 ? DType::bf16 : sums;
  AttentionShape shape;
  AttentionWeights w;
  View keys, values, lengths;
  shape.dtype = s.dtype, shape.additive = args[0] == Py_True;
  const long fed = PyLong_AsLong(args[1]);
  if (fed < 0 || fed > 2 || !keys.open(args[2]) || keys.ndim() != 3 || !values.open(args[3]) || values.ndim() != 3)
    return nullptr;
  shape.fed = Fed(fed), shape.N = call->N, shape.beams = call->beams;
  shape.L = keys.size(1), shape.A = keys.size(2), shape.S = values.size(1), shape.P = s.P;
  const int64_t keys_sizes[] = {shape.N, shape.L, shape.A}, values_sizes[] = {shape.N, shape.S, shape.L};
  const int64_t query[] = {shape.A, shape.P}, readout[] = {shape.P, shape.S + shape.P}, before[] = {s.B, shape.P};
  if (!keys.is(shape.additive ? sums : kept, keys_sizes, 3) || !values.is(kept, values_sizes, 3) ||
      !lengths.open(args[4]) || !lengths.is(kDLInt, 64, &shape.N, 1) || !address(args[5], kept, query, 2, &w.query) ||
      !address(args[6], sums, &shape.A, 1, &w.score) || !address(args[7], kept, readout, 2, &w.readout) ||
      !address(args[8], s.dtype, before, 2, &call->readout))
    return nullptr;
  w.keys = keys.data(), w.values = values.data(), w.lengths = static_cast<const int64_t*>(lengths.data());
  for (int64_t k = 0; k < shape.N; k++)
    if (w.lengths[k] < 0 || w.lengths[k] > shape.L) return nullptr;
  if (!w.readout || shape.width() > s.I || (shape.fed == Fed::readout) != (call->readout != nullptr) ||
      shape.additive != (w.query && w.score) || (!shape.additive && shape.A != shape.P))
    return nullptr;
  std::unique_ptr<Attention> attention(o->kernels->attention(shape));
  attention->pack(w);
  return attention;
}

// generate(prompt, lengths, table, uniform, stops, tokens, counts, scores, beams, temperature, top_k, top_p, penalty,
// attention) -> (row, step, peak) as Generation has them at its end, or None where something does not fit
PyObject* generate(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (!arguments("generate", 14, count)) return nullptr;
  Object* o = own(self);
  const StreamShape& s = o->shape;
  GenerateCall call;
  View prompt, lengths, table, uniform, stops, tokens, counts, scores;
  const double temperature = PyFloat_AsDouble(args[9]), top_p = PyFloat_AsDouble(args[11]);
  call.beams = PyLong_AsLongLong(args[8]), call.top_k = PyLong_AsLongLong(args[10]);
  call.temperature = temperature, call.top_p = top_p, call.penalty = PyFloat_AsDouble(args[12]);
  if (PyErr_Occurred()) return nullptr;
  auto integers = [](View& view, PyObject* object, int ndim) {
    if (!view.open(object) || view.ndim() != ndim) return false;
    const int64_t own[] = {view.size(0), view.size(ndim - 1)};
    return view.is(kDLInt, 64, own, ndim);
  };
  if (!integers(prompt, args[0], 2) || !integers(tokens, args[5], 2) || !table.open(args[2]) || table.ndim() != 2)
    Py_RETURN_NONE;
  call.N = prompt.size(0), call.L = prompt.size(1), call.most = tokens.size(1), call.reads = table.size(0);
  std::unique_ptr<Attention> attention;
  Turn turn(self);
  if (!turn) return nullptr;
  const int64_t all[] = {call.N, call.most};
  if (!s.V || s.V > call.reads || call.beams < 1 || call.N * call.beams != s.B || call.top_k < 0) Py_RETURN_NONE;
  try {
    if (args[13] != Py_None && !(attention = attention_of(o, args[13], &call))) {
      PyErr_Clear();  // of a number that is none
      Py_RETURN_NONE;
    }
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  call.attention = attention.get();
  const int64_t embedded = call.embedded(s), table_sizes[] = {call.reads, embedded ? embedded : gates(s)};
  if (!table.is(embedded ? s.dtype : sum_dtype(s), table_sizes, 2) || !tokens.is(kDLInt, 64, all, 2) ||
      !lengths.open(args[1]) || !lengths.is(kDLInt, 64, all, 1) || !counts.open(args[6]) ||
      !counts.is(kDLInt, 64, all, 1))
    Py_RETURN_NONE;
  call.prompt = static_cast<const int64_t*>(prompt.data()), call.lengths = static_cast<const int64_t*>(lengths.data());
  call.tokens = static_cast<int64_t*>(tokens.data()), call.counts = static_cast<int64_t*>(counts.data());
  call.table = table.data();
  if (args[3] != Py_None) {
    if (call.beams > 1 || !uniform.open(args[3]) || !uniform.is(DType::f64, all, 2)) Py_RETURN_NONE;
    call.uniform = static_cast<const double*>(uniform.data());
  }
  if (args[4] != Py_None) {
    if (!integers(stops, args[4], 1)) Py_RETURN_NONE;
    call.stops = static_cast<const int64_t*>(stops.data()), call.stop_count = stops.size(0);
  }
  if (call.beams > 1) {
    if (!scores.open(args[7]) || !scores.is(DType::f64, all, 1)) Py_RETURN_NONE;
    call.scores = static_cast<double*>(scores.data());
  }
  try {
    std::unique_ptr<Generation> generation = make_generation(s, *o->stepper, call);
    for (bool more = true; more;) {
      std::exception_ptr error;
      PyThreadState* released = PyEval_SaveThread();
      try {
        more = generation->advance();
      } catch (...) {
        error = std::current_exception();
      }
      PyEval_RestoreThread(released);
      if (error) std::rethrow_exception(error);
      if (PyErr_CheckSignals() != 0) return nullptr;
    }
    return Py_BuildValue("LLd", static_cast<long long>(generation->row), static_cast<long long>(generation->step),
                         generation->peak);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

// The addresses of all states, [layers, B, width] each; whether they fit.
bool addresses(Object* o, PyObject* const* args, void** data) {
  const StreamShape& s = o->shape;
  for (int k = 0; k < o->stepper->states(); k++) {
    const int64_t sizes[] = {s.layers, s.B, k ? s.H : s.P};
    View view;
    if (!view.open(args[k]) || !view.is(s.dtype, sizes, 3)) return false;
    data[k] = view.data();
  }
  return true;
}

// read(*states) -> whether they fit
PyObject* read(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Object* o = own(self);
  void* data[kMaxStates];
  if (!arguments("read", o->stepper->states(), count)) return nullptr;
  if (!addresses(o, args, data)) Py_RETURN_FALSE;
  Turn turn(self);
  if (!turn) return nullptr;
  for (int k = 0; k < count; k++) o->stepper->read(k, data[k]);
  Py_RETURN_TRUE;
}

// write(rows, *states) -> whether they fit; without states: zero
PyObject* write(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Object* o = own(self);
  const int states = o->stepper->states();
  void* data[kMaxStates] = {};
  const uint8_t* active;
  if (count != 1 && !arguments("write", 1 + states, count)) return nullptr;
  if (count > 1 && !addresses(o, args + 1, data)) Py_RETURN_FALSE;
  Turn turn(self);
  if (!turn) return nullptr;
  if (!choose_rows(o, args[0], &active)) Py_RETURN_FALSE;
  for (int k = 0; k < states; k++) o->stepper->write(k, data[k], active);
  Py_RETURN_TRUE;
}

// Stream(isa, cell, dtype, form, layers, B, I, H, P, groups, projected, V=0): nothing packed yet, states zero.
PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
  const char* isa;
  int cell, dtype, form, projected;
  StreamShape s;
  long long layers, B, I, H, P, groups, V = 0;
  if (!PyArg_ParseTuple(args, "siiiLLLLLLp|L", &isa, &cell, &dtype, &form, &layers, &B, &I, &H, &P, &groups, &projected,
                        &V))
    return nullptr;
  s.cell = Cell(cell), s.dtype = DType(dtype), s.form = Form(form), s.projected = projected != 0;
  s.layers = layers, s.B = B, s.I = I, s.H = H, s.P = P, s.groups = groups, s.V = V;
  if (s.dtype == DType::f64 && s.form != Form::whole)
    return PyErr_Format(PyExc_ValueError, "float64 has whole weights only");
  if (groups < 1 || H % groups || (groups > 1 && P != H))
    return PyErr_Format(PyExc_ValueError, "%lld groups of %lld hidden units and %lld outputs", groups, H, P);
  if (!bound()) return PyErr_Format(PyExc_RuntimeError, "bind was not called");
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  Object* o = own(self);
  new (&o->shape) StreamShape(s);
  new (&o->stepper) std::unique_ptr<Stepper>();
  new (&o->active) std::vector<uint8_t>();
  new (&o->busy) std::atomic_flag();
  o->busy.clear();
  o->long_steps = s.layers * s.B * gates(s) * (s.P / s.groups + (s.layers > 1 ? s.P : s.I)) > kLong;
  try {
    o->active.reserve(s.B);
    o->kernels = &choose_kernels(isa);
    o->stepper.reset(o->kernels->stepper(s));
  } catch (const std::exception& error) {
    Py_DECREF(self);
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  return self;
}

void destroy(PyObject* self) {
  Object* o = own(self);
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(o->like);
  o->active.~vector();
  o->stepper.~unique_ptr();
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {fast<step>("step"),
                          fast<run_chunk>("run"),
                          fast<pack>("pack"),
                          fast<read>("read"),
                          fast<write>("write"),
                          fast<generate>("generate"),
                          {nullptr, nullptr, 0, nullptr}};

PyType_Slot kSlots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                        {Py_tp_methods, kMethods},
                        {0, nullptr}};

PyType_Spec kSpec = {"rnnkern._cpu.Stream", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, kSlots};

}  // namespace

PyObject* stream_type() { return PyType_FromSpec(&kSpec); }

}  // namespace rnnkern
