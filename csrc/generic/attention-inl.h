// Attention of a decoder's rows over their sources, and the readout; no include guard: included once per ISA namespace.
// Mirrors rnnkern/seq2seq/_attention.py and the readout of _decoder.py.
//
// Keys and transposed values of every source lie in panels as weights do, so that scores and contexts of the rows that
// share a source are products with packed weights: of queries with keys, and of attention's weights with values.

template <class M>
class Attending final : public Attention, Stored<typename M::CT> {
  typedef typename M::CT CT;
  typedef typename M::A A;
  typedef typename M::W W;
  typedef typename M::Kept Kept;
  typedef vec<CT> V;
  typedef Stored<CT> Io;
  using Io::as_stored, Io::enter, Io::leave, Io::left;
  static constexpr int n = Simd<CT>::n, kWide = units_in_panel(1);

  // Matrices [size, K], `count` of them, in panels of kWide vectors.
  struct Panels {
    int64_t size = 0, K = 0, steps = 0;
    Owned<W> data;

    void allocate(int64_t count, int64_t size_, int64_t K_) {
      size = size_, K = K_, steps = ceil_div(K_, M::kPair);
      data.allocate(count * each());
    }
    int64_t each() const { return ceil_div(size, n) * n * steps; }
    void pack(int64_t k, const void* from) {
      const Kept* w = (const Kept*)from + k * size * K;
      const Range blocks{0, ceil_div(size, n)};
      for (int64_t b = 0; b < blocks.end; b++) {
        int64_t first = b / kWide * kWide;
        pack_lanes<M>(w + b * n * K, K, left(size, b * n), data + k * each() + first * n * steps,
                      blocks.take(first, kWide), int(b - first));
      }
    }
  };

 public:
  explicit Attending(const AttentionShape& s) : Attention(s), Io(s.dtype) {
    const int64_t B = s.N * s.beams, widest = s.L > s.P ? s.L : s.P;
    query_stride_ = padded(s.P), left_stride_ = padded(s.S + s.P), share_stride_ = padded(s.L);
    key_stride_ = padded(s.A), row_stride_ = padded(widest > s.S ? widest : s.S);
    if (s.additive) {
      query_.allocate(1, s.A, s.P);
      added_.allocate(s.N * ceil_div(s.L, n) * n * s.A);
      score_.allocate(s.A);
      keyed_.allocate(B * key_stride_);
    } else {
      keys_.allocate(s.N, s.L, s.A);
    }
    values_.allocate(s.N, s.S, s.L);
    readout_.allocate(1, s.P, s.S + s.P);
    lengths_.allocate(s.N);
    queries_.allocate(B * query_stride_);
    left_.allocate(B * left_stride_);
    shares_.allocate(s.beams * share_stride_);
    rows_.allocate(B * row_stride_);
    sums_.allocate(B * kWide * n);
    a_.allocate(B);
    active_.allocate(B);
  }

  void pack(const AttentionWeights& w) override {
    const AttentionShape& s = shape;
    for (int64_t k = 0; k < s.N; k++) {
      lengths_[k] = w.lengths[k];
      values_.pack(k, w.values);
      if (!s.additive) keys_.pack(k, w.keys);
      for (int64_t j = 0; s.additive && j < s.L; j += n)
        pack_lanes<Whole<CT>>((const CT*)w.keys + (k * s.L + j) * s.A, s.A, left(s.L, j), keys_of(k, j), 1, 0);
    }
    readout_.pack(0, w.readout);
    if (!s.additive) return;
    query_.pack(0, w.query);
    __builtin_memcpy(score_, w.score, s.A * sizeof(CT));
  }

  void attend(const void* query, const uint8_t* active, void* context, int64_t context_b) override {
    const AttentionShape& s = shape;
    choose(active);
    for (int64_t i = 0; i < count_; i++) enter(query, active_[i] * s.P, queries_ + i * query_stride_, s.P);
    if (s.additive) {
      set_rows(count_, queries_, query_stride_);
      multiply(query_, 0, s.A, query_.steps, count_, keyed_, key_stride_);
    }
    for (int64_t i = 0, end; i < count_; i = end) {
      const int64_t k = active_[i] / s.beams;
      for (end = i + 1; end < count_ && active_[end] / s.beams == k;) end++;
      attend_source(k, i, end - i);
      for (int64_t j = i; context && j < end; j++)
        leave(left_ + active_[j] * left_stride_, context, active_[j] * context_b, s.S);
    }
  }

  void read(const void* h, const uint8_t* active, void* readout) override {
    const AttentionShape& s = shape;
    choose(active);
    for (int64_t i = 0; i < count_; i++) {
      A* row = left_ + active_[i] * left_stride_;
      enter(h, active_[i] * s.P, row + s.S, s.P);
      a_[i] = row;
    }
    multiply(readout_, 0, s.P, readout_.steps, count_, rows_, row_stride_);
    for (int64_t i = 0; i < count_; i++) {
      CT* row = rows_ + i * row_stride_;
      for (int64_t j = 0; j < s.P; j += n) store(row + j, tanh(load(row + j)));
      leave(row, readout, active_[i] * s.P, s.P);
    }
  }

 private:
  static int64_t padded(int64_t size) { return (ceil_div(size, n) + 1) * n; }

  CT* keys_of(int64_t k, int64_t step) const { return added_ + (k * ceil_div(shape.L, n) * n + step) * shape.A; }

  void choose(const uint8_t* active) {
    count_ = 0;
    for (int64_t b = 0; b < shape.N * shape.beams; b++)
      if (!active || active[b]) active_[count_++] = b;
  }

  void set_rows(int64_t count, const A* first, int64_t stride) {
    for (int64_t i = 0; i < count; i++) a_[i] = first + i * stride;
  }

  // Row i of `to`: its columns [0, size) at least, of the left row times the first `steps` of the sum over matrix k.
  // Stores whole vectors.
  void multiply(const Panels& w, int64_t k, int64_t size, int64_t steps, int64_t count, CT* to, int64_t stride) {
    const W* panels = w.data + k * w.each();
    Walk walk{{0, ceil_div(w.size, n)}, kWide};
    for (int64_t p = 0; p < walk.count() && walk[p] * n < size; p++) {
      int units = walk.units(p);
      packed_rows<M>(count, units, a_, panels + walk[p] * n * w.steps, panels + walk.next(p) * n * w.steps, steps,
                     nullptr, sums_);
      for (int64_t i = 0; i < count; i++)
        for (int u = 0; u < units; u++)
          store(to + i * stride + (walk[p] + u) * n, as_stored(load(sums_ + (i * units + u) * n)));
    }
  }

  // Contexts of `count` active rows from the i-th on, whose source is the k-th.
  void attend_source(int64_t k, int64_t i, int64_t count) {
    const AttentionShape& s = shape;
    const int64_t length = lengths_[k];
    if (length && s.additive) {
      for (int64_t j = 0; j < count; j++) add_scores(k, keyed_ + (i + j) * key_stride_, rows_ + j * row_stride_);
    } else if (length) {
      set_rows(count, queries_ + i * query_stride_, query_stride_);
      multiply(keys_, k, length, keys_.steps, count, rows_, row_stride_);
    }
    for (int64_t j = 0; length && j < count; j++) weigh(rows_ + j * row_stride_, length, shares_ + j * share_stride_);
    if (length) {
      set_rows(count, shares_, share_stride_);
      multiply(values_, k, s.S, ceil_div(length, M::kPair), count, rows_, row_stride_);
    }
    for (int64_t j = 0; j < count; j++) {
      const CT* context = rows_ + j * row_stride_;
      A* to = left_ + active_[i + j] * left_stride_;
      for (int64_t c = 0; c < s.S; c += n) store(to + c, length ? load(context + c) : V{}, left(s.S, c));
    }
  }

  // score . tanh(query + key) of every step, steps in lanes.
  void add_scores(int64_t k, const CT* query, CT* to) {
    for (int64_t j = 0; j < lengths_[k]; j += n) {
      const CT* key = keys_of(k, j);
      V sum = {};
      for (int64_t a = 0; a < shape.A; a++) sum += tanh(load(key + a * n) + query[a]) * score_[a];
      store(to + j, as_stored(sum));
    }
  }

  // Softmax of a row of scores, as the left side of a product; behind its end, zero. The row may be written to.
  void weigh(CT* scores, int64_t length, A* shares) {
    typedef Exp<CT> E;
    V largest = splat(-CT(__builtin_inf())), sum = {};
    for (int64_t j = length; j % n; j++) scores[j] = -CT(__builtin_inf());
    for (int64_t j = 0; j < length; j += n) largest = at_least(largest, load(scores + j));
    CT most = largest[0], total = 0;
    for (int i = 1; i < n; i++) most = largest[i] > most ? largest[i] : most;
    for (int64_t j = 0; j < length; j += n) {
      V power = load(scores + j) - most, scale, p;  // NaN for one score is NaN for all, by the sum
      exp_parts<V, CT>(at_least(power, splat(-E::tiny)), &scale, &p);
      V weight = power < -E::tiny ? V{} : scale * p + scale;
      store(scores + j, weight);
      sum += weight;
    }
    for (int i = 0; i < n; i++) total += sum[i];
    for (int64_t j = 0; j < length; j += n) store(shares + j, load(scores + j) / total, left(length, j));
    for (int64_t j = length; j < ceil_div(length, M::kPair) * M::kPair; j++) shares[j] = A{};
  }

  Panels query_, keys_, values_, readout_;
  Owned<CT> added_, score_;  // additive: keys [N][steps / n][A][n], and v
  Owned<int64_t> lengths_;
  int64_t query_stride_, left_stride_, share_stride_, key_stride_, row_stride_, count_ = 0;
  Owned<A> queries_, left_, shares_;  // [active], [B] of [context, h], [beams]
  Owned<CT> keyed_, rows_;            // [active]: W q, additive; results of the product at hand
  Owned<CT> sums_;                    // [B][kWide][n]
  Owned<const A*> a_;                 // [B]: left rows
  Owned<int64_t> active_;             // [B]: the rows that take part
};
