// All generic code of one instruction set, in order; no include guard. The including file has opened the namespace and
// the target region and defined RK_VBYTES, RK_REGISTERS and the feature macros. A set whose instructions matter to
// bf16 and to bytes alone defines RK_OTHERS, the set that has all else, so that it is not compiled again; and
// RK_SAME_STREAMS, if streams are that set's too.

// clang-format off: the order is the meaning
#include "simd-inl.h"
#include "math-inl.h"
#include "range-inl.h"
#include "norm-inl.h"
#include "options-inl.h"
#include "tiles-inl.h"
#include "product-inl.h"
#include "plan-inl.h"
#include "../cells/rnn.h"
#include "../cells/indrnn.h"
#include "../cells/lstm.h"
#include "../cells/gru.h"
#include "../cells/mgu.h"
#include "../cells/ligru.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "begin-inl.h"
#include "rows-inl.h"
#ifndef RK_SAME_STREAMS
#include "forms-inl.h"
#include "stream-inl.h"
#endif
// clang-format on

template <class ST>
struct ModeOf {
  typedef Plain<typename Accumulate<ST>::type, ST> type;
};
#ifdef RK_BF16
template <>
struct ModeOf<bf16> {
  typedef Pairs type;
};
#endif

// The one place that goes from run-time cell and dtype to their types.
template <template <class, class> class Driver, class M, class Call>
static void run_cell(const Call& call) {
  switch (call.cell) {
    case Cell::rnn_tanh:
      return Driver<Rnn<false>, M>::run(call);
    case Cell::rnn_relu:
      return Driver<Rnn<true>, M>::run(call);
    case Cell::lstm:
      return Driver<Lstm, M>::run(call);
    case Cell::gru:
      return Driver<Gru, M>::run(call);
    case Cell::mgu:
      return Driver<Mgu, M>::run(call);
    case Cell::indrnn_tanh:
      return Driver<IndRnn<false>, M>::run(call);
    case Cell::indrnn_relu:
      return Driver<IndRnn<true>, M>::run(call);
    case Cell::ligru:
      return Driver<LiGru, M>::run(call);
  }
}

#ifdef RK_OTHERS
static void forward(const Forward& call) {
  if (call.dtype != DType::bf16) return RK_OTHERS.forward(call);
  run_cell<ForwardScan, ModeOf<bf16>::type>(call);
}
static void backward(const Backward& call) {
  if (call.dtype != DType::bf16) return RK_OTHERS.backward(call);
  run_cell<BackwardScan, ModeOf<bf16>::type>(call);
}
#else
template <template <class, class> class Driver, class Call>
static void run_dtype(const Call& call) {
  switch (call.dtype) {
    case DType::f64:
      return run_cell<Driver, ModeOf<double>::type>(call);
    case DType::f32:
      return run_cell<Driver, ModeOf<float>::type>(call);
    case DType::bf16:
      return run_cell<Driver, ModeOf<bf16>::type>(call);
    case DType::f16:
      return run_cell<Driver, ModeOf<f16>::type>(call);
  }
}

static void forward(const Forward& call) { run_dtype<ForwardScan>(call); }
static void backward(const Backward& call) { run_dtype<BackwardScan>(call); }
#endif

#ifdef RK_SAME_STREAMS
static Stepper* stepper(const StreamShape& shape) { return RK_OTHERS.stepper(shape); }
#else
static Stepper* stepper(const StreamShape& shape) {
#ifdef RK_OTHERS
  if (shape.form == Form::whole || (shape.form == Form::bf16 && shape.dtype != DType::bf16))
    return RK_OTHERS.stepper(shape);
#else
  if (shape.form == Form::whole) {
    if (shape.dtype == DType::f64) return new Stream<Whole<double>>(shape);
    return new Stream<Whole<float>>(shape);
  }
  if (shape.form == Form::bf16 && shape.dtype != DType::bf16) return new Stream<Halves>(shape);
#endif
  if (shape.form == Form::bf16) return new Stream<RowPairs>(shape);
  return new Stream<Quarters>(shape);
}
#endif
