// The backward scan: one driver for every cell, storage type and instruction set; no include guard.

template <class Cell, class M>
class BackwardScan {
  typedef typename M::CT CT;
  typedef typename M::ST ST;
  typedef typename M::A A;
  typedef typename M::W W;
  typedef vec<CT> V;
  static constexpr int n = Simd<CT>::n, G = Cell::kGates, K = Cell::kStates, Q = Cell::kPlanes;
  typedef Tallies<Cell, CT> Slots;
  // What a step has beyond the plain one: nothing, layer norm of c alone, or what there is.
  enum Steps { kPlain, kNormed, kAny };
  static constexpr int64_t kFairRows =
      2;  // threads of a team pass all gate gradients to one another: G times what goes forward

 public:
  static void run(const Backward& f) {
    if (f.B == 0 || f.S == 0) return copy_gradients(f);
    run_scan<BackwardScan>(f);
  }

  BackwardScan(const Backward& f, int max_threads) : f_(f), rows_(f) {
    projected_ = f.weights[0].w_hr != nullptr;
    zones_h_ = f.options && f.options->zones(0);
    blocks_ = ceil_div(f.H, n);
    out_blocks_ = ceil_div(f.P, n);
    int64_t products = G * f.H * (Cell::kDiagonal ? 1 : f.P);
    split_ = Split::choose(f, max_threads, blocks_, products, products * int64_t(sizeof(W)) / M::kPair, 0, kFairRows);
    rows_.deal(split_.rows);
    pack_ = !Cell::kDiagonal && f.T >= 4 && f.S >= 16;
    c_stride_ = blocks_ * n;
    h_stride_ = out_blocks_ * n;
    d_stride_ = ceil_div(f.P, M::kStep) * M::kStep;
    g_stride_ = ceil_div(G * f.H, M::kStep) * M::kStep;
    hh_steps_ = packed_steps<M>(G * f.H);
    hr_steps_ = packed_steps<M>(f.P);
    int64_t rows = f.N * f.B;
    whole_rows_ = f.options && f.options->whole_rows();
    optional_ = f.options && !f.options->only_norms();
    rows_together_ = split_.cols > 1 ? f.B : 4;  // one alone would wait for its own sums
    small_size_ = f.dsmall ? (kSmalls + G) * c_stride_ : 0;
    prefer_large_pages(f.dgx, f.S * f.N * G * f.H * sizeof(ST));
    prefer_large_pages(f.dgh, f.S * f.N * G * f.H * sizeof(ST));
    prefer_large_pages(f.dproduct, f.S * f.N * G * f.H * sizeof(ST));
    mem_.add(&dh_, rows * h_stride_);
    mem_.add(&dc_, rows * (K - 1) * c_stride_);
    mem_.add(&dg_, 2 * rows * g_stride_);
    mem_.add(&dp_, projected_ ? rows * d_stride_ : 0);
    mem_.add(&fresh_h_, f.dreset_state[0] ? rows * h_stride_ : 0);
    mem_.add(&fresh_c_, f.dreset_state[0] ? rows * (K - 1) * c_stride_ : 0);
    mem_.add(&hh_, pack_ ? f.N * out_blocks_ * n * hh_steps_ : 0);
    mem_.add(&hr_, pack_ && projected_ ? f.N * blocks_ * n * hr_steps_ : 0);
    mem_.add(&sums_, threads() * f.B * 4 * n);
    mem_.add(&a_rows_, threads() * f.B);
    mem_.add(&d_rows_, whole_rows_ ? threads() * f.B * c_stride_ : 0);
    mem_.add(&held_, whole_rows_ ? threads() * rows_together_ * kHeld * c_stride_ : 0);
    mem_.add(&slots_.all, whole_rows_ ? slots_.plan(threads(), split_.cols, f.B) : 0);
    mem_.add(&small_, f.N * split_.rows * small_size_);
    mem_.add(&barriers_, split_.teams() + 1);
    mem_.allocate();
    for (int i = 0; i <= split_.teams(); i++) (new (barriers_ + i) Barrier)->reset(i ? split_.cols : split_.threads());
  }

  int threads() const { return split_.threads(); }

  void work(int rank) {
    [[maybe_unused]] TileState tiles;
    prepare(rank);
    barriers_[0].wait();
    int team = rank / split_.cols;
    for (int64_t g = team / split_.rows; g < f_.N; g += split_.groups) scan(g, rank);
    if (!f_.dsmall) return;
    barriers_[0].wait();
    if (rank == 0) add_small();
  }

 private:
  static void copy_gradients(const Backward& f) {
    for (int k = 0; k < K; k++)
      if (size_t bytes = f.N * f.B * (k ? f.H * sizeof(CT) : f.P * sizeof(ST)))
        __builtin_memcpy(f.dstate[k], f.dfinal[k], bytes);
  }

  void prepare(int rank);
  void start_row(int64_t g, int64_t i);

  CT* dh_at(int64_t g, int64_t i) { return dh_ + (g * f_.B + i) * h_stride_; }
  // Of state k of those beyond h: its gradient, and the sum of those that went to the states of resets.
  CT* dc_at(int64_t g, int64_t i, int k) { return dc_ + ((g * f_.B + i) * (K - 1) + k - 1) * c_stride_; }
  CT* fresh_at(int64_t g, int64_t i, int k) { return fresh_c_ + ((g * f_.B + i) * (K - 1) + k - 1) * c_stride_; }
  A* dg_at(int64_t g, int parity, int64_t i) { return dg_ + ((g * 2 + parity) * f_.B + i) * g_stride_; }
  A* dp_at(int64_t g, int64_t i) { return dp_ + (g * f_.B + i) * d_stride_; }

  // ---- one group, one share of rows, this thread's columns -------------------------------------------------------

  struct Job {
    const Weights& w;
    int64_t g;
    Deal rows;
    Range own, out;  // blocks of hidden units and of outputs
    int rank;
    CT* sums;  // [row][4][n] of one panel
    const A** a_rows;
    CT* d_rows;  // [row][c_stride_]: dh, under layer norm
    CT* small;   // gradients of the small parameters [kSmalls][c_stride_], and of kGain [G][c_stride_]
  };

  // Of a row under layer norm, by columns: gradients of the gates, these times their gain [G][c_stride_]; c', the same
  // normalised and behind its tanh, and the gradient at its norm times the gain [c_stride_].
  struct Held {
    CT *gates, *gained, *c, *squashed, *gained_c;
  };
  static constexpr int64_t kHeld = 2 * G + 3;
  Held held_at(const Job& job, int64_t k) const {
    CT* at = held_ + (job.rank * rows_together_ + k) * kHeld * c_stride_;
    CT* c = at + 2 * G * c_stride_;
    return {at, at + G * c_stride_, c, c + c_stride_, c + 2 * c_stride_};
  }

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
            sums_ + rank * f_.B * 4 * n,
            a_rows_ + rank * f_.B,
            d_rows_ + rank * f_.B * c_stride_,
            small_ + (g * split_.rows + rank / split_.cols % split_.rows) * small_size_};
    if (f_.dsmall) clear_small(job);
    int parity = 0;
    for (int64_t step = 0; step < f_.T; step++) {
      int64_t t = job.w.reverse ? step : f_.T - 1 - step, count = rows_.alive(t, rows);
      if (count == 0) continue;
      if (projected_) {
        total_dh(job, t, count);
        barrier.wait();
      }
      step_back(job, t, count, parity);
      barrier.wait();
      carry_back(job, t, count, parity);
      parity ^= 1;
    }
    finish(job);
  }

  // dh of the projected h for this thread's outputs.
  void total_dh(const Job& job, int64_t t, int64_t count) {
    Range columns = job.out.columns(n, f_.P);
    for (int64_t k = 0; k < count; k++) {
      int64_t i = job.rows[k];
      int64_t row = rows_.at(t, i);
      const ST* dy = (const ST*)f_.dy + row * f_.dy_s + job.g * f_.dy_n;
      ST* total = (ST*)f_.dh + (row * f_.N + job.g) * f_.P;
      for (int64_t j = columns.begin; j < columns.end; j += n) {
        int valid = columns.take(j, n);
        V d = load(dy + j, valid) + load(dh_at(job.g, i) + j);
        if (zones_h_) d = past(job, i, row, j, valid, d);
        if (f_.projected)
          d = d_bounded(d, load((const CT*)f_.projected + (row * f_.N + job.g) * f_.P + j, valid),
                        CT(f_.options->proj_clip));
        store(total + j, d, valid);
        store(dp_at(job.g, i) + j, d, valid);
      }
    }
  }

  // The cell's backward for this thread's hidden units: gate gradients to memory and to the next product.
  void step_back(const Job& job, int64_t t, int64_t count, int parity) {
    if (!projected_) {
      for (int64_t k = 0; k < count; k++) {
        int64_t i = job.rows[k];
        int64_t row = rows_.at(t, i);
        const ST* dy = (const ST*)f_.dy + row * f_.dy_s + job.g * f_.dy_n;
        Entering from = entering(job, t, i, row);
        for (int64_t b = job.own.begin; b < job.own.end; b++) {
          int64_t j = b * n;
          int valid = int(f_.H - j < n ? f_.H - j : n);
          V d = load(dy + j, valid) + load(dh_at(job.g, i) + j);
          if (__builtin_expect(zones_h_, 0)) d = past(job, i, row, j, valid, d);
          receive(job, row, i, j, valid, parity, from, d);
        }
      }
      if (whole_rows_) rows_back(job, t, count, parity);
      return;
    }
    for (int64_t i = 0; i < count; i++) job.a_rows[i] = dp_at(job.g, job.rows[i]);
    Walk walk{job.own, 4};
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p];
      int units = walk.units(p);
      const W* hr = hr_ + job.g * blocks_ * n * hr_steps_;
      back_product(count, units, job.a_rows, pack_ ? hr + b * n * hr_steps_ : nullptr,
                   hr + walk.next(p) * n * hr_steps_, hr_steps_, (const ST*)job.w.w_hr, f_.H, f_.P, b, job.sums);
      for (int64_t i = 0; i < count; i++) {
        int64_t k = job.rows[i], row = rows_.at(t, k);
        Entering from = entering(job, t, k, row);
        for (int u = 0; u < units; u++) {
          int64_t j = (b + u) * n;
          int valid = int(f_.H - j < n ? f_.H - j : n);
          receive(job, row, k, j, valid, parity, from, load(job.sums + (i * units + u) * n));
        }
      }
    }
    if (whole_rows_) rows_back(job, t, count, parity);
  }

  // out[rows][units][n] = left rows times columns of w [depth, ld].
  static void back_product(int64_t rows, int units, const A* const* a, const W* panel, const W* next, int64_t steps,
                           const ST* w, int64_t ld, int64_t depth, int64_t block, CT* out) {
    if (panel) return packed_rows<M>(rows, units, a, panel, next, steps, nullptr, out);
    int64_t j = block * n, width = ld - j;
    for (int64_t i = 0; i < rows; i++, out += units * n) switch (units) {
        case 1:
          direct_nn<A, ST, CT, 1>(a[i], w + j, ld, depth, width, out);
          break;
        case 2:
          direct_nn<A, ST, CT, 2>(a[i], w + j, ld, depth, width, out);
          break;
        case 3:
          direct_nn<A, ST, CT, 3>(a[i], w + j, ld, depth, width, out);
          break;
        case 4:
          direct_nn<A, ST, CT, 4>(a[i], w + j, ld, depth, width, out);
          break;
      }
  }

  // The same where each unit saw its own entry of h alone.
  void diagonal(int64_t rows, int units, const A* const* a, const ST* w, int64_t block, CT* out) const {
    for (int64_t i = 0; i < rows; i++)
      for (int u = 0; u < units; u++) {
        int64_t j = (block + u) * n;
        int valid = int(f_.H - j < n ? f_.H - j : n);
        V sum{};
        for (int k = 0; k < G; k++) sum += load(a[i] + k * f_.H + j, valid) * load(w + k * f_.H + j, valid);
        store(out + (i * units + u) * n, sum);
      }
  }

  // Where the states that entered a step lie; null: zero.
  struct Entering {
    const ST* h;
    const CT* c[K];  // of every state but h
    bool fresh;
  };

  Entering entering(const Job& job, int64_t t, int64_t i, int64_t row) const {
    int64_t b = rows_.batch_row(i), own = job.g * f_.B + b;
    bool fresh = rows_.resets(row, job.g);
    Entering from{nullptr, {}, fresh};
    if (fresh) {
      if (Cell::kReadsH) from.h = reset_value<ST>(f_, 0, job.g, b);
      for (int k = 1; k < K; k++) from.c[k] = reset_value<CT>(f_, k, job.g, b);
    } else if (t == rows_.first(i, job.w.reverse)) {
      from.h = (const ST*)f_.state[0] + own * f_.P;
      for (int k = 1; k < K; k++) from.c[k] = (const CT*)f_.state[k] + own * f_.H;
    } else {
      int64_t before = rows_.at(job.w.reverse ? t + 1 : t - 1, i) * f_.N + job.g;
      from.h = (const ST*)f_.y + before * f_.P;
      for (int k = 1; k < K; k++) from.c[k] = (const CT*)f_.seq[k] + before * f_.H;
    }
    return from;
  }

  // What step t will read and write of this thread's columns, for some of its rows.
  void prefetch(const Job& job, int64_t t, Range some) const {
    Range own = job.own.columns(n, f_.H);
    for (int64_t k = some.begin; k < some.end; k++) {
      int64_t row = rows_.at(t, job.rows[k]), at = row * f_.N + job.g;
      prefetch_columns((const ST*)f_.dy + row * f_.dy_s + job.g * f_.dy_n,
                       own.end <= f_.P ? own : job.out.columns(n, f_.P), false);
      for (int q = 0; q < Q; q++) prefetch_columns((const ST*)f_.planes + at * f_.planes_s + q * f_.H, own, false);
      for (int g = 0; g < G; g++) prefetch_columns((const ST*)f_.dgx + (at * G + g) * f_.H, own, true);
      for (int g = 0; f_.product && g < G; g++) {
        prefetch_columns((const CT*)f_.product + at * f_.product_s + g * f_.H, own, false);
        prefetch_columns((const ST*)f_.dproduct + (at * G + g) * f_.H, own, true);
      }
      for (int k = 1; k < K; k++) prefetch_columns((const CT*)f_.seq[k] + at * f_.H, own, false);
    }
  }

  // Leaves in dh what goes past the step, to the h that entered it; returns the rest.
  __attribute__((noinline)) V past(const Job& job, int64_t i, int64_t row, int64_t j, int valid, V d) {
    V stay = stays<CT>(*f_.options, 0, (row * f_.N + job.g) * f_.P + j, valid);
    store(dh_at(job.g, i) + j, stay * d);
    return (1 - stay) * d;
  }

  // Of m's gradient, what layer norm does not let wait for the others of its row.
  RK_INLINE void receive(const Job& job, int64_t row, int64_t i, int64_t j, int valid, int parity, const Entering& from,
                         V dh) {
    if (__builtin_expect(whole_rows_, 0))
      store(job.d_rows + i * c_stride_ + j, dh);
    else if (__builtin_expect(optional_, 0))
      optional_cell_back(job, row, i, j, valid, parity, from, dh, {}, nullptr);
    else
      cell_back<kPlain>(job, row, i, j, valid, parity, from, dh, {}, nullptr);
  }

  __attribute__((noinline)) void optional_cell_back(const Job& job, int64_t row, int64_t i, int64_t j, int valid,
                                                    int parity, const Entering& from, V dh, const RowNorm<CT>& norm,
                                                    CT* held) {
    cell_back<kAny>(job, row, i, j, valid, parity, from, dh, norm, held);
  }

  // How many of the hidden units from j on are in one vector.
  int lanes(int64_t j) const { return int(f_.H - j < n ? f_.H - j : n); }

  __attribute__((noinline)) void rows_back(const Job& job, int64_t t, int64_t count, int parity);
  template <class F>
  RK_INLINE void of_gates(const Job& job, F f) const;
  void measure_c(const Job& job, int64_t t, int64_t k, const Held& held);
  void measure_d(const Job& job, int64_t t, int64_t k, const Held& held);
  void tally_product(const Job& job, int64_t at, int64_t k);
  void tally_gradient(const Job& job, int64_t at, int64_t k, const Held& held);
  void put_product(const Job& job, int64_t at, int64_t k, const Held& held, A* left);

  // What the forward left of a step.
  RK_INLINE void load_step(int64_t at, int64_t j, int valid, const Entering& from, V* plane, V* state) const {
    for (int q = 0; q < Q; q++) plane[q] = load((const ST*)f_.planes + at * f_.planes_s + q * f_.H + j, valid);
    if (Cell::kReadsH) state[0] = from.h ? load(from.h + j, valid) : V{};
    for (int k = 1; k < K; k++) state[k] = from.c[k] ? load(from.c[k] + j, valid) : V{};
  }

  // held: where under layer norm of the product, gradients of the gates go.
  template <Steps kSteps>
  RK_INLINE void cell_back(const Job& job, int64_t row, int64_t i, int64_t j, int valid, int parity,
                           const Entering& from, V dh, const RowNorm<CT>& norm, CT* held) {
    int64_t at = row * f_.N + job.g;
    V dstate[K], plane[Q], state[K], dgx[G], dgh[G], denter[K];
    dstate[0] = dh;
    load_step(at, j, valid, from, plane, state);
    for (int k = 1; k < K; k++) {
      dstate[k] = load(dc_at(job.g, i, k) + j);
      if (f_.dseq[k]) dstate[k] += load((const CT*)f_.dseq[k] + at * f_.H + j, valid);
    }
    if constexpr (kSteps == kAny)
      optional_back(job, at * f_.H, j, valid, norm, dstate, plane, state, dgx, dgh, denter);
    else if constexpr (kSteps == kNormed)
      Cell::step_backward(dstate, plane, state, dgx, dgh, denter,
                          norm_options<CT>(j, norm, f_.dsmall ? job.small : nullptr, c_stride_));
    else
      Cell::step_backward(dstate, plane, state, dgx, dgh, denter, NoOptions());
    for (int k = 0; k < G; k++) {
      int64_t column = at * G * f_.H + k * f_.H + j;
      store((ST*)f_.dgx + column, dgx[k], valid);
      if (Cell::kSplit) store((ST*)f_.dgh + column, dgh[k], valid);
      if (held)
        store(held + k * c_stride_ + j, dgh[k]);
      else
        store(dg_at(job.g, parity, i) + k * f_.H + j, dgh[k], valid);
    }
    if (Cell::kReadsH) {
      CT* to = dh_at(job.g, i) + j;
      if (kSteps == kAny && zones_h_) denter[0] += load(to);
      store(to, denter[0]);
    }
    for (int k = 1; k < K; k++) {
      if (__builtin_expect(from.fresh, 0)) {
        if (f_.dreset_state[0]) {
          CT* sum = fresh_at(job.g, i, k) + j;
          store(sum, load(sum) + denter[k]);
        }
        denter[k] = V{};
      }
      if (kSteps == kAny) denter[k] = bounded(denter[k], CT(f_.options->grad_clip));
      store(dc_at(job.g, i, k) + j, denter[k]);
    }
  }

  StepOptions<V, CT> options_at(const Job& job, int64_t at, int64_t j, int valid, const RowNorm<CT>& norm,
                                CT* dsmall) const {
    const Options& o = *f_.options;
    return step_options<CT, ST>(o, o.small ? o.small + job.g * kSmalls : nullptr, at, j, valid, norm, dsmall,
                                c_stride_);
  }

  void optional_back(const Job& job, int64_t at, int64_t j, int valid, const RowNorm<CT>& norm, V* dstate,
                     const V* plane, const V* state, V* dgx, V* dgh, V* denter) {
    const Options& o = *f_.options;
    StepOptions<V, CT> options = options_at(job, at, j, valid, norm, f_.dsmall ? job.small : nullptr);
    if (K != 2 || !o.zones(1)) return Cell::step_backward(dstate, plane, state, dgx, dgh, denter, options);
    V stay = stays<CT>(o, 1, at + j, valid), to_c = stay * dstate[K - 1];
    dstate[K - 1] *= 1 - stay;
    Cell::step_backward(dstate, plane, state, dgx, dgh, denter, options);
    denter[K - 1] += to_c;
  }

  // Gradient of the entering h for this thread's outputs: the product with W_hh on top of the cell's own path.
  void carry_back(const Job& job, int64_t t, int64_t count, int parity) {
    for (int64_t i = 0; i < count; i++) job.a_rows[i] = dg_at(job.g, parity, job.rows[i]);
    Walk walk{job.out, 4, parity != 0};
    const W* hh = hh_ + job.g * out_blocks_ * n * hh_steps_;
    int64_t ahead = job.w.reverse ? t + 1 : t - 1;
    int64_t coming = ahead >= 0 && ahead < f_.T ? rows_.alive(ahead, job.rows) : 0;
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p];
      int units = walk.units(p);
      prefetch(job, ahead, share(coming, walk.count(), p));
      if constexpr (Cell::kDiagonal)
        diagonal(count, units, job.a_rows, (const ST*)job.w.w_hh, b, job.sums);
      else
        back_product(count, units, job.a_rows, pack_ ? hh + b * n * hh_steps_ : nullptr,
                     next_panel(hh, walk, p, n * hh_steps_), hh_steps_, (const ST*)job.w.w_hh, f_.P, G * f_.H, b,
                     job.sums);
      for (int64_t i = 0; i < count; i++) {
        bool fresh = rows_.resets(rows_.at(t, job.rows[i]), job.g);
        for (int u = 0; u < units; u++)
          if (__builtin_expect(optional_, 0))
            optional_put_carry(job, t, job.rows[i], (b + u) * n, load(job.sums + (i * units + u) * n), fresh);
          else
            put_carry<false>(job, t, job.rows[i], (b + u) * n, load(job.sums + (i * units + u) * n), fresh);
      }
    }
  }

  __attribute__((noinline)) void optional_put_carry(const Job& job, int64_t t, int64_t i, int64_t j, V d, bool fresh) {
    put_carry<true>(job, t, i, j, d, fresh);
  }

  template <bool kOptions>
  RK_INLINE void put_carry(const Job& job, int64_t t, int64_t i, int64_t j, V d, bool fresh) {
    CT* to = dh_at(job.g, i) + j;
    if (kOptions) d = dropped(job, t, i, j, d);
    if (Cell::kReadsH || (kOptions && zones_h_)) d += load(to);
    if (__builtin_expect(fresh, 0)) {
      if (f_.dreset_state[0]) {
        CT* sum = fresh_h_ + (job.g * f_.B + i) * h_stride_ + j;
        store(sum, load(sum) + d);
      }
      d = V{};
    }
    if (kOptions) d = bounded(d, CT(f_.options->grad_clip));
    store(to, d);
  }

  // The gradient of the h that entered step t, from that of its left side.
  V dropped(const Job& job, int64_t t, int64_t i, int64_t j, V d) const {
    const Options& o = *f_.options;
    int valid = int(f_.P - j < n ? f_.P - j : n);
    d *= factors<CT>(o.h, (job.g * f_.B + rows_.batch_row(i)) * f_.P + j, valid);
    return d * factors<CT>(o.h_step, (rows_.at(t, i) * f_.N + job.g) * f_.P + j, valid);
  }

  void clear_small(const Job& job);
  void add_small();

  void finish(const Job& job) {
    Range h = job.out.columns(n, f_.P), c = job.own.columns(n, f_.H);
    for (int64_t k = 0; k < job.rows.size; k++) {
      int64_t i = job.rows[k];
      int64_t to = job.g * f_.B + rows_.batch_row(i), from = job.g * f_.B + i;
      narrow_columns(dh_ + from * h_stride_, (ST*)f_.dstate[0] + to * f_.P, h);
      for (int j = 1; j < K; j++) narrow_columns(dc_at(job.g, i, j), (CT*)f_.dstate[j] + to * f_.H, c);
      if (!f_.dreset_state[0]) continue;
      narrow_columns(fresh_h_ + from * h_stride_, (ST*)f_.dreset_state[0] + to * f_.P, h);
      for (int j = 1; j < K; j++) narrow_columns(fresh_at(job.g, i, j), (CT*)f_.dreset_state[j] + to * f_.H, c);
    }
  }

  template <class T>
  static void narrow_columns(const CT* from, T* to, Range c) {
    for (int64_t j = c.begin; j < c.end; j += n) store(to + j, load(from + j), c.take(j, n));
  }

  const Backward& f_;
  Rows rows_;
  Split split_;
  Scratch mem_;
  Slots slots_;
  bool projected_, zones_h_, whole_rows_, optional_, pack_;
  int64_t blocks_, out_blocks_, c_stride_, h_stride_, d_stride_, g_stride_, hh_steps_, hr_steps_;
  int64_t rows_together_, small_size_;
  CT *dh_, *dc_, *fresh_h_, *fresh_c_, *sums_, *d_rows_, *held_, *small_;
  const A** a_rows_;
  A *dg_, *dp_;
  W *hh_, *hr_;
  Barrier* barriers_;
};
