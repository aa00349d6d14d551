// The scans of an instruction set that has products of bf16 beyond those of AVX-512, whose code does all the rest: a
// quarter of the time to compile. No include guard.
#include "kernels-inl.h"

static void forward(const Forward& call) {
  if (call.dtype != DType::bf16) return kAvx512.forward(call);
  run_cell<ForwardScan, Pairs>(call);
}

static void backward(const Backward& call) {
  if (call.dtype != DType::bf16) return kAvx512.backward(call);
  run_cell<BackwardScan, Pairs>(call);
}

static void gemm(const Gemm& call) { kAvx512.gemm(call); }
