// The kernels for AVX-512 with products of bf16 in AMX tiles.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <new>

#include "../api.h"
#include "../threads.h"

#define RK_VBYTES 64
#define RK_REGISTERS 32
#define RK_F16C
#define RK_BF16
#define RK_AMX

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((                                                                                           \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#endif

namespace rnnkern {
namespace amx_bf16 {
#include "../generic/bf16-inl.h"

// Rows of a stream need not lie evenly apart, as tiles have them.
static Stepper* stepper(const StreamShape& shape) { return kAvx512Bf16.stepper(shape); }
static Attention* attention(const AttentionShape& shape) { return kAvx512Bf16.attention(shape); }
}  // namespace amx_bf16
}  // namespace rnnkern

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rnnkern {
// The processor has tiles, the system keeps them, and it lets this process use them.
static bool supported() {
#ifdef __linux__
  static const bool yes = [] {
    unsigned a, b, c, d, low, high;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kTileState = 3u << 17, kXsave = 1u << 27;
    if (!kAvx512Bf16.supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
      return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kXsave) == 0) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return yes;
#else
  return false;
#endif
}
extern const Kernels kAmxBf16 = {"amx_bf16",        supported,           amx_bf16::forward, amx_bf16::backward,
                                 amx_bf16::stepper, amx_bf16::attention, amx_bf16::gemm};
}  // namespace rnnkern
#endif
