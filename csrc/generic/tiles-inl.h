// Products of bf16 rows with packed weights in AMX tiles (Intel, "Architecture Instruction Set Extensions", chapter 3);
// no include guard: included once per ISA namespace, after the panels' packing.
//
// A tile has up to 16 rows of 64 bytes. One instruction adds to 16 x 16 sums in fp32 the products of 32 neighbours
// along the sum. A panel of pairs is laid out as that instruction wants its right side: 16 steps of one vector are a
// tile.

#ifdef RK_AMX
// What the thread's tiles are set up for, and the end of that: a thread that holds tiles is slow to switch away from.
class TileState {
 public:
  // Sums and left sides of two times some rows: tiles 0, 1 and 4 have `upper`, tiles 2, 3 and 5 `lower`.
  static RK_INLINE void shape(int upper, int lower) {
    int wanted = upper << 8 | lower;
    if (current == wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } setup;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; i++) {
      setup.row_bytes[i] = 64;
      setup.rows[i] = uint8_t(rows[i]);
    }
    _tile_loadconfig(&setup);
    current = wanted;
  }
  ~TileState() {
    if (current) _tile_release();
    current = 0;
  }

 private:
  static thread_local int current;
};
thread_local int TileState::current = 0;

// Up to 16 rows times up to four vectors of a panel; out is filled with what the sums start from. `stride` is in
// elements.
template <int NV>
static void tiles_of_rows(int rows, const bf16* a, int64_t stride, const uint32_t* panel, int64_t steps, float* out) {
  constexpr int64_t kRow = NV * 64;  // bytes
  constexpr int n = 16;
  TileState::shape(rows, rows);
  _tile_loadd(0, out, kRow);
  if constexpr (NV > 1) _tile_loadd(1, out + n, kRow);
  if constexpr (NV > 2) _tile_loadd(2, out + 2 * n, kRow);
  if constexpr (NV > 3) _tile_loadd(3, out + 3 * n, kRow);
  for (int64_t k = 0; k < steps; k += 16, a += 32, panel += 16 * NV * n) {
    _tile_loadd(4, a, stride * 2);
    _tile_loadd(6, panel, kRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NV > 1) {
      _tile_loadd(7, panel + n, kRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (NV > 2) {
      _tile_loadd(6, panel + 2 * n, kRow);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (NV > 3) {
      _tile_loadd(7, panel + 3 * n, kRow);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, out, kRow);
  if constexpr (NV > 1) _tile_stored(1, out + n, kRow);
  if constexpr (NV > 2) _tile_stored(2, out + 2 * n, kRow);
  if constexpr (NV > 3) _tile_stored(3, out + 3 * n, kRow);
}

// 16 rows and `lower` more, which share what they read of the panel: one or two of its vectors.
template <int NV, int kVectors>
static void tiles_of_pairs(int lower, const bf16* a, int64_t stride, const uint32_t* panel, int64_t steps, float* out) {
  constexpr int64_t kRow = NV * 64;
  constexpr int n = 16;
  const bf16* b = a + 16 * stride;
  float* down = out + 16 * NV * n;
  TileState::shape(16, lower);
  _tile_loadd(0, out, kRow);
  _tile_loadd(2, down, kRow);
  if constexpr (kVectors > 1) _tile_loadd(1, out + n, kRow);
  if constexpr (kVectors > 1) _tile_loadd(3, down + n, kRow);
  for (int64_t k = 0; k < steps; k += 16, a += 32, b += 32, panel += 16 * NV * n) {
    _tile_loadd(4, a, stride * 2);
    _tile_loadd(6, panel, kRow);
    _tile_loadd(5, b, stride * 2);
    if constexpr (kVectors > 1) _tile_loadd(7, panel + n, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kVectors > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kVectors > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kRow);
  _tile_stored(2, down, kRow);
  if constexpr (kVectors > 1) _tile_stored(1, out + n, kRow);
  if constexpr (kVectors > 1) _tile_stored(3, down + n, kRow);
}

// What packed_rows does, for rows that lie `stride` elements apart.
template <int NV>
static void tiled_rows(int64_t rows, const bf16* a, int64_t stride, const uint32_t* panel, int64_t steps,
                       const float* start, float* out) {
  constexpr int n = 16;
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < NV; v++) store(out + (i * NV + v) * n, start ? load(start + v * n) : vec<float>{});
  int64_t i = 0;
  for (; rows - i > 16; i += 32) {
    int lower = int(rows - i < 32 ? rows - i - 16 : 16);
    float* to = out + i * NV * n;
    if constexpr (NV > 1) tiles_of_pairs<NV, 2>(lower, a + i * stride, stride, panel, steps, to);
    if constexpr (NV > 3) tiles_of_pairs<NV, 2>(lower, a + i * stride, stride, panel + 2 * n, steps, to + 2 * n);
    if constexpr (NV % 2)
      tiles_of_pairs<NV, 1>(lower, a + i * stride, stride, panel + (NV - 1) * n, steps, to + (NV - 1) * n);
  }
  if (i < rows) tiles_of_rows<NV>(int(rows - i), a + i * stride, stride, panel, steps, out + i * NV * n);
}
#else
struct TileState {};

template <int NV, class... Args>
static void tiled_rows(Args...) {}
#endif
