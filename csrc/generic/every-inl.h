// The entries of an instruction set that has code of its own for everything; no include guard.
#include "kernels-inl.h"

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

static Stepper* stepper(const StreamShape& shape) {
  if (shape.form == Form::int8) return new Stream<Quarters>(shape);
  if (shape.form == Form::bf16) {
    if (shape.dtype == DType::bf16) return new Stream<RowPairs>(shape);
    return new Stream<Halves>(shape);
  }
  if (shape.dtype == DType::f64) return new Stream<Whole<double>>(shape);
  return new Stream<Whole<float>>(shape);
}

static Attention* attention(const AttentionShape& shape) {
  switch (shape.dtype) {
    case DType::f64:
      return new Attending<Whole<double>>(shape);
    case DType::bf16:
      return new Attending<RowPairs>(shape);
    default:
      return new Attending<Whole<float>>(shape);
  }
}

#if RK_VBYTES == 64
static void gemm(const Gemm& call) {
  if (call.dtype == DType::f64) return run_scan<GemmRun<double>>(call);
  run_scan<GemmRun<float>>(call);
}
#endif
