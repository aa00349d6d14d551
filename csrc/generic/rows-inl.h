// Layer norm in the scans, which needs all of a row's product before the first of its gates, and all of c' before the
// first of h'; no include guard. Threads that share a row's columns tell one another what they found in theirs.

// ---- forward -----------------------------------------------------------------------------------------------------

// One step of all rows.
template <class Cell, class M>
void ForwardScan<Cell, M>::advance_rows(const Job& job, int64_t t, int64_t count, int64_t base, int parity) {
  const void* const* small = f_.options->small + job.g * kSmalls;
  Walk walk{job.own, kUnits, parity != 0};
  int64_t ahead = job.w.reverse ? t - 1 : t + 1;
  int64_t coming = f_.planes && ahead >= 0 && ahead < f_.T ? rows_.alive(ahead, job.rows) : 0;
  int64_t panel = G * n * count;
  for (int64_t p = 0; p < walk.count(); p++) {
    prefetch(job, ahead, share(coming, walk.count(), p));
    CT* gates = job.gates + (walk[p] - job.own.begin) * panel;
    recur(job, count, walk, p, nullptr, gates);
    if (drops_) scale_product(gates, count, walk.units(p) * G, nullptr);
  }
  if (small[kGain]) tally_rows(job, job.gates, count, count, slots_);
  RowGates row{{}, (const ST*)small[kGain], bias_hh_ + gate(job.g, 0), nullptr, K == 2 && small[kGainC]};
  for (int64_t i = 0; i < count; i++) {
    if (row.gain) {
      gate_moments(job, slots_, i, row.of_gate);
      if (f_.product) row.product = (CT*)f_.product + (rows_.at(t, job.rows[i]) * f_.N + job.g) * f_.product_s;
    }
    for (int64_t p = 0; p < walk.count(); p++) {
      int64_t b = walk[p];
      int units = walk.units(p);
      const CT* gx = gx_of(job, b, units, base, i);
      CT* gh = job.gates + (b - job.own.begin) * panel + i * units * G * n;
      if (optional_)
        optional_step_row<true>(job, t, job.rows[i], b, units, parity, gx, gh, row);
      else
        step_row<false, true>(job, t, job.rows[i], b, units, parity, gx, gh, row);
    }
    if (row.waits) tally_next_c(job, count, i);
  }
  if (!row.waits) return;
  job.barrier.wait();
  for (int64_t i = 0; i < count; i++)
    if (optional_)
      put_normed<true>(job, t, count, i, parity);
    else
      put_normed<false>(job, t, count, i, parity);
}

// f(where a vector of this thread's gates of row i is, its first unit, lanes in use, gate). The panels have `count`
// rows.
template <class Cell, class M>
template <class F>
RK_INLINE void ForwardScan<Cell, M>::of_gates(const Job& job, CT* panels, int64_t count, int64_t i, F f) const {
  for (int64_t b = job.own.begin; b < job.own.end; b += kUnits) {
    int units = job.own.take(b, kUnits);
    CT* at = panels + ((b - job.own.begin) * count + i * units) * G * n;
    for (int u = 0; u < units; u++, at += G * n) {
      int64_t j = (b + u) * n;
      if (__builtin_expect(lanes(j) == n, 1)) {
#pragma GCC unroll 4
        for (int k = 0; k < G; k++) f(at + k * n, j, n, k);
      } else {
#pragma GCC unroll 4
        for (int k = 0; k < G; k++) f(at + k * n, j, lanes(j), k);
      }
    }
  }
}

// Tells the team what this thread has of the first `rows` rows of its gates, panels of `count` rows, and waits for
// them.
template <class Cell, class M>
void ForwardScan<Cell, M>::tally_rows(const Job& job, CT* panels, int64_t count, int64_t rows,
                                      const Slots& slots) const {
  int64_t columns = job.own.columns(n, f_.H).size();
  for (int64_t i = 0; i < rows; i++)
    tally_gates<Cell, CT>(
        columns,
        [&](auto f) RK_LAMBDA {
          of_gates(job, panels, count, i, [&](CT* at, int64_t, int valid, int k) RK_LAMBDA { f(load(at), valid, k); });
        },
        &slots.own(job.rank, i, 0));
  job.barrier.wait();
}

// Of each gate of a row, once all of the team have told.
template <class Cell, class M>
RK_INLINE void ForwardScan<Cell, M>::gate_moments(const Job& job, const Slots& slots, int64_t row,
                                                  Moments<CT>* of_gate) const {
  Moments<CT> of_part[Slots::kParts];
  for (int p = 0; p < Slots::kParts; p++) of_part[p] = slots.joined(job.rank, row, p).moments(f_.options->eps);
  for (int k = 0; k < G; k++) of_gate[k] = of_part[norm_part<Cell>(k)];
}

// The products of x with w_ih of the next steps, which project_input has made, and their bias. Other slots than those
// of a step: between two of these calls lies a step's barrier.
template <class Cell, class M>
void ForwardScan<Cell, M>::normalise_input(const Job& job, int64_t total) {
  tally_rows(job, job.gx, chunk_rows_, total, x_slots_);
  const CT *gain = gain_ih_ + gate(job.g, 0), *bias = bias_ih_ + gate(job.g, 0);
  for (int64_t i = 0; i < total; i++) {
    Moments<CT> of_gate[G];
    gate_moments(job, x_slots_, i, of_gate);
    of_gates(job, job.gx, chunk_rows_, i, [&](CT* at, int64_t j, int, int k) RK_LAMBDA {
      store(at, of_gate[k].normed(load(at)) * load(gain + j * G + k * n) + load(bias + j * G + k * n));
    });
  }
}

template <class Cell, class M>
void ForwardScan<Cell, M>::tally_next_c(const Job& job, int64_t count, int64_t i) {
  const CT size = CT(job.own.columns(n, f_.H).size());
  V sum{}, square{};
  of_gates(job, job.gates, count, i, [&](CT* x, int64_t, int valid, int k) RK_LAMBDA {
    if (k == 0) sum += only<CT>(load(x), valid);
  });
  Tally<CT>& to = slots_.own(job.rank, i, Slots::kC) = {size, total(sum) / size};
  of_gates(job, job.gates, count, i, [&](CT* x, int64_t, int valid, int k) RK_LAMBDA {
    V d = only<CT>(load(x) - to.mean, valid);
    if (k == 0) square += d * d;
  });
  to.square = total(square);
}

// h' of row i, once all of its c' is there.
template <class Cell, class M>
template <bool kOptions>
void ForwardScan<Cell, M>::put_normed(const Job& job, int64_t t, int64_t count, int64_t row, int parity) {
  if constexpr (K == 2) {
    const void* const* small = f_.options->small + job.g * kSmalls;
    const ST *gain = (const ST*)small[kGainC], *shift = (const ST*)small[kShiftC];
    Moments<CT> m = slots_.joined(job.rank, row, Slots::kC).moments(f_.options->eps);
    int64_t i = job.rows[row], at = rows_.at(t, i) * f_.N + job.g;
    bool restart = resets_next(job, t, i);
    of_gates(job, job.gates, count, row, [&](CT* x, int64_t j, int valid, int k) RK_LAMBDA {
      if (k) return;
      V c = m.normed(load(x)) * load(gain + j, valid) + load(shift + j, valid);
      put_m<kOptions>(job, t, i, parity, at, j, valid, Cell::output(load(x + n), c), restart);
    });
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------

// One step back of all rows, once dh is there.
template <class Cell, class M>
void BackwardScan<Cell, M>::rows_back(const Job& job, int64_t t, int64_t count, int parity) {
  const Options& o = *f_.options;
  const void* const* small = o.small + job.g * kSmalls;
  Barrier& barrier = barriers_[1 + job.rank / split_.cols];
  const bool norms_c = K == 2 && small[kGainC];
  for (int64_t first = 0; first < count; first += rows_together_) {
    int64_t end = count - first < rows_together_ ? count : first + rows_together_;
    for (int64_t k = first; norms_c && k < end; k++) measure_c(job, t, k, held_at(job, k - first));
    if (norms_c) barrier.wait();
    for (int64_t k = first; norms_c && k < end; k++) measure_d(job, t, k, held_at(job, k - first));
    if (norms_c) barrier.wait();
    for (int64_t k = first; k < end; k++) {
      int64_t i = job.rows[k], row = rows_.at(t, i);
      Held held = held_at(job, k - first);
      Entering from = entering(job, t, i, row);
      CT* gates = small[kGain] ? held.gates : nullptr;
      RowNorm<CT> norm;
      if (norms_c) norm = {{slots_.joined(job.rank, k, Slots::kDc), o.eps}, held.squashed, held.gained_c};
      if (small[kGain]) tally_product(job, row * f_.N + job.g, k);
      for (int64_t b = job.own.begin; b < job.own.end; b++) {
        int64_t j = b * n;
        V d = load(job.d_rows + i * c_stride_ + j);
        if (optional_)
          optional_cell_back(job, row, i, j, lanes(j), parity, from, d, norm, gates);
        else if (norms_c)
          cell_back<kNormed>(job, row, i, j, lanes(j), parity, from, d, norm, gates);
        else
          cell_back<kPlain>(job, row, i, j, lanes(j), parity, from, d, norm, gates);
      }
      if (small[kGain]) tally_gradient(job, row * f_.N + job.g, k, held);
    }
    if (!small[kGain]) continue;
    barrier.wait();
    for (int64_t k = first; k < end; k++) {
      int64_t i = job.rows[k];
      put_product(job, rows_.at(t, i) * f_.N + job.g, k, held_at(job, k - first), dg_at(job.g, parity, i));
    }
  }
}

// f(first unit, lanes in use, gate) of this thread's columns.
template <class Cell, class M>
template <class F>
RK_INLINE void BackwardScan<Cell, M>::of_gates(const Job& job, F f) const {
  for (int64_t b = job.own.begin; b < job.own.end; b++) {
    if (__builtin_expect(lanes(b * n) == n, 1)) {
#pragma GCC unroll 4
      for (int k = 0; k < G; k++) f(b * n, n, k);
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < G; k++) f(b * n, lanes(b * n), k);
    }
  }
}

// c' as its norm met it, and of what this thread has of it mean and squares.
template <class Cell, class M>
void BackwardScan<Cell, M>::measure_c(const Job& job, int64_t t, int64_t k, const Held& held) {
  if constexpr (K == 2) {
    int64_t i = job.rows[k], row = rows_.at(t, i), at = row * f_.N + job.g;
    Entering from = entering(job, t, i, row);
    const CT size = CT(job.own.columns(n, f_.H).size());
    V sum{}, square{};
    for (int64_t b = job.own.begin; b < job.own.end; b++) {
      int64_t j = b * n;
      V plane[Q], state[K], c;
      load_step(at, j, lanes(j), from, plane, state);
      if (optional_) {
        StepOptions<V, CT> options = options_at(job, at * f_.H, j, lanes(j), {}, nullptr);
        c = options.clipped(Cell::raw_c(plane, state[1], options));
      } else {
        c = Cell::raw_c(plane, state[1], NoOptions());
      }
      store(held.c + j, c);
      sum += only<CT>(c, lanes(j));
    }
    Tally<CT>& to = slots_.own(job.rank, k, Slots::kC) = {size, total(sum) / size};
    for (int64_t b = job.own.begin; b < job.own.end; b++) {
      V d = only<CT>(load(held.c + b * n) - to.mean, lanes(b * n));
      square += d * d;
    }
    to.square = total(square);
  }
}

// The gradients at what c' is normalised to, times its gain, and of what this thread has of them their sums.
template <class Cell, class M>
void BackwardScan<Cell, M>::measure_d(const Job& job, int64_t t, int64_t k, const Held& held) {
  if constexpr (K == 2) {
    const void* const* small = f_.options->small + job.g * kSmalls;
    const ST *gain = (const ST*)small[kGainC], *shift = (const ST*)small[kShiftC];
    int64_t i = job.rows[k], at = rows_.at(t, i) * f_.N + job.g;
    Tally<CT> all = slots_.joined(job.rank, k, Slots::kC);
    Moments<CT> m = all.moments(f_.options->eps);
    V sum{}, slope{};
    for (int64_t b = job.own.begin; b < job.own.end; b++) {
      int64_t j = b * n;
      int valid = lanes(j);
      V off = load(held.c + j) - all.mean, g = load(gain + j, valid);
      V u = tanh(off * m.scale * g + load(shift + j, valid));
      V o = load((const ST*)f_.planes + at * f_.planes_s + Cell::kOutputGate * f_.H + j, valid);
      V d = only<CT>(Cell::d_output(load(job.d_rows + i * c_stride_ + j), o, u) * g, valid);
      store(held.squashed + j, u);
      store(held.gained_c + j, d);
      sum += d, slope += d * off;
    }
    CT own = CT(job.own.columns(n, f_.H).size());  // and as much of the squares: joined, they are the row's again
    slots_.own(job.rank, k, Slots::kDc) = {own, all.mean, all.square * (own / all.size), total(sum), total(slope)};
  }
}

template <class Cell, class M>
void BackwardScan<Cell, M>::tally_product(const Job& job, int64_t at, int64_t k) {
  const CT* x = (const CT*)f_.product + at * f_.product_s;
  tally_gates<Cell, CT>(
      job.own.columns(n, f_.H).size(),
      [&](auto f) RK_LAMBDA {
        of_gates(job, [&](int64_t j, int valid, int g) RK_LAMBDA { f(load(x + g * f_.H + j, valid), valid, g); });
      },
      &slots_.own(job.rank, k, 0));
}

// Gradients times the gain, and their sums.
template <class Cell, class M>
void BackwardScan<Cell, M>::tally_gradient(const Job& job, int64_t at, int64_t k, const Held& held) {
  const CT* x = (const CT*)f_.product + at * f_.product_s;
  const ST* gain = (const ST*)f_.options->small[job.g * kSmalls + kGain];
  Tally<CT>* to = &slots_.own(job.rank, k, 0);
  CT sums[Slots::kParts];
  V sum[G] = {}, slope[G] = {}, mean[G];
  for (int g = 0; g < G; g++) mean[g] = splat(to[norm_part<Cell>(g)].mean);
  of_gates(job, [&](int64_t j, int valid, int g) RK_LAMBDA {
    V d = only<CT>(load(held.gates + g * c_stride_ + j) * load(gain + g * f_.H + j, valid), valid);
    store(held.gained + g * c_stride_ + j, d);
    sum[g] += d, slope[g] += d * (load(x + g * f_.H + j, valid) - mean[g]);
  });
  sum_parts<Cell, CT>(sum, sums);
  for (int p = 0; p < Slots::kParts; p++) to[p].d = sums[p];
  sum_parts<Cell, CT>(slope, sums);
  for (int p = 0; p < Slots::kParts; p++) to[p].slope = sums[p];
}

// From the gradients of what layer norm made to those of the product; those of the gain are added up.
template <class Cell, class M>
void BackwardScan<Cell, M>::put_product(const Job& job, int64_t at, int64_t k, const Held& held, A* left) {
  const CT* x = (const CT*)f_.product + at * f_.product_s;
  ST* to = (ST*)f_.dproduct + at * G * f_.H;
  CT* dgain = job.small + kSmalls * c_stride_;
  NormGradient<CT> of_part[Slots::kParts], back[G];
  for (int p = 0; p < Slots::kParts; p++) of_part[p] = {slots_.joined(job.rank, k, p), f_.options->eps};
  for (int g = 0; g < G; g++) back[g] = of_part[norm_part<Cell>(g)];
  of_gates(job, [&](int64_t j, int valid, int g) RK_LAMBDA {
    int64_t own = g * c_stride_ + j, column = g * f_.H + j;
    V normed = back[g].x.normed(load(x + column, valid));
    store(dgain + own, load(dgain + own) + load(held.gates + own) * normed);
    V d = back[g](load(held.gained + own), normed);
    store(to + column, d, valid);
    store(left + column, d, valid);
  });
}
