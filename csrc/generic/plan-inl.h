// How a scan is laid out in memory and over threads, forward and backward alike; no include guard: included once per
// ISA namespace.
//
// A thread works on a group, a share of the batch rows and a share of the columns. Threads that share a group and rows
// are a team: they meet at a barrier once a step. Batch rows are sorted by descending length and dealt to the shares in
// turn, so that every share lives as long as the others and its rows alive at a step are its first ones. The rows of a
// share are neighbours in every buffer: no core's prefetcher reaches into rows that another one writes.

// One share of the batch rows: places [begin, begin + size) in the order of Rows, dealt at turn `turn` of `turns`.
struct Deal {
  int64_t begin, size, turn, turns;
  int64_t operator[](int64_t k) const { return begin + k; }

  static Deal of(int64_t B, int64_t turns, int64_t turn) {
    int64_t extra = B % turns;  // the first shares have a row more
    return {B / turns * turn + (turn < extra ? turn : extra), B / turns + (turn < extra), turn, turns};
  }
  // How many of this share are among the `total` longest rows.
  int64_t among(int64_t total) const { return total <= turn ? 0 : ceil_div(total - turn, turns); }
};

struct Split {
  int groups = 1;  // worked on at once
  int rows = 1;    // shares of the batch
  int cols = 1;    // threads in a team

  int threads() const { return groups * rows * cols; }
  int teams() const { return groups * rows; }

  // Both directions at once where the threads allow it, no barrier then being needed. Then rows, as long as each share
  // has `fair_rows`: what threads of a team pass to one another at every step costs more than reading all the weights,
  // unless these come from far away. Then columns, where a row may be cut. `products` is the multiplications of one row
  // in one step of one group, `weight_bytes` what it reads of weights for them, `ahead` the multiplications of its
  // input projection.
  static Split choose(const Scan& call, int threads, int64_t column_blocks, int64_t products, int64_t weight_bytes,
                      int64_t ahead, int64_t fair_rows) {
    if (weight_bytes > near_weights()) fair_rows = kFairRowsFar;
    Split s;
    int64_t rows = call.B < 2 ? 2 : call.B;  // one row is bound by the weights' bytes: it takes as long as two
    if (call.T * rows * call.N * (products + ahead) < kWorthARegion) threads = 1;
    for (int g = threads; g >= 1; g--)
      if (threads % g == 0 && call.N % g == 0) {
        s.groups = g;
        break;
      }
    s.cols = threads / s.groups;
    for (int r = s.cols; r > 1; r--)
      if (s.cols % r == 0 && call.B >= r * fair_rows) {
        s.rows = r;
        s.cols /= r;
        break;
      }
    if (s.cols > column_blocks) s.cols = int(column_blocks);
    if (call.T > 1)
      while (s.cols > 1 && rows / s.rows * products / s.cols < kWorthABarrier) s.cols /= 2;
    return s;
  }

  static constexpr int64_t kFairRowsFar = 32;
  static constexpr int64_t kWorthARegion = 600 * 1000;  // about 10 us on one core
  static constexpr int64_t kWorthABarrier = 50 * 1000;  // about 1 us: a barrier and the other threads' share of h

  // Who packs panel `index` of share `col` of group g: a thread that will read it, so that it starts out in its cache.
  int packer(int64_t g, int col, int64_t index) const { return int((g % groups * rows + index % rows) * cols + col); }
};

// Where rows lie and how long they live.
class Rows {
 public:
  explicit Rows(const Scan& s) : s_(s), alive_(nullptr), order_(nullptr), memory_(nullptr) {
    if (!s.lengths) return;
    memory_ = new int64_t[s.B + s.T + 1];
    order_ = memory_;
    alive_ = memory_ + s.B;
    for (int64_t t = 0; t <= s.T; t++) alive_[t] = 0;
    for (int64_t b = 0; b < s.B; b++) alive_[s.lengths[b]]++;           // rows of each length
    for (int64_t t = s.T - 1; t >= 0; t--) alive_[t] += alive_[t + 1];  // of at least each length
    // Counting sort, longest first, stable: rows longer than L come before those of length L.
    for (int64_t b = s.B - 1; b >= 0; b--) order_[--alive_[s.lengths[b]]] = b;
    // Each entry now counts the rows strictly longer than its index: those alive at that step.
  }
  ~Rows() { delete[] memory_; }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  // Puts the rows of each share together; before that they lie by length alone.
  void deal(int64_t turns) {
    if (!order_ || turns == 1) return;
    int64_t* sorted = new int64_t[s_.B];
    for (int64_t i = 0; i < s_.B; i++) sorted[i] = order_[i];
    for (int64_t turn = 0, i = 0; turn < turns; turn++)
      for (int64_t k = turn; k < s_.B; k += turns) order_[i++] = sorted[k];
    delete[] sorted;
  }

  int64_t batch_row(int64_t i) const { return order_ ? order_[i] : i; }
  int64_t length(int64_t i) const { return order_ ? s_.lengths[order_[i]] : s_.T; }
  // How many rows of a share are alive at step t: its first ones.
  int64_t alive(int64_t t, const Deal& rows) const { return alive_ ? rows.among(alive_[t]) : rows.size; }
  int64_t at(int64_t t, int64_t i) const { return (s_.offsets ? s_.offsets[t] : t * s_.B) + batch_row(i); }

  // The step after t in a group's own direction, or -1 where the row ends there.
  int64_t next(int64_t t, int64_t i, bool reverse) const {
    int64_t u = reverse ? t - 1 : t + 1;
    return u < length(i) ? u : -1;
  }
  int64_t first(int64_t i, bool reverse) const { return reverse ? length(i) - 1 : 0; }
  int64_t last(int64_t i, bool reverse) const { return reverse ? 0 : length(i) - 1; }

  bool resets(int64_t row, int64_t n) const { return s_.reset && s_.reset[row * s_.reset_s + n * s_.reset_n]; }

 private:
  const Scan& s_;
  int64_t* alive_;
  int64_t* order_;
  int64_t* memory_;
};

// Pointer to the state that replaces state k of batch row b of group n; null: zero.
template <class T>
static RK_INLINE const T* reset_value(const Scan& s, int k, int64_t n, int64_t b) {
  if (!s.reset_state[k]) return nullptr;
  return (const T*)s.reset_state[k] + n * s.reset_state_n[k] + b * s.reset_state_b[k];
}

template <class Scan>
static void run_rank(void* scan, int rank) {
  ((Scan*)scan)->work(rank);
}

// Plans and runs a scan; where the runtime gives fewer threads than were asked for, once more on one.
template <class Scan, class Call>
static void run_scan(const Call& call) {
  {
    Scan scan(call, call.threads);
    if (run_parallel(scan.threads(), run_rank<Scan>, &scan)) return;
  }
  Scan scan(call, 1);
  run_parallel(1, run_rank<Scan>, &scan);
}
