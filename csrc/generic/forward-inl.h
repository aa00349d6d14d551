// The forward scan: one driver for every cell, storage type and instruction set; no include guard.

template <class Cell, class M>
class ForwardScan {
  typedef typename M::CT CT;
  typedef typename M::ST ST;
  typedef typename M::A A;
  typedef typename M::W W;
  typedef vec<CT> V;
  static constexpr int n = Simd<CT>::n, G = Cell::kGates, K = Cell::kStates;
  static constexpr int kUnits = units_in_panel(G), kWide = units_in_panel(1);
  typedef Tallies<Cell, CT> Slots;
  static constexpr int64_t kFairRows = 8;  // a full tile: fewer would read the weights for too little

 public:
  static void run(const Forward& f) {
    if (f.B == 0 || f.S == 0) return copy_states(f);
    run_scan<ForwardScan>(f);
  }

  ForwardScan(const Forward& f, int max_threads) : f_(f), rows_(f) {
    projected_ = f.weights[0].w_hr != nullptr;
    blocks_ = ceil_div(f.H, n);
    out_blocks_ = ceil_div(f.P, n);
    int64_t products = G * f.H * (Cell::kDiagonal ? 1 : f.P);
    split_ = Split::choose(f, max_threads, blocks_, products, products * int64_t(sizeof(W)) / M::kPair,
                           f.gx ? 0 : G * f.H * f.I, kFairRows);
    rows_.deal(split_.rows);
    pack_hh_ = !Cell::kDiagonal && f.S >= 16 && (f.T >= 4 || f.B >= 16);
    pack_ih_ = !f.gx && f.S >= 24;
    h_stride_ = ceil_div(f.P, M::kStep) * M::kStep;
    m_stride_ = ceil_div(f.H, M::kStep) * M::kStep;
    x_stride_ = ceil_div(f.I, M::kStep) * M::kStep;
    c_stride_ = blocks_ * n;
    hh_steps_ = packed_steps<M>(f.P);
    ih_steps_ = packed_steps<M>(f.I);
    hr_steps_ = packed_steps<M>(f.H);
    x_in_place_ = sizeof(ST) == sizeof(A) && pack_ih_ && f.I % M::kPair == 0 && !M::kTiles;  // tiles: rows evenly apart
    plan_chunks();
    int64_t cells = f.S * f.N * f.H;
    prefer_large_pages(f.y, f.S * f.N * f.P * sizeof(ST));
    for (int k = 1; k < K; k++) prefer_large_pages(f.seq[k], cells * sizeof(CT));
    prefer_large_pages(f.planes, f.S * f.N * f.planes_s * sizeof(ST));
    prefer_large_pages(f.hidden, cells * sizeof(ST));
    int threads = split_.threads();
    whole_rows_ = f.options && f.options->whole_rows();
    optional_ = f.options && !f.options->only_norms();
    drops_ = f.options && f.options->drops();
    norms_x_ = whole_rows_ && !f.gx && f.options->small[kGainX];
    mem_.add(&h_, f.N * 2 * f.B * h_stride_);
    mem_.add(&left_, drops_ ? f.N * 2 * f.B * h_stride_ : 0);
    mem_.add(&c_, f.N * f.B * (K - 1) * c_stride_);
    mem_.add(&m_, projected_ ? f.N * f.B * m_stride_ : 0);
    mem_.add(&bias_hh_, f.N * blocks_ * G * n);
    mem_.add(&bias_ih_, f.N * blocks_ * G * n);
    mem_.add(&gain_ih_, norms_x_ ? f.N * blocks_ * G * n : 0);
    mem_.add(&hh_, pack_hh_ ? f.N * blocks_ * G * n * hh_steps_ : 0);
    mem_.add(&ih_, pack_ih_ ? f.N * blocks_ * G * n * ih_steps_ : 0);
    mem_.add(&hr_, pack_hh_ && projected_ ? f.N * out_blocks_ * n * hr_steps_ : 0);
    gx_size_ = f.gx ? 0 : chunk_rows_ * ceil_div(blocks_, split_.cols) * G * n;
    x_size_ = f.gx || x_in_place_ ? 0 : chunk_rows_ * x_stride_;
    mem_.add(&gx_, threads * gx_size_);
    mem_.add(&x_, threads * x_size_);
    mem_.add(&x_rows_, f.gx ? 0 : threads * chunk_rows_);
    mem_.add(&a_rows_, threads * f.B);
    mem_.add(&sums_, threads * f.B * kWide * n);
    gates_size_ = whole_rows_ ? f.B * ceil_div(blocks_, split_.cols) * G * n : 0;
    mem_.add(&gates_, threads * gates_size_);
    mem_.add(&slots_.all, whole_rows_ ? slots_.plan(threads, split_.cols, f.B) : 0);
    mem_.add(&x_slots_.all, norms_x_ ? x_slots_.plan(threads, split_.cols, chunk_rows_) : 0);
    mem_.add(&barriers_, split_.teams() + 1);
    mem_.allocate();
    for (int i = 0; i <= split_.teams(); i++) (new (barriers_ + i) Barrier)->reset(i ? split_.cols : threads);
  }

  int threads() const { return split_.threads(); }

  void work(int rank) {
    [[maybe_unused]] TileState tiles;
    prepare(rank);
    barriers_[0].wait();
    int team = rank / split_.cols;
    for (int64_t g = team / split_.rows; g < f_.N; g += split_.groups) scan(g, rank);
  }

 private:
  // The input projection goes ahead of the scan by as many steps as keep its rows in cache.
  void plan_chunks() {
    int64_t row_bytes = ceil_div(blocks_, split_.cols) * G * n * int64_t(sizeof(CT));
    int64_t rows = kChunkBytes / row_bytes < kChunkRows ? kChunkBytes / row_bytes : kChunkRows;
    int64_t batch = ceil_div(f_.B, split_.rows);
    chunk_steps_ = rows / batch < 1 ? 1 : rows / batch < f_.T ? rows / batch : f_.T;
    chunk_rows_ = chunk_steps_ * batch;
  }
  // Tiles are done with a piece of the weights so soon that it must serve more rows.
  static constexpr int64_t kChunkBytes = (M::kTiles ? 4 : 1) * 384 * 1024, kChunkRows = 192;

  static void copy_states(const Forward& f) {
    for (int k = 0; k < K; k++)
      if (size_t bytes = f.N * f.B * (k ? f.H * sizeof(CT) : f.P * sizeof(ST)))
        __builtin_memcpy(f.final_state[k], f.state[k], bytes);
  }

  void prepare(int rank);
  void pack_gates(int64_t g, int64_t block, int units);
  void pack_projection(int64_t g, int64_t block, int units);
  void enter_row(int64_t g, int64_t i);

  // Where a block of hidden units starts among the gates of all groups.
  int64_t gate(int64_t g, int64_t block) const { return (g * blocks_ + block) * G * n; }
  A* h_at(int64_t g, int parity, int64_t i) { return h_ + ((g * 2 + parity) * f_.B + i) * h_stride_; }
  // h as it meets w_hh.
  A* left_at(int64_t g, int parity, int64_t i) {
    return drops_ ? left_ + ((g * 2 + parity) * f_.B + i) * h_stride_ : h_at(g, parity, i);
  }
  // State k of those beyond h.
  CT* c_at(int64_t g, int64_t i, int k) { return c_ + ((g * f_.B + i) * (K - 1) + k - 1) * c_stride_; }
  A* m_at(int64_t g, int64_t i) { return m_ + (g * f_.B + i) * m_stride_; }

  // An initial state; null: zero.
  template <class T>
  const T* initial(int k, int64_t at) const {
    return f_.state[k] ? (const T*)f_.state[k] + at : nullptr;
  }

  // Writes columns of the left side of step t.
  void drop(int64_t g, int64_t t, int64_t i, int64_t j, int valid, V h, A* left) {
    const Options& o = *f_.options;
    h *= kept<CT>(o.h, (g * f_.B + rows_.batch_row(i)) * f_.P + j, valid);
    h *= kept<CT>(o.h_step, (rows_.at(t, i) * f_.N + g) * f_.P + j, valid);
    store(left + j, rounded(h, (ST*)nullptr), valid);
  }

  // The masks' scale and the bias, which a product of what was kept lacks: so what is kept needs no rounding. Null:
  // zero.
  __attribute__((noinline)) void scale_product(CT* sums, int64_t rows, int NV, const CT* bias) const {
    CT scale = CT(f_.options->h.scale * f_.options->h_step.scale);
    for (int64_t i = 0; i < rows; i++, sums += NV * n)
      for (int v = 0; v < NV; v++) store(sums + v * n, load(sums + v * n) * scale + (bias ? load(bias + v * n) : V{}));
  }

  // ---- one group, one share of rows, this thread's columns -------------------------------------------------------

  struct Job {
    const Weights& w;
    int64_t g;
    Deal rows;
    Range own, out;  // blocks of hidden units and of outputs
    int rank;
    Barrier& barrier;  // the team's
    CT* gx;            // [panel][row of the chunk][units][G][n]
    CT* sums;          // [row][units][G][n] of one panel
    CT* gates;         // [panel][row][units][G][n], under layer norm
    A* x;              // rows of x as left sides, where they cannot be used in place
    const A **x_rows, **a_rows;
  };

  void scan(int64_t g, int rank) {
    int col = rank % split_.cols;
    Barrier& barrier = barriers_[1 + rank / split_.cols];
    Deal rows = Deal::of(f_.B, split_.rows, rank / split_.cols % split_.rows);
    Job job{f_.weights[g],
            g,
            rows,
            share(blocks_, split_.cols, col),
            share(out_blocks_, split_.cols, col),
            rank,
            barrier,
            gx_ + rank * gx_size_,
            sums_ + rank * f_.B * kWide * n,
            gates_ + rank * gates_size_,
            x_ + rank * x_size_,
            x_rows_ + rank * chunk_rows_,
            a_rows_ + rank * f_.B};
    int64_t ahead = 0, base = 0;
    int parity = 0;
    for (int64_t step = 0; step < f_.T; step++) {
      int64_t t = job.w.reverse ? f_.T - 1 - step : step, count = rows_.alive(t, rows);
      if (!f_.gx && ahead == 0) {
        ahead = f_.T - step < chunk_steps_ ? f_.T - step : chunk_steps_;
        project_input(job, t, ahead);
        base = 0;
      }
      ahead--;
      if (count == 0) continue;
      advance(job, t, count, base, parity);
      barrier.wait();
      if (projected_) {
        project_output(job, t, count, parity);
        barrier.wait();
      }
      parity ^= 1;
      base += count;
    }
    finish(job);
  }

  // gx of this thread's columns for the next steps.
  void project_input(const Job& job, int64_t t, int64_t steps) {
    const ST* x = (const ST*)f_.x + job.g / (f_.N / f_.models) * f_.x_m;
    int64_t total = 0;
    for (int64_t s = 0; s < steps; s++) {
      int64_t u = job.w.reverse ? t - s : t + s, count = rows_.alive(u, job.rows);
      for (int64_t k = 0; k < count; k++, total++) {
        int64_t i = job.rows[k];
        const ST* from = x + rows_.at(u, i) * f_.x_s;
        if (x_in_place_) {
          job.x_rows[total] = (const A*)from;
        } else {
          copy_left<M>(from, f_.I, x_stride_, job.x + total * x_stride_);
          job.x_rows[total] = job.x + total * x_stride_;
        }
      }
    }
    Walk walk{job.own, kUnits};
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p], at = gate(job.g, b), then = gate(job.g, walk.next(p));
      product(total, walk.units(p), job.x_rows, pack_ih_ ? ih_ + at * ih_steps_ : nullptr, ih_ + then * ih_steps_,
              ih_steps_, (const ST*)job.w.w_ih, f_.I, b, norms_x_ ? nullptr : bias_ih_ + at,
              job.gx + (b - job.own.begin) * G * n * chunk_rows_);
    }
    if (__builtin_expect(norms_x_, 0) && total) normalise_input(job, total);
  }

  // [rows][units][G][n] = bias + left rows times the gates' weights of these units; bias null: zero.
  void product(int64_t rows, int units, const A* const* a, const W* panel, const W* next, int64_t steps,
               const ST* weight, int64_t K, int64_t block, const CT* bias, CT* to) {
    if (panel) return packed_rows<M>(rows, units * G, a, panel, next, steps, bias, to);
    for (int u = 0; u < units; u++)
      for (int k = 0; k < G; k++) {
        int64_t j = (block + u) * n;
        const ST* first = weight + (k * f_.H + j) * K;
        for (int64_t i = 0; i < rows; i++) {
          V sum = direct_nt<M>(a[i], first, K, int(f_.H - j < n ? f_.H - j : n));
          store(to + ((i * units + u) * G + k) * n, bias ? sum + load(bias + (u * G + k) * n) : sum);
        }
      }
  }

  // The same where each unit sees its own entry of the left row alone.
  void diagonal(int64_t rows, int units, const A* const* a, const ST* weight, int64_t block, const CT* bias, CT* to) {
    for (int u = 0; u < units; u++)
      for (int k = 0; k < G; k++) {
        int64_t j = (block + u) * n;
        V w = load(weight + k * f_.H + j, int(f_.H - j < n ? f_.H - j : n)),
          start = bias ? load(bias + (u * G + k) * n) : V{};
        for (int64_t i = 0; i < rows; i++) store(to + ((i * units + u) * G + k) * n, start + w * load(a[i] + j));
      }
  }

  // The left sides of a step times the recurrent weights of one panel; bias null: zero.
  RK_INLINE void recur(const Job& job, int64_t count, const Walk& walk, int64_t p, const CT* bias, CT* to) {
    int64_t b = walk[p];
    const W* hh = hh_ + gate(job.g, 0) * hh_steps_;
    const int64_t words = G * n * hh_steps_;
    const ST* w_hh = (const ST*)job.w.w_hh;
    if constexpr (Cell::kDiagonal)
      diagonal(count, walk.units(p), job.a_rows, w_hh, b, bias, to);
    else
      product(count, walk.units(p), job.a_rows, pack_hh_ ? hh + b * words : nullptr, next_panel(hh, walk, p, words),
              hh_steps_, w_hh, f_.P, b, bias, to);
  }

  // What step t will write of this thread's columns, for some of its rows.
  void prefetch(const Job& job, int64_t t, Range some) const {
    Range own = job.own.columns(n, f_.H);
    for (int64_t k = some.begin; k < some.end; k++) {
      int64_t at = rows_.at(t, job.rows[k]) * f_.N + job.g;
      for (int q = 0; q < Cell::kPlanes; q++)
        prefetch_columns((const ST*)f_.planes + at * f_.planes_s + q * f_.H, own, true);
      for (int k = 0; f_.product && k < G; k++)
        prefetch_columns((const CT*)f_.product + at * f_.product_s + k * f_.H, own, true);
      for (int k = 1; k < K; k++) prefetch_columns((const CT*)f_.seq[k] + at * f_.H, own, true);
    }
  }

  // One step for this thread's columns.
  void advance(const Job& job, int64_t t, int64_t count, int64_t base, int parity) {
    for (int64_t i = 0; i < count; i++) job.a_rows[i] = left_at(job.g, parity, job.rows[i]);
    if (__builtin_expect(whole_rows_, 0)) return advance_rows(job, t, count, base, parity);
    Walk walk{job.own, kUnits,
              parity != 0};  // back and forth: what the last step read last is still in the nearest cache
    int64_t ahead = job.w.reverse ? t - 1 : t + 1;
    int64_t coming = f_.planes && ahead >= 0 && ahead < f_.T ? rows_.alive(ahead, job.rows) : 0;
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p], at = gate(job.g, b);
      int units = walk.units(p);
      const CT* gx = gx_of(job, b, units, base, 0);
      prefetch(job, ahead, share(coming, walk.count(), p));
      recur(job, count, walk, p, drops_ ? nullptr : bias_hh_ + at, job.sums);
      if (__builtin_expect(drops_, 0)) scale_product(job.sums, count, units * G, bias_hh_ + at);
      for (int64_t i = 0; i < count; i++) {
        const CT* gx_row = gx ? gx + i * units * G * n : nullptr;
        CT* gh = job.sums + i * units * G * n;
        if (__builtin_expect(optional_, 0))
          optional_step_row<false>(job, t, job.rows[i], b, units, parity, gx_row, gh, {});
        else
          step_row<false, false>(job, t, job.rows[i], b, units, parity, gx_row, gh, {});
      }
    }
  }

  // How many of the hidden units from j on are in one vector.
  int lanes(int64_t j) const { return int(f_.H - j < n ? f_.H - j : n); }

  // What project_input made for row i of a step, of the panel that begins with block b; null where gx was given.
  const CT* gx_of(const Job& job, int64_t b, int units, int64_t base, int64_t i) const {
    return f_.gx ? nullptr : job.gx + (b - job.own.begin) * G * n * chunk_rows_ + (base + i) * units * G * n;
  }

  __attribute__((noinline)) void advance_rows(const Job& job, int64_t t, int64_t count, int64_t base, int parity);
  template <class F>
  RK_INLINE void of_gates(const Job& job, CT* panels, int64_t count, int64_t i, F f) const;
  void tally_rows(const Job& job, CT* panels, int64_t count, int64_t rows, const Slots& slots) const;
  RK_INLINE void gate_moments(const Job& job, const Slots& slots, int64_t row, Moments<CT>* of_gate) const;
  __attribute__((noinline)) void normalise_input(const Job& job, int64_t total);
  void tally_next_c(const Job& job, int64_t count, int64_t i);
  template <bool kOptions>
  void put_normed(const Job& job, int64_t t, int64_t count, int64_t i, int parity);

  // What layer norm makes of a row's products.
  struct RowGates {
    Moments<CT> of_gate[G];
    const ST* gain;  // null: there is none
    const CT* bias;  // of the group's first block
    CT* product;     // of the row, to keep; or null
    bool waits;      // h' for layer norm of c'
  };

  template <bool kRows>
  __attribute__((noinline)) void optional_step_row(const Job& job, int64_t t, int64_t i, int64_t block, int units,
                                                   int parity, const CT* gx, CT* gh, const RowGates& gates) {
    step_row<true, kRows>(job, t, i, block, units, parity, gx, gh, gates);
  }

  RK_INLINE void normalise(const RowGates& row, int64_t j, int valid, V* h) const {
    for (int k = 0; k < G; k++) {
      if (row.product) store(row.product + k * f_.H + j, h[k], valid);
      if (row.gain) h[k] = row.of_gate[k].normed(h[k]) * load(row.gain + k * f_.H + j, valid);
      h[k] += load(row.bias + j * G + k * n);
    }
  }

  RK_INLINE void load_gates(const Job& job, int64_t row, int64_t j, int valid, const CT* gx, const CT* gh, V* x,
                            V* h) const {
    const ST* given = (const ST*)f_.gx + row * f_.gx_s + job.g * f_.gx_n + j;
    for (int k = 0; k < G; k++) {
      x[k] = gx ? load(gx + k * n) : load(given + k * f_.H, valid);
      h[k] = load(gh + k * n);
    }
  }

  StepOptions<V, CT> options_at(const Job& job, int64_t at, int64_t j, int valid) const {
    const Options& o = *f_.options;
    return step_options<CT, ST>(o, o.small ? o.small + job.g * kSmalls : nullptr, at, j, valid, {}, nullptr, 0);
  }

  // One panel of a row. Where h' must wait, c' is left in place of gh, and the gate that h' needs.
  template <bool kOptions, bool kRows>
  RK_INLINE void step_row(const Job& job, int64_t t, int64_t i, int64_t block, int units, int parity, const CT* gx,
                          CT* gh, const RowGates& gates) {
    int64_t row = rows_.at(t, i), at = row * f_.N + job.g, b = rows_.batch_row(i);
    bool restart = resets_next(job, t, i);
    for (int u = 0; u < units; u++) {
      int64_t j = (block + u) * n;
      int valid = int(f_.H - j < n ? f_.H - j : n);
      V x[G], h[G], state[K], plane[Cell::kPlanes];
      load_gates(job, row, j, valid, gx ? gx + u * G * n : nullptr, gh + u * G * n, x, h);
      if (kRows) normalise(gates, j, valid, h);
      if (Cell::kReadsH) state[0] = load(h_at(job.g, parity, i) + j);
      for (int k = 1; k < K; k++) state[k] = load(c_at(job.g, i, k) + j);
      if constexpr (kOptions) {
        V c0 = state[K - 1];
        Cell::step(x, h, state, plane, options_at(job, at * f_.H, j, valid));
        if constexpr (kRows && K == 2) store(gh + u * G * n, state[1]);
        if (K == 2 && f_.options->zones(1))
          state[K - 1] = mixed(stays<CT>(*f_.options, 1, at * f_.H + j, valid), c0, state[K - 1]);
      } else {
        Cell::step(x, h, state, plane, NoOptions());
        if constexpr (kRows && K == 2) store(gh + u * G * n, state[1]);
      }
      if constexpr (kRows && K == 2) store(gh + (u * G + 1) * n, plane[Cell::kOutputGate]);
      if (f_.planes)
        for (int q = 0; q < Cell::kPlanes; q++)
          store((ST*)f_.planes + at * f_.planes_s + q * f_.H + j, plane[q], valid);
      for (int k = 1; k < K; k++) {
        if (f_.seq[k]) store((CT*)f_.seq[k] + at * f_.H + j, state[k], valid);
        if (restart) {
          const CT* c = reset_value<CT>(f_, k, job.g, b);
          state[k] = c ? load(c + j, valid) : V{};
        }
        store(c_at(job.g, i, k) + j, state[k]);
      }
      if (!(kRows && K == 2 && gates.waits)) put_m<kOptions>(job, t, i, parity, at, j, valid, state[0], restart);
    }
  }

  // What the cell gives out: h', or what is projected to it.
  template <bool kOptions>
  RK_INLINE void put_m(const Job& job, int64_t t, int64_t i, int parity, int64_t at, int64_t j, int valid, V m,
                       bool restart) {
    if (!projected_) return put_h<kOptions>(job, t, i, parity, at, j, valid, m, restart);
    if (f_.hidden) store((ST*)f_.hidden + at * f_.H + j, m, valid);
    store(m_at(job.g, i) + j, rounded(m, (ST*)nullptr), valid);
  }

  bool resets_next(const Job& job, int64_t t, int64_t i) const {
    if (!f_.reset) return false;
    int64_t next = rows_.next(t, i, job.w.reverse);
    return next >= 0 && rows_.resets(rows_.at(next, i), job.g);
  }

  template <bool kOptions>
  RK_INLINE void put_h(const Job& job, int64_t t, int64_t i, int parity, int64_t at, int64_t j, int valid, V h,
                       bool restart) {
    if (kOptions && f_.options->zones(0))
      h = mixed(stays<CT>(*f_.options, 0, at * f_.P + j, valid), load(h_at(job.g, parity, i) + j), h);
    store((ST*)f_.y + at * f_.P + j, h, valid);
    if (__builtin_expect(restart, 0)) {
      const ST* fresh = reset_value<ST>(f_, 0, job.g, rows_.batch_row(i));
      h = fresh ? load(fresh + j, valid) : V{};
    }
    store(h_at(job.g, parity ^ 1, i) + j, rounded(h, (ST*)nullptr), valid);
    if (kOptions && drops_) {
      int64_t next = rows_.next(t, i, job.w.reverse);
      if (next >= 0) drop(job.g, next, i, j, valid, h, left_at(job.g, parity ^ 1, i));
    }
  }

  __attribute__((noinline)) void optional_put_h(const Job& job, int64_t t, int64_t i, int parity, int64_t at, int64_t j,
                                                int valid, V h, bool restart) {
    put_h<true>(job, t, i, parity, at, j, valid, h, restart);
  }

  // h' = m W_hr^T for this thread's outputs.
  void project_output(const Job& job, int64_t t, int64_t count, int parity) {
    for (int64_t i = 0; i < count; i++) job.a_rows[i] = m_at(job.g, job.rows[i]);
    Walk walk{job.out, 4};
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p];
      int units = walk.units(p);
      if (pack_hh_) {
        const W* hr = hr_ + job.g * out_blocks_ * n * hr_steps_;
        packed_rows<M>(count, units, job.a_rows, hr + b * n * hr_steps_, hr + walk.next(p) * n * hr_steps_, hr_steps_,
                       nullptr, job.sums);
      } else {
        for (int64_t i = 0; i < count; i++)
          for (int u = 0; u < units; u++) {
            int64_t j = (b + u) * n;
            const ST* first = (const ST*)job.w.w_hr + j * f_.H;
            store(job.sums + (i * units + u) * n,
                  direct_nt<M>(job.a_rows[i], first, f_.H, int(f_.P - j < n ? f_.P - j : n)));
          }
      }
      for (int64_t i = 0; i < count; i++)
        for (int u = 0; u < units; u++) {
          int64_t j = (b + u) * n, row = job.rows[i];
          int64_t at = rows_.at(t, row) * f_.N + job.g;
          int valid = int(f_.P - j < n ? f_.P - j : n);
          bool restart = resets_next(job, t, row);
          V h = load(job.sums + (i * units + u) * n);
          if (__builtin_expect(optional_, 0))
            optional_put_h(job, t, row, parity, at, j, valid, bounded(h, CT(f_.options->proj_clip)), restart);
          else
            put_h<false>(job, t, row, parity, at, j, valid, h, restart);
        }
    }
  }

  // Final states of this thread's columns: h as y has it; c as it stands.
  void finish(const Job& job) {
    Range h_cols = (projected_ ? job.out : job.own).columns(n, f_.P), c_cols = job.own.columns(n, f_.H);
    for (int64_t k = 0; k < job.rows.size; k++) {
      int64_t i = job.rows[k];
      int64_t to = job.g * f_.B + rows_.batch_row(i);
      const ST* h = initial<ST>(0, to * f_.P);
      if (rows_.length(i)) h = (const ST*)f_.y + (rows_.at(rows_.last(i, job.w.reverse), i) * f_.N + job.g) * f_.P;
      if (f_.final_state[0]) copy_columns(h, (ST*)f_.final_state[0] + to * f_.P, h_cols);
      for (int k = 1; k < K; k++) {
        const CT* c = rows_.length(i) ? c_at(job.g, i, k) : initial<CT>(k, to * f_.H);
        copy_columns(c, (CT*)f_.final_state[k] + to * f_.H, c_cols);
      }
    }
  }

  const Forward& f_;
  Rows rows_;
  Split split_;
  Scratch mem_;
  Slots slots_, x_slots_;
  bool projected_, whole_rows_, optional_, drops_, norms_x_, pack_hh_, pack_ih_, x_in_place_;
  int64_t blocks_, out_blocks_, h_stride_, m_stride_, x_stride_, c_stride_, hh_steps_, ih_steps_, hr_steps_;
  int64_t chunk_steps_, chunk_rows_, gx_size_, x_size_, gates_size_;
  A *h_, *left_, *m_, *x_;
  const A **x_rows_, **a_rows_;
  CT *sums_, *gates_, *c_, *bias_hh_, *bias_ih_, *gain_ih_, *gx_;
  W *hh_, *ih_, *hr_;
  Barrier* barriers_;
};
