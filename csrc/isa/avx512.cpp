// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <new>

#include "../api.h"
#include "../threads.h"

#define RK_VBYTES 64
#define RK_REGISTERS 32
#define RK_F16C
#define RK_MADD

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace rnnkern {
namespace avx512 {
#include "../generic/every-inl.h"
}  // namespace avx512
}  // namespace rnnkern

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rnnkern {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}
extern const Kernels kAvx512 = {"avx512",        supported,         avx512::forward, avx512::backward,
                                avx512::stepper, avx512::attention, avx512::gemm};
}  // namespace rnnkern
#endif
