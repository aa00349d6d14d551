// Vectors of one instruction set by GCC's vector extensions; no include guard: included once per ISA namespace.
// RK_VBYTES is the vector width. Half-precision storage is widened on load and rounded to nearest even on store.

#define RK_INLINE inline __attribute__((always_inline))
#define RK_LAMBDA __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int n = RK_VBYTES / 4;
  typedef float v __attribute__((vector_size(RK_VBYTES)));
  typedef float unaligned __attribute__((vector_size(RK_VBYTES), aligned(4), may_alias));
  typedef int32_t i __attribute__((vector_size(RK_VBYTES)));
  typedef uint32_t u __attribute__((vector_size(RK_VBYTES)));
};

template <>
struct Simd<double> {
  static constexpr int n = RK_VBYTES / 8;
  typedef double v __attribute__((vector_size(RK_VBYTES)));
  typedef double unaligned __attribute__((vector_size(RK_VBYTES), aligned(8), may_alias));
  typedef int64_t i __attribute__((vector_size(RK_VBYTES)));
  typedef uint64_t u __attribute__((vector_size(RK_VBYTES)));
};

// bf16 pairs: one 32-bit lane holds two neighbours along the sum, the products of both are added in fp32.
typedef uint32_t u32v __attribute__((vector_size(RK_VBYTES)));
typedef uint32_t u32v_unaligned __attribute__((vector_size(RK_VBYTES), aligned(2), may_alias));  // rows of bf16
typedef uint16_t u16h __attribute__((vector_size(RK_VBYTES / 2)));
typedef uint16_t u16h_unaligned __attribute__((vector_size(RK_VBYTES / 2), aligned(2), may_alias));

// The dtype that sums and the cell state use for a storage type.
template <class ST>
struct Accumulate {
  typedef float type;
};
template <>
struct Accumulate<double> {
  typedef double type;
};

template <class CT>
using vec = typename Simd<CT>::v;

template <class CT>
RK_INLINE vec<CT> splat(CT x) {
  return x - vec<CT>{};  // x - 0 is exact, -0 and NaN included
}

// ---- scalars -----------------------------------------------------------------------------------------------------

RK_INLINE float widen(float x) { return x; }
RK_INLINE double widen(double x) { return x; }

RK_INLINE float widen(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

RK_INLINE float widen(f16 x) {
#ifdef RK_F16C
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13, u;
  float f;
  if (magnitude >= 0x0f800000) {  // Inf or NaN
    u = magnitude | 0x7f800000;
    __builtin_memcpy(&f, &u, 4);
  } else {  // 2^112 restores the exponent's bias and is exact for subnormal numbers too
    __builtin_memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
  }
  __builtin_memcpy(&u, &f, 4);
  u |= sign;
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}

RK_INLINE void narrow(float* p, float x) { *p = x; }
RK_INLINE void narrow(double* p, double x) { *p = x; }

RK_INLINE void narrow(bf16* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  p->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

RK_INLINE void narrow(f16* p, float x) {
#ifdef RK_F16C
  p->bits = _cvtss_sh(x, 0);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff, r;
  if (a > 0x7f800000) {
    r = 0x7e00 | (a >> 13 & 0x3ff);
  } else if (a >= 0x477ff000) {  // 65520 and above round to Inf
    r = 0x7c00;
  } else if (a < 0x38800000) {  // subnormal: the addition does the rounding
    float f;
    __builtin_memcpy(&f, &a, 4);
    f += 0.5f;
    __builtin_memcpy(&r, &f, 4);
    r -= 0x3f000000;
  } else {
    r = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  }
  p->bits = uint16_t(sign | r);
#endif
}

// ---- whole vectors -----------------------------------------------------------------------------------------------

RK_INLINE vec<float> load(const float* p) { return *(const Simd<float>::unaligned*)p; }
RK_INLINE vec<double> load(const double* p) { return *(const Simd<double>::unaligned*)p; }
RK_INLINE void store(float* p, vec<float> x) { *(Simd<float>::unaligned*)p = x; }
RK_INLINE void store(double* p, vec<double> x) { *(Simd<double>::unaligned*)p = x; }

RK_INLINE vec<float> load(const bf16* p) {
  u16h h = *(const u16h_unaligned*)p;
  return (vec<float>)(__builtin_convertvector(h, u32v) << 16);
}

RK_INLINE void store(bf16* p, vec<float> x) {
#ifdef RK_BF16
  __m256bh h = _mm512_cvtneps_pbh((__m512)x);
  *(u16h_unaligned*)p = (u16h)h;
#else
  u32v u = (u32v)x;
  u32v rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x40;
  *(u16h_unaligned*)p = __builtin_convertvector(x != x ? nan : rounded, u16h);
#endif
}

RK_INLINE vec<float> load(const f16* p) {
#if defined(RK_F16C) && RK_VBYTES == 64
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(RK_F16C)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec<float> r{};
  for (int i = 0; i < Simd<float>::n; i++) r[i] = widen(p[i]);
  return r;
#endif
}

RK_INLINE void store(f16* p, vec<float> x) {
#if defined(RK_F16C) && RK_VBYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(RK_F16C)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < Simd<float>::n; i++) narrow(p + i, x[i]);
#endif
}

// ---- the first n lanes -------------------------------------------------------------------------------------------

// Out of line: the ends of rows are rare, and their code would crowd the registers of the rest.
template <class ST>
static __attribute__((noinline, cold)) vec<typename Accumulate<ST>::type> load_end(const ST* p, int n) {
  typedef typename Accumulate<ST>::type CT;
  CT buffer[Simd<CT>::n] = {};
  for (int i = 0; i < n; i++) buffer[i] = widen(p[i]);
  return load(buffer);
}

template <class ST>
static __attribute__((noinline, cold)) void store_end(ST* p, vec<typename Accumulate<ST>::type> x, int n) {
  typedef typename Accumulate<ST>::type CT;
  CT buffer[Simd<CT>::n];
  store(buffer, x);
  for (int i = 0; i < n; i++) narrow(p + i, buffer[i]);
}

template <class ST>
RK_INLINE vec<typename Accumulate<ST>::type> load(const ST* p, int n) {
  if (__builtin_expect(n >= Simd<typename Accumulate<ST>::type>::n, 1)) return load(p);
  return load_end(p, n);
}

template <class ST>
RK_INLINE void store(ST* p, vec<typename Accumulate<ST>::type> x, int n) {
  if (__builtin_expect(n >= Simd<typename Accumulate<ST>::type>::n, 1)) return store(p, x);
  store_end(p, x, n);
}

template <class CT>
static __attribute__((noinline, cold)) vec<CT> cleared_end(vec<CT> x, int n) {
  for (int i = n; i < Simd<CT>::n; i++) x[i] = 0;
  return x;
}

// x with zeros in the other lanes.
template <class CT>
RK_INLINE vec<CT> only(vec<CT> x, int n) {
  return __builtin_expect(n >= Simd<CT>::n, 1) ? x : cleared_end<CT>(x, n);
}

// x as it will be read back from storage.
RK_INLINE vec<float> rounded(vec<float> x, float*) { return x; }
RK_INLINE vec<double> rounded(vec<double> x, double*) { return x; }
template <class ST>
RK_INLINE vec<float> rounded(vec<float> x, ST*) {
  ST buffer[Simd<float>::n];
  store(buffer, x);
  return load(buffer);
}

#ifdef RK_MADD
// Products of 16-bit integers, those of neighbours added.
RK_INLINE Simd<float>::i add_pairs(Simd<float>::i a, Simd<float>::i b) {
#if RK_VBYTES == 64
  return (Simd<float>::i)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (Simd<float>::i)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#endif

// ---- shuffles ----------------------------------------------------------------------------------------------------

#define RK_EVEN4 0, 2, 4, 6
#define RK_ODD4 1, 3, 5, 7
#define RK_EVEN8 RK_EVEN4, 8, 10, 12, 14
#define RK_ODD8 RK_ODD4, 9, 11, 13, 15
#define RK_EVEN16 RK_EVEN8, 16, 18, 20, 22, 24, 26, 28, 30
#define RK_ODD16 RK_ODD8, 17, 19, 21, 23, 25, 27, 29, 31

// Neighbouring lanes of (a, b) added: the first half comes from a, the second from b.
RK_INLINE vec<float> add_neighbours(vec<float> a, vec<float> b) {
#if RK_VBYTES == 64
  return __builtin_shufflevector(a, b, RK_EVEN16) + __builtin_shufflevector(a, b, RK_ODD16);
#elif RK_VBYTES == 32
  return __builtin_shufflevector(a, b, RK_EVEN8) + __builtin_shufflevector(a, b, RK_ODD8);
#else
  return __builtin_shufflevector(a, b, RK_EVEN4) + __builtin_shufflevector(a, b, RK_ODD4);
#endif
}
RK_INLINE vec<double> add_neighbours(vec<double> a, vec<double> b) {
#if RK_VBYTES == 64
  return __builtin_shufflevector(a, b, RK_EVEN8) + __builtin_shufflevector(a, b, RK_ODD8);
#elif RK_VBYTES == 32
  return __builtin_shufflevector(a, b, RK_EVEN4) + __builtin_shufflevector(a, b, RK_ODD4);
#else
  return __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
#endif
}

// Sums over the lanes of n vectors, one a lane.
template <class CT>
RK_INLINE vec<CT> sum_lanes(vec<CT>* a) {
#pragma GCC unroll 8
  for (int m = Simd<CT>::n; m > 1; m /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < m / 2; i++) a[i] = add_neighbours(a[2 * i], a[2 * i + 1]);
  return a[0];
}

RK_INLINE float total(vec<float> x) {
#pragma GCC unroll 4
  for (int m = Simd<float>::n; m > 1; m /= 2) x = add_neighbours(x, x);
  return x[0];
}
RK_INLINE double total(vec<double> x) {
#pragma GCC unroll 4
  for (int m = Simd<double>::n; m > 1; m /= 2) x = add_neighbours(x, x);
  return x[0];
}

// (a0 b0 a1 b1 ...) of the first and of the second halves.
RK_INLINE void zip(vec<float> a, vec<float> b, vec<float>* lo, vec<float>* hi) {
#if RK_VBYTES == 64
  *lo = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *hi = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif RK_VBYTES == 32
  *lo = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *hi = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *lo = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  *hi = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
RK_INLINE void zip(vec<double> a, vec<double> b, vec<double>* lo, vec<double>* hi) {
#if RK_VBYTES == 64
  *lo = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *hi = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif RK_VBYTES == 32
  *lo = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  *hi = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  *lo = __builtin_shufflevector(a, b, 0, 2);
  *hi = __builtin_shufflevector(a, b, 1, 3);
#endif
}

// Square transpose in place: log2(n) rounds of zip.
template <class CT>
RK_INLINE void transpose(vec<CT>* a) {
  constexpr int n = Simd<CT>::n;
  vec<CT> b[n];
#pragma GCC unroll 8
  for (int m = 1; m < n; m *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) zip(a[i], a[i + n / 2], &b[2 * i], &b[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) a[i] = b[i];
  }
}
