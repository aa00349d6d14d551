// The kernels for AVX-512 with native dot products of bf16 and of bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <new>

#include "../api.h"
#include "../threads.h"

#define RK_VBYTES 64
#define RK_REGISTERS 32
#define RK_F16C
#define RK_BF16
#define RK_VNNI

#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif

namespace rnnkern {
namespace avx512_bf16 {
#include "../generic/bf16-inl.h"

static Stepper* stepper(const StreamShape& shape) {
  if (shape.form == Form::int8) return new Stream<Quarters>(shape);  // by bytes: VNNI
  if (shape.form == Form::bf16 && shape.dtype == DType::bf16) return new Stream<RowPairs>(shape);
  return kAvx512.stepper(shape);
}

static Attention* attention(const AttentionShape& shape) {
  return shape.dtype == DType::bf16 ? new Attending<RowPairs>(shape) : kAvx512.attention(shape);
}
}  // namespace avx512_bf16
}  // namespace rnnkern

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rnnkern {
static bool supported() {  // every processor with the second has the first
  return kAvx512.supported() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
extern const Kernels kAvx512Bf16 = {
    "avx512_bf16",          supported,        avx512_bf16::forward, avx512_bf16::backward, avx512_bf16::stepper,
    avx512_bf16::attention, avx512_bf16::gemm};
}  // namespace rnnkern
#endif
