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

// A left row as bytes: 16-bit integers plus 2^15, their high and their low halves apart.
struct Bytes {
  uint8_t *high, *low;
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

#ifdef RK_VNNI
static void to_bytes(const float* a, int64_t size, Bytes* to) {
  constexpr int n = Simd<float>::n;
  vec<float> largest = {}, strange = {};
  for (int64_t j = 0; j < size; j += n) {
    vec<float> x = load(a + j, int(size - j < n ? size - j : n));
    largest = at_least((vec<float>)((Simd<float>::i)x & INT32_MAX), largest);
    strange += x - x;  // NaN from infinities too
  }
  to->scale = strange[0];
  if (_mm512_cmp_ps_mask((__m512)strange, (__m512)strange, _CMP_UNORD_Q)) {
    to->scale = __builtin_nanf("");
    return;
  }
  constexpr float kMost = 32767, kNothing = 1e-30f;  // smaller rows are zero: their scale would not be a normal number
  float most = _mm512_reduce_max_ps((__m512)largest), up = most > kNothing ? kMost / most : 0;
  to->scale = most > kNothing ? most / kMost : 0;
  for (int64_t j = 0; j < size; j += n) {
    vec<float> x = load(a + j, int(size - j < n ? size - j : n)) * up;
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_set1_epi32(1 << 15));
    _mm_storeu_si128((__m128i*)(to->high + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
    _mm_storeu_si128((__m128i*)(to->low + j), _mm512_cvtepi32_epi8(q));
  }
}

static RK_INLINE __m512i four_bytes(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// Exact in integers up to 2^16 elements along the sum: a byte product is below 2^15.
template <int MR, int NV>
static __attribute__((noinline)) void byte_tile(const Bytes* a, const uint32_t* panel, int64_t steps,
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
      __m512i h = four_bytes(a[m].high + 4 * k), l = four_bytes(a[m].low + 4 * k);
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
      sum *= load(columns.scale + v * n) * a[m].scale;
      store(out + (m * NV + v) * n, start ? sum + load(start + v * n) : sum);
    }
}

template <int NV>
static void byte_rows(int64_t rows, const float* const* a, const Bytes* bytes, const uint32_t* panel, int64_t steps,
                      const float* start, Columns columns, float* out) {
  constexpr int n = Simd<float>::n, kRows = 3;
  for (int64_t i = 0; i < rows; i += kRows, out += kRows * NV * n) {
    int some = int(rows - i < kRows ? rows - i : kRows);
    float scales = 0;
    for (int m = 0; m < some; m++) scales += bytes[i + m].scale;
    if (scales != scales)
      scaled_rows<Quarters>(some, NV, a + i, panel, panel, steps, start, columns, out);
    else if (some == 3)
      byte_tile<3, NV>(bytes + i, panel, steps, start, columns, out);
    else if (some == 2)
      byte_tile<2, NV>(bytes + i, panel, steps, start, columns, out);
    else
      byte_tile<1, NV>(bytes + i, panel, steps, start, columns, out);
  }
}
#endif
