// Steps of a stream: what lives between calls, and one step of a stack of layers; no include guard: included once per
// ISA namespace.
//
// A row of a layer is [x, h], as the products take it, and their weights lie side by side in the panels: one product
// over both where a gate takes their sum. The panels' layout is that of product-inl.h. Only step_row is compiled for
// each cell; all else knows of it what CellTraits has, at run time.
//
// A group of hidden units that see of h their own alone is a layer of its own, beside those that read the same x.

struct CellTraits {
  int gates, states;
  bool split, diagonal;

  template <class C>
  static constexpr CellTraits of() {
    return {C::kGates, C::kStates, C::kSplit, C::kDiagonal};
  }
};

template <class M>
class Stream final : public Stepper, Stored<typename M::CT> {
  typedef typename M::CT CT;
  typedef Stored<CT> Io;
  using Io::as_stored, Io::enter, Io::leave, Io::left, Io::zero;
  typedef typename M::A A;
  typedef typename M::W W;
  typedef typename M::Kept Kept;
  typedef vec<CT> V;
  static constexpr int n = Simd<CT>::n, kWide = units_in_panel(1);

  // Weights of one product, in panels, and what goes with their columns.
  struct Matrix {
    int64_t steps = 0;
    Owned<CT> bias, scale;
    Owned<int32_t> offset;

    Columns columns(int64_t at) const { return {(const float*)(CT*)scale + at, offset + at}; }
    const CT* start(int64_t at) const { return bias + at; }
  };
  enum { kInput, kHidden, kProjection };

  struct Layer {
    int64_t first = 0;                 // of its gates, among those of all groups
    int64_t I = 0, h = 0, stride = 0;  // of a row: x, where h begins, all
    Matrix part[3];
    Owned<W> gates, hr;  // [panel][steps of x, then of h][vectors][n]
    Owned<A> row;
    Owned<CT> rest;  // [B][states beyond h][block][n]
    Owned<CT> own;   // [block][G][n] of a diagonal recurrence, which has no panels of h
    int64_t steps() const { return part[kInput].steps + part[kHidden].steps; }
  };
  struct Layers {
    explicit Layers(int64_t count) : layer(new Layer[count]) {}
    ~Layers() { delete[] layer; }
    Layer* layer;
  };

 public:
  explicit Stream(const StreamShape& s) : Io(s.dtype), s_(s), layers_(s.layers * s.groups) {
    choose_cell();
    const int G = cell_.gates;
    units_ = units_in_panel(G);
    joined_ = !cell_.split && !M::kScaled;
    H_ = s.H / s.groups, P_ = s.P / s.groups;
    blocks_ = ceil_div(H_, n);
    out_blocks_ = ceil_div(P_, n);
    rest_stride_ = (cell_.states - 1) * blocks_ * n;
    m_stride_ = (ceil_div(s.H, n) + 1) * n;
    int64_t words = 0;  // of gates' weights
    for (int64_t k = 0; k < s.layers * s.groups; k++) {
      Layer& l = layers_.layer[k];
      l.first = k % s.groups * G * H_;
      l.I = k < s.groups ? s.I : s.P;
      const int64_t sums[] = {l.I, cell_.diagonal ? 0 : P_, H_},
                    columns[] = {blocks_ * G * n, blocks_ * G * n, out_blocks_ * n};
      for (int i = 0; i < (s.projected ? 3 : 2); i++) {
        l.part[i].steps = ceil_div(sums[i], M::kPair);
        l.part[i].bias.allocate(columns[i]);
        if (!M::kScaled) continue;
        l.part[i].scale.allocate(columns[i]);
        l.part[i].offset.allocate(columns[i]);
      }
      l.h = l.part[kInput].steps * M::kPair;
      l.stride = (ceil_div(l.h + P_, n) + 1) * n;  // vectors may reach past the end
      l.gates.allocate(columns[0] * l.steps());
      words += columns[0] * l.steps();
      if (s.projected) l.hr.allocate(columns[2] * l.part[kProjection].steps);
      l.row.allocate(s.B * l.stride);
      if (cell_.diagonal) l.own.allocate(columns[1]);
      l.rest.allocate(s.B * rest_stride_);
    }
    near_ = stays_near(words * sizeof(W));
    if (s.V) {
      const int64_t columns = ceil_div(s.V, n) * n;
      head_.steps = ceil_div(s.P, M::kPair);
      head_.bias.allocate(columns);
      if (M::kScaled) head_.scale.allocate(columns), head_.offset.allocate(columns);
      head_panels_.allocate(columns * head_.steps);
    }
    m_.allocate(s.B * m_stride_);
    for (Owned<CT>& sums : sums_) sums.allocate(s.B * kWide * n);
    for (Owned<const A*>& a : a_) a.allocate(s.B);
    active_.allocate(s.B);
#ifdef RK_INTEGERS
    if (!M::kScaled) return;
    int64_t widest = s.I > s.H ? s.I : s.H, stride = ceil_div(widest, n) * n;
    for (int i = 0; i < 2; i++) {
      planes_[i].allocate(s.B * 2 * stride);
      integers_[i].allocate(s.B);
      for (int64_t b = 0; b < s.B; b++) integers_[i][b] = {planes_[i] + 2 * b * stride, stride, 0};
    }
#endif
  }

  void pack(const StreamLayer* layers, const StreamHead& head) override {
    for (int64_t k = 0; k < s_.layers * s_.groups; k++) {
      Layer& l = layers_.layer[k];
      const StreamLayer& from = layers[k / s_.groups];
      for (int64_t b = 0; b < blocks_; b += units_) pack_gates(l, from, b);
      if (s_.projected) pack_wide(l.part[kProjection], l.hr, from.w_hr, s_.P, s_.H, nullptr, from.s_hr);
    }
    if (s_.V) pack_wide(head_, head_panels_, head.w, s_.V, s_.P, head.b, head.s);
  }

  void run(const StreamCall& call) override {
    int64_t count = 0;
    for (int64_t b = 0; b < s_.B; b++)
      if (!call.active || call.active[b]) active_[count++] = b;
    for (int64_t t = 0; t < call.T; t++) {
      for (int64_t i = 0; i < count; i++)
        enter(call.x, t * call.x_t + active_[i] * call.x_b, row(layers_.layer[0], i), s_.I);
      for (int64_t k = 0; k < s_.layers; k++) {
        Layer* groups = at(k);
        share_x(groups, count);
        for (int64_t g = 0; g < s_.groups; g++)
          advance(groups[back_ ? s_.groups - 1 - g : g], count, k ? nullptr : (const CT* const*)call.gates);
        for (int64_t i = 0; k + 1 < s_.layers && i < count; i++) gather(k, active_[i], row(groups[s_.groups], i));
      }
      for (int64_t b = 0; call.y && b < s_.B; b++) {
        int64_t at = t * call.y_t + b * call.y_b;
        if (call.active && !call.active[b])
          zero(call.y, at, s_.P);
        else
          leave_h(s_.layers - 1, b, call.y, at);
      }
      back_ = !back_;
    }
    if (call.logits) read_out((CT*)call.logits, call.read, count);
  }

  int states() const override { return cell_.states; }

  void read(int state, void* to) const override {
    each_state(state, [&](const Layer& l, int64_t b, int64_t at) {
      if (state)
        leave(rest(l, b, state), to, at, H_);
      else
        leave(l.row + b * l.stride + l.h, to, at, P_);
    });
  }

  void write(int state, const void* from, const uint8_t* active) override {
    each_state(state, [&](const Layer& l, int64_t b, int64_t at) {
      if (active && !active[b]) return;
      if (state)
        enter(from, at, rest(l, b, state), H_);
      else
        enter(from, at, l.row + b * l.stride + l.h, P_);
    });
  }

  void select(const int64_t* from) override {
    if (!spare_) spare_.allocate(s_.B * (P_ > rest_stride_ ? P_ : rest_stride_) * sizeof(CT));
    for (int64_t k = 0; k < s_.layers * s_.groups; k++) {
      Layer& l = layers_.layer[k];
      select_rows(l.row + l.h, l.stride, P_, from);
      if (cell_.states > 1) select_rows((CT*)l.rest, rest_stride_, rest_stride_, from);
    }
  }

  double highest(const void* logits) const override { return largest((const CT*)logits, s_.V); }

  double odds(const void* logits, double peak, double temperature, void* to) const override {
    return odds_of((const CT*)logits, s_.V, peak, temperature, (CT*)to);
  }

 private:
  // ---- rows ---------------------------------------------------------------------------------------------------------

  template <class T>
  void select_rows(T* first, int64_t stride, int64_t size, const int64_t* from) {
    T* spare = (T*)(char*)spare_;
    for (int64_t b = 0; b < s_.B; b++)
      if (from[b] != b) __builtin_memcpy(spare + b * size, first + from[b] * stride, size * sizeof(T));
    for (int64_t b = 0; b < s_.B; b++)
      if (from[b] != b) __builtin_memcpy(first + b * stride, spare + b * size, size * sizeof(T));
  }

  Layer* at(int64_t k) const { return layers_.layer + k * s_.groups; }  // the groups of a layer

  A* row(const Layer& l, int64_t i) const { return l.row + active_[i] * l.stride; }

  CT* rest(const Layer& l, int64_t b, int state) const { return l.rest + b * rest_stride_ + (state - 1) * blocks_ * n; }

  // f(group of a layer, batch row, where its part begins in [layers, B, width])
  template <class F>
  RK_INLINE void each_state(int state, F f) const {
    for (int64_t k = 0; k < s_.layers; k++)
      for (int64_t b = 0; b < s_.B; b++)
        for (int64_t g = 0; g < s_.groups; g++) f(at(k)[g], b, ((k * s_.B + b) * s_.groups + g) * (state ? H_ : P_));
  }

  void leave_h(int64_t k, int64_t b, void* to, int64_t begin) const {
    for (int64_t g = 0; g < s_.groups; g++) {
      const Layer& l = at(k)[g];
      leave(l.row + b * l.stride + l.h, to, begin + g * P_, P_);
    }
  }

  void gather(int64_t k, int64_t b, A* to) const {
    for (int64_t g = 0; g < s_.groups; g++) {
      const Layer& l = at(k)[g];
      copy_columns<A>(l.row + b * l.stride + l.h, to + g * P_, {0, P_});
    }
  }

  // ---- packing -----------------------------------------------------------------------------------------------------

  void pack_gates(Layer& l, const StreamLayer& from, int64_t block) {
    int units = Range{0, blocks_}.take(block, units_), G = cell_.gates, NV = units * G;
    Matrix &x = l.part[kInput], &h = l.part[kHidden];
    W* panel = l.gates + block * G * n * l.steps();
    for (int u = 0; u < units; u++)
      for (int k = 0; k < G; k++) {
        int64_t j = (block + u) * n, gate = l.first + k * H_, at = (block * G + u * G + k) * n;
        int v = u * G + k;
        pack_block(x, (const Kept*)from.w_ih, l.I, (const CT*)from.b_ih, from.s_ih, gate + j, gate + H_, at,
                   (Kept*)panel, NV, v);
        pack_block(h, (const Kept*)from.w_hh, cell_.diagonal ? 0 : P_, (const CT*)from.b_hh, from.s_hh, gate + j,
                   gate + H_, at, (Kept*)(panel + x.steps * NV * n), NV, v);
        if (cell_.diagonal) store(l.own + at, load((const CT*)from.w_hh + gate + j, left(H_, j)));
        if (joined_) store(x.bias + at, load(x.start(at)) + load(h.start(at)));
      }
  }

  // w [size, K] as panels of one vector for each of their columns.
  void pack_wide(Matrix& to, W* panels, const void* w, int64_t size, int64_t K, const void* bias, const float* scale) {
    const Range blocks{0, ceil_div(size, n)};
    for (int64_t b = 0; b < blocks.end; b += kWide) {
      int units = blocks.take(b, kWide);
      for (int u = 0; u < units; u++)
        pack_block(to, (const Kept*)w, K, (const CT*)bias, scale, (b + u) * n, size, (b + u) * n,
                   (Kept*)(panels + b * n * to.steps), units, u);
    }
  }

  // Rows [first, end), n of them at most, of w [*, K] into vector v of a panel of NV, whose columns begin at `at`.
  void pack_block(Matrix& to, const Kept* w, int64_t K, const CT* bias, const float* scale, int64_t first, int64_t end,
                  int64_t at, Kept* panel, int NV, int v) {
    int rows = left(end, first);
    if (bias) store(to.bias + at, load(bias + first, rows));
    for (int i = 0; M::kScaled && scale && i < rows; i++) to.scale[at + i] = scale[first + i], to.offset[at + i] = 0;
    pack_lanes<M>(w + first * K, K, rows, (W*)panel, NV, v);
    if constexpr (M::kScaled)
      for (int i = 0; i < rows; i++)
        for (int64_t k = 0; k < K; k++) to.offset[at + i] -= 128 * w[(first + i) * K + k];
  }

  // ---- one layer, one step -----------------------------------------------------------------------------------------

  // Left rows of the next products, `size` elements each.
  void set_rows(int slot, int64_t count, const A* first, int64_t stride, int64_t size) {
    for (int64_t i = 0; i < count; i++) a_[slot][i] = first + active_[i] * stride;
#ifdef RK_INTEGERS
    if constexpr (M::kScaled)
      for (int64_t i = 0; i < count; i++) to_integers(a_[slot][i], size, integers_[slot] + i);
#else
    (void)size;
#endif
  }

  // out[row][NV][n] = bias + left rows times a panel.
  void product(int slot, int64_t count, int NV, const W* panel, const W* next, int64_t steps, const Matrix& part,
               int64_t at, CT* out) {
    if (!steps) {
      for (int64_t i = 0; i < count * NV; i++) store(out + i * n, load(part.start(at + i % NV * n)));
    } else if constexpr (!M::kScaled) {
      packed_rows<M>(count, NV, a_[slot], panel, next, steps, part.start(at), out);
    } else {
#ifdef RK_INTEGERS
      switch (NV) {
#define RK_CASE(NV) \
  case NV:          \
    return integer_rows<NV>(count, a_[slot], integers_[slot], panel, steps, part.start(at), part.columns(at), out);
        RK_CASE(1) RK_CASE(2) RK_CASE(3) RK_CASE(4)
#undef RK_CASE
      }
#else
      scaled_rows<M>(count, NV, a_[slot], panel, next, steps, part.start(at), part.columns(at), out);
#endif
    }
  }

  // The x of a layer, that of its first group, to where all groups read it: before each one's h, or in one place.
  void share_x(const Layer* groups, int64_t count) {
    if (!joined_) return set_rows(kInput, count, groups->row, groups->stride, groups->I);
    for (int64_t g = 1; g < s_.groups; g++)
      for (int64_t i = 0; i < count; i++) copy_columns<A>(row(groups[0], i), row(groups[g], i), {0, groups->I});
  }

  void advance(Layer& l, int64_t count, const CT* const* gates) {
    if (joined_)
      set_rows(kInput, count, l.row, l.stride, l.I);
    else if (!cell_.diagonal)
      set_rows(kHidden, count, l.row + l.h, l.stride, P_);
    const Matrix &x = l.part[kInput], &h = l.part[kHidden];
    const int G = cell_.gates;
    Walk walk{{0, blocks_}, units_, back_};  // back and forth: what was read last is still in the nearest cache
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p], at = b * G * n;
      int units = walk.units(p), NV = units * G;
      const W *panel = l.gates + at * l.steps(), *next = near_ ? nullptr : l.gates + walk.next(p) * G * n * l.steps();
      if (joined_) {
        product(kInput, count, NV, panel, next, l.steps(), x, at, sums_[0]);
      } else {
        const W* second = panel + x.steps * NV * n;
        product(kInput, count, NV, panel, near_ ? nullptr : second, x.steps, x, at, sums_[0]);
        product(kHidden, count, NV, second, next, h.steps, h, at, sums_[1]);
      }
      for (int64_t i = 0; i < count; i++) (this->*step_)(l, i, b, units, gates ? gates[active_[i]] : nullptr);
    }
    if (s_.projected)
      project(l, count);
    else
      for (int64_t i = 0; i < count; i++) copy_columns<A>(m_ + active_[i] * m_stride_, row(l, i) + l.h, {0, H_});
  }

  // The gates of one row's hidden units, with what is given of them; h' goes to m, because other blocks still read h.
  template <class Cell>
  void step_row(Layer& l, int64_t i, int64_t block, int units, const CT* given) {
    constexpr int G = Cell::kGates, K = Cell::kStates;
    constexpr bool kJoined = !Cell::kSplit && !M::kScaled;
    const CT *gx = sums_[0] + i * units * G * n, *gh = sums_[1] + i * units * G * n;
    A* m = m_ + active_[i] * m_stride_;
    for (int u = 0; u < units; u++) {
      int64_t j = (block + u) * n;
      V x[G], h[G], state[K], plane[Cell::kPlanes];
      for (int k = 0; k < G; k++) {
        x[k] = load(gx + (u * G + k) * n);
        if (given) x[k] += load(given + l.first + k * H_ + j, left(H_, j));
        h[k] = kJoined ? V{} : load(gh + (u * G + k) * n);
        if (Cell::kDiagonal) h[k] += load(l.own + (j * G + k * n)) * load(row(l, i) + l.h + j);
      }
      if (Cell::kReadsH) state[0] = load(row(l, i) + l.h + j);
      CT* c = l.rest + active_[i] * rest_stride_ + j;
      for (int k = 1; k < K; k++) state[k] = load(c + (k - 1) * blocks_ * n);
      Cell::step(x, h, state, plane, NoOptions());
      for (int k = 1; k < K; k++) store(c + (k - 1) * blocks_ * n, state[k]);
      store(m + j, as_stored(state[0]), left(H_, j));
    }
  }

  // h' = m W_hr^T.
  void project(Layer& l, int64_t count) {
    set_rows(kInput, count, m_, m_stride_, s_.H);
    wide_product(l.part[kProjection], l.hr, s_.P, count, [&](int64_t i) { return row(l, i) + l.h; });
  }

  // The head on the last layer's h, or on what is given in its place.
  void read_out(CT* logits, const void* given, int64_t count) {
    const Layer& last = *at(s_.layers - 1);
    const bool made = given || s_.groups > 1;  // h does not lie in one piece
    for (int64_t i = 0; made && i < count; i++) {
      A* to = m_ + active_[i] * m_stride_;
      if (given)
        enter(given, active_[i] * s_.P, to, s_.P);
      else
        gather(s_.layers - 1, active_[i], to);
      store(to + s_.P, V{});  // beside a neighbour along the sum
    }
    if (made)
      set_rows(kInput, count, m_, m_stride_, s_.P);
    else
      set_rows(kInput, count, last.row + last.h, last.stride, s_.P);
    wide_product(head_, head_panels_, s_.V, count, [&](int64_t i) { return logits + active_[i] * s_.V; });
  }

  // The left rows of slot kInput times panels of pack_wide.
  template <class To>
  RK_INLINE void wide_product(const Matrix& part, const W* panels, int64_t size, int64_t count, To to) {
    Walk walk{{0, ceil_div(size, n)}, kWide};
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p];
      int units = walk.units(p);
      product(kInput, count, units, panels + b * n * part.steps, panels + walk.next(p) * n * part.steps, part.steps,
              part, b * n, sums_[0]);
      for (int64_t i = 0; i < count; i++)
        for (int u = 0; u < units; u++) {
          int64_t j = (b + u) * n;
          store(to(i) + j, as_stored(load(sums_[0] + (i * units + u) * n)), left(size, j));
        }
    }
  }

  template <class Cell>
  void use_cell() {
    cell_ = CellTraits::of<Cell>();
    step_ = &Stream::step_row<Cell>;
  }

  void choose_cell() {
    switch (s_.cell) {
      case Cell::rnn_tanh:
        return use_cell<Rnn<false>>();
      case Cell::rnn_relu:
        return use_cell<Rnn<true>>();
      case Cell::lstm:
        return use_cell<Lstm>();
      case Cell::gru:
        return use_cell<Gru>();
      case Cell::mgu:
        return use_cell<Mgu>();
      case Cell::indrnn_tanh:
        return use_cell<IndRnn<false>>();
      case Cell::indrnn_relu:
        return use_cell<IndRnn<true>>();
      case Cell::ligru:
        return use_cell<LiGru>();
      case Cell::slstm:
        return use_cell<SLstm>();
    }
  }

  StreamShape s_;
  CellTraits cell_;
  void (Stream::*step_)(Layer&, int64_t, int64_t, int, const CT*);
  int units_;    // blocks in a panel
  bool joined_;  // x and h in one product
  bool near_;    // the weights of all layers stay in the second cache
  Layers layers_;
  Matrix head_;
  Owned<W> head_panels_;
  int64_t H_, P_;  // of one group
  int64_t blocks_, out_blocks_, rest_stride_, m_stride_;
  bool back_ = false;
  Owned<A> m_;             // [B][m_stride_]: h' before the projection
  Owned<CT> sums_[2];      // [B][kWide][n] of one panel: x's, or both, and h's
  Owned<const A*> a_[2];   // [B]: left rows
  Owned<int64_t> active_;  // [B]: the rows that advance
  Owned<char> spare_;
  Owned<uint8_t> planes_[2];
  Owned<Integers> integers_[2];
};
