// Products of a few rows with a weight matrix; no include guard: included once per ISA namespace.
//
// A `Mode` says how numbers are multiplied: Plain in the accumulation type (narrower storage is widened), Pairs with
// native bf16 dot products, two neighbours along the sum in one 32-bit lane.
//
// "nt": out[m, n] = sum_k a[m, k] w[n, k], w row-major [n, k] (gate pre-activations, projections).
// "nn": out[m, n] = sum_k a[m, k] w[k, n], w row-major [k, n] (gradients).
// Packed weights are panels [k][kNV][lanes]; direct ones are read where they lie, for calls too short to pay a packing.

// Blocks of hidden units in a panel with all their gates, so that it is three or four vectors wide.
constexpr int units_in_panel(int gates) { return gates == 1 ? 4 : 1; }

template <class CT_, class ST_>
struct Plain {
  typedef CT_ CT;
  typedef ST_ ST;
  typedef CT A;                              // elements of the left side
  typedef CT W;                              // elements of packed weights
  static constexpr int kDepth = 1;           // steps of a packed product are a multiple of it
  static constexpr bool kTiles = false;      // whether packed products run in tiles
  static constexpr int kPair = 1;            // neighbours along the sum in a lane
  static constexpr int kStep = Simd<CT>::n;  // left elements in one vector
  typedef vec<CT> Wide;

  static RK_INLINE Wide load_packed(const W* p) { return load(p); }
  static RK_INLINE Wide broadcast(const A* a) { return splat(*a); }
  static RK_INLINE vec<CT> mul_add(vec<CT> acc, Wide a, Wide w) { return acc + a * w; }
  static RK_INLINE Wide load_left(const A* p) { return load(p); }
  static RK_INLINE Wide load_row(const ST* p) { return load(p); }
  static RK_INLINE Wide load_row(const ST* p, int n) { return load(p, n); }
  static RK_INLINE void store_packed(W* p, vec<CT> x) { store(p, x); }
  static RK_INLINE vec<CT> as_lanes(Wide x) { return x; }
  static RK_INLINE vec<CT> pack_two_rows(const ST* lo, const ST*, int n) { return load(lo, n); }
};

#ifdef RK_BF16
struct Pairs {
  typedef float CT;
  typedef bf16 ST;
  typedef bf16 A;
  typedef uint32_t W;
  static constexpr int kPair = 2;
#ifdef RK_AMX
  static constexpr int kDepth = 16;
  static constexpr bool kTiles = true;
#else
  static constexpr int kDepth = 1;
  static constexpr bool kTiles = false;
#endif
  static constexpr int kStep = 2 * Simd<float>::n;
  typedef u32v Wide;

  static RK_INLINE Wide load_packed(const W* p) { return *(const u32v_unaligned*)p; }
  static RK_INLINE Wide broadcast(const A* a) {
    uint32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return pair - Wide{};
  }
  static RK_INLINE vec<float> mul_add(vec<float> acc, Wide a, Wide w) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)w);
  }
  static RK_INLINE Wide load_left(const A* p) { return *(const u32v_unaligned*)p; }
  static RK_INLINE Wide load_row(const ST* p) { return *(const u32v_unaligned*)p; }
  static RK_INLINE Wide load_row(const ST* p, int n) {
    if (__builtin_expect(n >= kStep, 1)) return load_row(p);
    bf16 buffer[kStep] = {};
    for (int i = 0; i < n; i++) buffer[i] = p[i];
    return load_row(buffer);
  }
  static RK_INLINE void store_packed(W* p, vec<float> x) { *(u32v_unaligned*)p = (u32v)x; }
  static RK_INLINE vec<float> as_lanes(Wide x) { return (vec<float>)x; }
  // Rows k and k + 1 of an nn matrix as pairs; hi null: past the end.
  static RK_INLINE vec<float> pack_two_rows(const ST* lo, const ST* hi, int n) {
    u32v a = (u32v)load(lo, n) >> 16;
    return (vec<float>)(hi ? a | (u32v)load(hi, n) : a);
  }
};
#endif

// A row of storage as a left side.
template <class M>
RK_INLINE typename M::A as_left(typename M::ST x) {
  if constexpr (M::kPair == 2)
    return x;
  else
    return widen(x);
}

template <class M>
static void copy_left(const typename M::ST* from, int64_t size, int64_t padded, typename M::A* to) {
  int64_t j = 0;
  if constexpr (M::kPair == 1)
    for (; j + M::kStep <= size; j += M::kStep) store(to + j, load(from + j));
  for (; j < size; j++) to[j] = as_left<M>(from[j]);
  for (; j < padded; j++) to[j] = typename M::A{};
}

// ---- packing -----------------------------------------------------------------------------------------------------

template <class M>
static int64_t packed_steps(int64_t K) {
  return ceil_div(K, M::kPair * M::kDepth) * M::kDepth;
}

// Rows `row[v] ...` of an nt matrix [*, K] into a panel of NV vectors; rows from `valid[v]` on are zero.
template <class M>
static void pack_nt(const typename M::ST* w, int64_t K, const int64_t* row, const int* valid, int NV,
                    typename M::W* panel) {
  typedef typename M::CT CT;
  constexpr int n = Simd<CT>::n;
  int64_t steps = packed_steps<M>(K);
  for (int v = 0; v < NV; v++) {
    const typename M::ST* first = w + row[v] * K;
    for (int64_t k = 0; k < steps; k += n) {
      int left = int(K - k * M::kPair < M::kStep ? K - k * M::kPair : M::kStep);
      vec<CT> block[n];
      for (int i = 0; i < n; i++)
        block[i] = i < valid[v] ? M::as_lanes(M::load_row(first + i * K + k * M::kPair, left)) : vec<CT>{};
      transpose<CT>(block);
      int64_t count = steps - k < n ? steps - k : n;
      for (int i = 0; i < count; i++) M::store_packed(panel + ((k + i) * NV + v) * n, block[i]);
    }
  }
}

// Columns [column, column + width) of an nn matrix [K, ld] into a panel of NV vectors.
template <class M>
static void pack_nn(const typename M::ST* w, int64_t ld, int64_t K, int64_t column, int64_t width, int NV,
                    typename M::W* panel) {
  constexpr int n = Simd<typename M::CT>::n;
  int64_t steps = packed_steps<M>(K);
  for (int64_t k = 0; k < steps; k++) {
    const typename M::ST* lo = w + k * M::kPair * ld + column;
    const typename M::ST* hi = k * M::kPair + 1 < K ? lo + ld : nullptr;
    for (int v = 0; v < NV; v++) {
      int valid = int(width - v * n < n ? width - v * n : n);
      vec<typename M::CT> rows = {};
      if (k * M::kPair < K) rows = M::pack_two_rows(lo + v * n, hi ? hi + v * n : nullptr, valid);
      M::store_packed(panel + (k * NV + v) * n, rows);
    }
  }
}

// ---- packed products ---------------------------------------------------------------------------------------------

// How far ahead in its panel a single row fetches weights on processors without AVX-512. Measured on a Zen 3, one core,
// with weights in the second and third cache: 5 to 15 % less time; with more rows, and at 16 MiB, none.
constexpr int64_t kFetchBytes = 2048;

// Whether weights that a thread reads again and again stay in its second cache, of a mebibyte or more wherever there is
// AVX-512. Fetching them ahead then costs a single row 5 to 15 % on a Zen 5.
static inline bool stays_near(int64_t bytes) { return bytes <= 1 << 20; }

// The panel to fetch while panel p of a walk is read, of panels of so many words for each of their columns' blocks.
template <class W>
static inline const W* next_panel(const W* panels, const Walk& walk, int64_t p, int64_t words) {
  return stays_near(walk.range.size() * words * int64_t(sizeof(W))) ? nullptr : panels + walk.next(p) * words;
}

// out[m][v][lane] = start[m * start_row + v][lane] + sum_k a[m][at + k] panel[k][v][lane]; start null: zero. Meanwhile
// `steps` vectors from `ahead` on come into the second cache: what the hardware fetches by itself where weights lie in
// the third is 28 GB/s a core on a Sapphire Rapids, too little for tiles of few rows. Null, to a single row: nothing.
template <class M, int MR, int NV>
static __attribute__((noinline)) void packed_tile(const typename M::A* const* a, int64_t at, const typename M::W* panel,
                                                  int64_t steps, const typename M::CT* start, int start_row,
                                                  typename M::CT* out, const typename M::W* ahead) {
  typedef typename M::CT CT;
  constexpr int n = Simd<CT>::n;
  // Products of a lane that follow each other, or are slow, wait in a single row's sums: a second set takes turns.
  constexpr int kSets = MR == 1 && M::kPair > 1 ? 2 : 1;
  vec<CT> acc[kSets][MR][NV] = {};
  const typename M::A* row[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
    row[m] = a[m] + at * M::kPair;
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      if (start) acc[0][m][v] = load(start + (m * start_row + v) * n);
  }
  auto add = [&](int64_t k, vec<CT>(&sum)[MR][NV], bool fetch) RK_LAMBDA {
    if constexpr (RK_REGISTERS == 16 && MR == 1)
      for (int line = 0; line < NV * RK_VBYTES; line += 64)
        __builtin_prefetch((const char*)panel + kFetchBytes + line, 0, 3);
    else if (fetch)
      __builtin_prefetch(ahead + k * n, 0, 2);
    // The shorter side is held, the longer one read as it is used: with both held, sums would not fit into 16
    // registers.
    if constexpr (MR < NV) {
      typename M::Wide x[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) x[m] = M::broadcast(row[m] + k * M::kPair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        typename M::Wide w = M::load_packed(panel + v * n);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) sum[m][v] = M::mul_add(sum[m][v], x[m], w);
      }
    } else {
      typename M::Wide w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) w[v] = M::load_packed(panel + v * n);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        typename M::Wide x = M::broadcast(row[m] + k * M::kPair);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum[m][v] = M::mul_add(sum[m][v], x, w[v]);
      }
    }
    panel += NV * n;
  };
  auto add_all = [&](bool fetch) RK_LAMBDA {
    if constexpr (kSets == 1) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < steps; k++) add(k, acc[0], fetch);
    } else {  // unrolled further, a Zen 5 took 1.4 times as long
      int64_t k = 0;
      for (; k + 1 < steps; k += 2) add(k, acc[0], fetch), add(k + 1, acc[1], fetch);
      if (k < steps) add(k, acc[0], fetch);
    }
  };
  if (MR == 1 && !ahead)
    add_all(false);
  else
    add_all(true);
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      store(out + (m * NV + v) * n, kSets > 1 ? acc[0][m][v] + acc[kSets - 1][m][v] : acc[0][m][v]);
}

// Rows in one tile of NV vectors: as many accumulators as there are registers for.
static constexpr int max_rows(int NV) {
  return RK_REGISTERS == 32 ? (NV == 4 ? 6 : 8) : (NV == 4 ? 3 : NV == 3 ? 4 : 6);
}

template <class M, int NV>
static void packed_tile(int rows, const typename M::A* const* a, int64_t at, const typename M::W* panel, int64_t steps,
                        const typename M::CT* start, int start_row, typename M::CT* out, const typename M::W* ahead) {
  switch (rows) {
#define RK_CASE(MR)                                                                                              \
  case MR:                                                                                                       \
    if constexpr (MR <= max_rows(NV)) packed_tile<M, MR, NV>(a, at, panel, steps, start, start_row, out, ahead); \
    return;
    RK_CASE(1) RK_CASE(2) RK_CASE(3) RK_CASE(4) RK_CASE(5) RK_CASE(6) RK_CASE(7) RK_CASE(8)
#undef RK_CASE
  }
}

constexpr int64_t kTileRows = 3;

// Any number of rows times one panel: out[rows][NV][n] = start[NV][n] + product. Long sums are cut so that the piece of
// the panel and of the rows in use stays in the second cache. `next` is the panel that is read after this one; null: it
// is in the second cache already.
template <class M, int NV>
static void packed_rows(int64_t rows, const typename M::A* const* a, const typename M::W* panel,
                        const typename M::W* next, int64_t steps, const typename M::CT* start, typename M::CT* out) {
  if constexpr (M::kTiles)
    if (rows >= kTileRows) return tiled_rows<NV>(rows, a[0], a[1] - a[0], panel, steps, start, out);
  if (!next && rows > 1) next = panel;
  if (rows <= max_rows(NV)) return packed_tile<M, NV>(int(rows), a, 0, panel, steps, start, 0, out, next);
  constexpr int64_t n = Simd<typename M::CT>::n, kDepth = 512;
  int64_t tiles = ceil_div(rows, max_rows(NV)), depth = steps > 2 * kDepth ? kDepth : steps;
  for (int64_t k = 0; k < steps; k += depth) {
    int64_t some = steps - k < depth ? steps - k : depth;
    const typename M::W *piece = panel + k * NV * n, *ahead = k + depth < steps ? piece + depth * NV * n : next;
    for (int64_t tile = 0; tile < tiles; tile++) {
      Range r = share(rows, tiles, tile);
      typename M::CT* to = out + r.begin * NV * n;
      packed_tile<M, NV>(int(r.size()), a + r.begin, k, piece, some, k ? to : start, k ? NV : 0, to,
                         tile < NV ? ahead + tile * some * n : piece);
    }
  }
}

template <class M>
static void packed_rows(int64_t rows, int NV, const typename M::A* const* a, const typename M::W* panel,
                        const typename M::W* next, int64_t steps, const typename M::CT* start, typename M::CT* out) {
  switch (NV) {
    case 1:
      return packed_rows<M, 1>(rows, a, panel, next, steps, start, out);
    case 2:
      return packed_rows<M, 2>(rows, a, panel, next, steps, start, out);
    case 3:
      return packed_rows<M, 3>(rows, a, panel, next, steps, start, out);
    case 4:
      return packed_rows<M, 4>(rows, a, panel, next, steps, start, out);
  }
}

// ---- direct products ---------------------------------------------------------------------------------------------

// One vector of dot products: rows w, w + K, ... (valid of them) of an nt matrix with one left row, zero-padded to
// kStep. Four rows at a time, two sums each: few enough streams for the hardware to run ahead of, enough sums to hide
// latency.
template <class M>
static RK_INLINE vec<typename M::CT> direct_nt(const typename M::A* a, const typename M::ST* w, int64_t K, int valid) {
  typedef typename M::CT CT;
  constexpr int n = Simd<CT>::n, kRows = n < 4 ? n : 4;
  vec<CT> sum[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i += kRows) {
    vec<CT> even[kRows] = {}, odd[kRows] = {};
    const typename M::ST* row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) row[r] = w + (i + r < valid ? i + r : valid - 1) * K;
    int64_t k = 0;
    for (; k + 2 * M::kStep <= K; k += 2 * M::kStep) {
      typename M::Wide x = M::load_left(a + k), z = M::load_left(a + k + M::kStep);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        even[r] = M::mul_add(even[r], x, M::load_row(row[r] + k));
        odd[r] = M::mul_add(odd[r], z, M::load_row(row[r] + k + M::kStep));
      }
    }
    for (; k < K; k += M::kStep) {
      typename M::Wide x = M::load_left(a + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++)
        even[r] = M::mul_add(even[r], x, M::load_row(row[r] + k, K - k < M::kStep ? int(K - k) : M::kStep));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) sum[i + r] = even[r] + odd[r];
  }
  return sum_lanes<CT>(sum);
}

// out[v][lane] = sum_k a[k] w[k * ld + v * n + lane] for `width` columns.
template <class A, class ST, class CT, int NV>
static RK_INLINE void direct_nn(const A* a, const ST* w, int64_t ld, int64_t K, int64_t width, CT* out) {
  constexpr int n = Simd<CT>::n;
  vec<CT> even[NV] = {}, odd[NV] = {};  // two chains hide the latency of the additions
  int64_t k = 0;
  if (width >= NV * n) {
    for (; k + 2 <= K; k += 2) {
      vec<CT> x = splat(widen(a[k])), z = splat(widen(a[k + 1]));
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        even[v] += x * load(w + k * ld + v * n);
        odd[v] += z * load(w + (k + 1) * ld + v * n);
      }
    }
  }
  for (; k < K; k++) {
    vec<CT> x = splat(widen(a[k]));
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) even[v] += x * load(w + k * ld + v * n, int(width - v * n));
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; v++) store(out + v * n, even[v] + odd[v]);
}
