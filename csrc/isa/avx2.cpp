// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <new>

#include "../api.h"
#include "../threads.h"

#define RK_VBYTES 32
#define RK_REGISTERS 16
#define RK_F16C
#define RK_MADD

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace rnnkern {
namespace avx2 {
#include "../generic/every-inl.h"
}  // namespace avx2
}  // namespace rnnkern

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rnnkern {
static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
extern const Kernels kAvx2 = {"avx2",        supported,       avx2::forward, avx2::backward,
                              avx2::stepper, avx2::attention, nullptr};
}  // namespace rnnkern
#endif
