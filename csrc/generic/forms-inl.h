// How streams keep their weights: modes of packed products beside those of product-inl.h; no include guard.
//
// A panel is [step][vector][lane][kPair] elements `Kept`. bf16 and int8 share a 32-bit lane with their neighbours along
// the sum and are widened in registers, so that left sides stay what they are: only the weights are rounded.

template <class CT_>
struct Whole : Plain<CT_, CT_> {
  typedef CT_ Kept;
  static constexpr bool kScaled = false;
};

struct Halves {
  typedef float CT;
  typedef float A;
  typedef uint32_t W;
  typedef bf16 Kept;
  static constexpr int kPair = 2, kDepth = 1;
  static constexpr bool kTiles = false, kScaled = false;
  struct Wide {
    vec<float> lo, hi;
  };

  static RK_INLINE Wide load_packed(const W* p) {
    u32v w = *(const u32v_unaligned*)p;
    return {(vec<float>)(w << 16), (vec<float>)(w & 0xffff0000)};
  }
  static RK_INLINE Wide broadcast(const A* a) { return {splat(a[0]), splat(a[1])}; }
  static RK_INLINE vec<float> mul_add(vec<float> acc, Wide a, Wide w) { return acc + a.lo * w.lo + a.hi * w.hi; }
};

// int8, whose scale is left to the caller.
struct Quarters {
  typedef float CT;
  typedef float A;
  typedef uint32_t W;
  typedef int8_t Kept;
  static constexpr int kPair = 4, kDepth = 1;
  static constexpr bool kTiles = false, kScaled = true;
  struct Wide {
    vec<float> part[4];
  };

  static RK_INLINE Wide load_packed(const W* p) {
    u32v w = *(const u32v_unaligned*)p;
    Wide wide;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      wide.part[i] = __builtin_convertvector((Simd<float>::i)(w << (24 - 8 * i)) >> 24, vec<float>);
    return wide;
  }
  static RK_INLINE Wide broadcast(const A* a) { return {{splat(a[0]), splat(a[1]), splat(a[2]), splat(a[3])}}; }
  static RK_INLINE vec<float> mul_add(vec<float> acc, Wide a, Wide w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) acc += a.part[i] * w.part[i];
    return acc;
  }
};

#ifdef RK_BF16
// Both sides in bf16. Without tiles: rows of a stream need not lie evenly apart.
struct RowPairs : Pairs {
  typedef bf16 Kept;
  static constexpr int kDepth = 1;
  static constexpr bool kTiles = false, kScaled = false;
};
#else
typedef Halves RowPairs;
#endif

// Rows of w [*, K], n of them at most, into vector v of a panel of NV. A lane is a word of kPair neighbours in every
// form, so that squares of words are turned; the lanes of rows that are not there are left or zero, as they were.
template <class M>
static void pack_lanes(const typename M::Kept* w, int64_t K, int rows, typename M::W* panel, int NV, int v) {
  typedef typename M::CT CT;
  constexpr int n = Simd<CT>::n;
  static_assert(sizeof(typename M::W) == sizeof(CT) && M::kPair * sizeof(typename M::Kept) == sizeof(CT), "");
  int64_t k = 0;  // words
  for (; k + n <= K / M::kPair; k += n) {
    vec<CT> block[n];
    for (int i = 0; i < n; i++) {
      block[i] = vec<CT>{};
      if (i < rows) __builtin_memcpy(&block[i], w + i * K + k * M::kPair, sizeof(vec<CT>));
    }
    transpose<CT>(block);
    for (int i = 0; i < n; i++) __builtin_memcpy(panel + ((k + i) * NV + v) * n, &block[i], sizeof(vec<CT>));
  }
  typename M::Kept* to = (typename M::Kept*)panel;
  for (int i = 0; i < rows; i++)
    for (int64_t j = k * M::kPair; j < K; j++)
      to[((j / M::kPair * NV + v) * n + i) * M::kPair + j % M::kPair] = w[i * K + j];
}

// ---- int8 ----------------------------------------------------------------------------------------------------------

// What a panel of int8 is read with: a scale for each column and, for products of bytes, -128 times its sum.
struct Columns {
  const float* scale;
  const int32_t* offset;
};

// A left row as 16-bit integers: their high halves plus 128 and, `plane` further, their low ones, or, where pairs are
// multiplied, words of four neighbours in the order 0, 2, 1, 3.
struct Integers {
  uint8_t* at;
  int64_t plane;
  float scale;  // NaN where the row has an infinity or a NaN: then it has no such form
};

// out[m][NV][n] = start + scale * (a panel), left sides as they are.
template <class M>
static void scaled_rows(int64_t rows, int NV, const float* const* a, const uint32_t* panel, const uint32_t* next,
                        int64_t steps, const float* start, Columns columns, float* out) {
  constexpr int n = Simd<float>::n;
  packed_rows<M>(rows, NV, a, panel, next, steps, nullptr, out);
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < NV; v++) {
      float* to = out + (i * NV + v) * n;
      vec<float> sum = load(to) * load(columns.scale + v * n);
      store(to, start ? sum + load(start + v * n) : sum);
    }
}

#if defined(RK_VNNI) || defined(RK_MADD)
#define RK_INTEGERS

// A vector of a row's integers, the first of which is element j.
static RK_INLINE void put(const Integers& to, int64_t j, Simd<float>::i x) {
#ifdef RK_VNNI
  x += 1 << 15;
  _mm_storeu_si128((__m128i*)(to.at + j), _mm512_cvtepi32_epi8((__m512i)(x >> 8)));
  _mm_storeu_si128((__m128i*)(to.at + to.plane + j), _mm512_cvtepi32_epi8((__m512i)x));
#else
  typedef int16_t Half __attribute__((vector_size(RK_VBYTES / 2), aligned(2), may_alias));
#define RK_WORD(i) i, i + 2, i + 1, i + 3
#if RK_VBYTES == 64
  x = __builtin_shufflevector(x, x, RK_WORD(0), RK_WORD(4), RK_WORD(8), RK_WORD(12));
#else
  x = __builtin_shufflevector(x, x, RK_WORD(0), RK_WORD(4));
#endif
#undef RK_WORD
  *(Half*)(to.at + 2 * j) = __builtin_convertvector(x, Half);
#endif
}

static void to_integers(const float* a, int64_t size, Integers* to) {
  typedef Simd<float>::i I;
  constexpr int n = Simd<float>::n;
  constexpr float kMost = 32767, kNothing = 1e-30f;  // smaller rows are zero: their scale would not be a normal number
  vec<float> largest = {}, strange = {};
  for (int64_t j = 0; j < size; j += n) {
    vec<float> x = load(a + j, int(size - j < n ? size - j : n));
    largest = at_least((vec<float>)((I)x & INT32_MAX), largest);
    strange += x - x;  // NaN, from infinities too
  }
  to->scale = total(strange);
  if (to->scale != to->scale) return;
  float most = 0;
  for (int i = 0; i < n; i++) most = largest[i] > most ? largest[i] : most;
  float up = most > kNothing ? kMost / most : 0;
  to->scale = most > kNothing ? most / kMost : 0;
  for (int64_t j = 0; j < size; j += n) {
    vec<float> x = load(a + j, int(size - j < n ? size - j : n)) * up;
    put(*to, j, (I)(x + Exp<float>::magic) - (I)splat(Exp<float>::magic));  // the nearest
  }
}

// Four bytes in every lane.
static RK_INLINE Simd<float>::i word(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return four - Simd<float>::i{};
}

// start + scale * sum of an integer product.
static RK_INLINE void put_scaled(vec<float> sum, const Integers& a, Columns columns, const float* start, int64_t v,
                                 float* out) {
  sum *= load(columns.scale + v) * a.scale;
  store(out + v, start ? sum + load(start + v) : sum);
}
#endif

#ifdef RK_VNNI
// Exact in integers up to 2^16 elements along the sum: a byte product is below 2^15.
template <int MR, int NV>
static __attribute__((noinline)) void integer_tile(const Integers* a, const uint32_t* panel, int64_t steps,
                                                   const float* start, Columns columns, float* out) {
  constexpr int n = Simd<float>::n;
  __m512i high[MR][NV], low[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      high[m][v] = _mm512_loadu_si512(columns.offset + v * n);
      low[m][v] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
  for (int64_t k = 0; k < steps; k++, panel += NV * n) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      __m512i h = (__m512i)word(a[m].at + 4 * k), l = (__m512i)word(a[m].at + a[m].plane + 4 * k);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        __m512i w = _mm512_loadu_si512(panel + v * n);
        high[m][v] = _mm512_dpbusd_epi32(high[m][v], h, w);
        low[m][v] = _mm512_dpbusd_epi32(low[m][v], l, w);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      vec<float> sum = (vec<float>)_mm512_cvtepi32_ps(high[m][v]) * 256 + (vec<float>)_mm512_cvtepi32_ps(low[m][v]);
      put_scaled(sum, a[m], columns, start, v * n, out + m * NV * n);
    }
}
#elif defined(RK_MADD)
// Exact in integers for 128 words along the sum: a product is 2^22 at most, and four are added in a word. Then these go
// to sums in fp32.
template <int MR, int NV>
static __attribute__((noinline)) void integer_tile(const Integers* a, const uint32_t* panel, int64_t steps,
                                                   const float* start, Columns columns, float* out) {
  typedef Simd<float>::i I;
  typedef int16_t Shorts __attribute__((vector_size(RK_VBYTES)));
  constexpr int n = Simd<float>::n;
  constexpr int64_t kExact = 128;
  vec<float> whole[MR][NV] = {};
  for (int64_t first = 0; first < steps; first += kExact) {
    int64_t end = steps - first < kExact ? steps : first + kExact;
    I sum[MR][NV] = {};
#pragma GCC unroll 2
    for (int64_t k = first; k < end; k++, panel += NV * n) {
      I x[MR][2];
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) x[m][0] = word(a[m].at + 8 * k), x[m][1] = word(a[m].at + 8 * k + 4);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        Shorts w = (Shorts)(*(const u32v_unaligned*)(panel + v * n)), even = w << 8 >> 8, odd = w >> 8;
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) sum[m][v] += add_pairs(x[m][0], (I)even) + add_pairs(x[m][1], (I)odd);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) whole[m][v] += __builtin_convertvector(sum[m][v], vec<float>);
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) put_scaled(whole[m][v], a[m], columns, start, v * n, out + m * NV * n);
}
#endif

#ifdef RK_INTEGERS
template <int NV>
static void integer_rows(int64_t rows, const float* const* a, const Integers* integers, const uint32_t* panel,
                         int64_t steps, const float* start, Columns columns, float* out) {
  constexpr int n = Simd<float>::n, kRows = RK_REGISTERS == 32 ? 3 : 2;
  for (int64_t i = 0; i < rows; i += kRows, out += kRows * NV * n) {
    int some = int(rows - i < kRows ? rows - i : kRows);
    float scales = 0;
    for (int m = 0; m < some; m++) scales += integers[i + m].scale;
    if (scales != scales)
      scaled_rows<Quarters>(some, NV, a + i, panel, panel, steps, start, columns, out);
    else if (some == kRows)
      integer_tile<kRows, NV>(integers + i, panel, steps, start, columns, out);
    else if (some == 2)
      integer_tile<2, NV>(integers + i, panel, steps, start, columns, out);
    else
      integer_tile<1, NV>(integers + i, panel, steps, start, columns, out);
  }
}
#endif
