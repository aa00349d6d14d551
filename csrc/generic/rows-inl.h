// Layer norm in the scans, which needs all of a row's product before the first of its gates, and all of c' before the
// first of h'; no include guard. The thread has whole rows.

// One step of all rows.
template <class Cell, class M>
void ForwardScan<Cell, M>::advance_rows(const Job& job, int64_t t, int64_t count, int64_t base, int parity) {
  const Options& o = *f_.options;
  const void* const* small = o.small + job.g * kSmalls;
  CT scale = CT(o.h.scale * o.h_step.scale);
  Walk walk{job.own, kUnits};
  for (int64_t p = 0; p < walk.count(); p++) {
    int64_t b = walk[p];
    int units = walk.units(p);
    recur(job, count, walk, p, nullptr);
    for (int64_t i = 0; i < count; i++)
      for (int u = 0; u < units; u++) {
        int64_t j = (b + u) * n;
        for (int k = 0; k < G; k++)
          store(job.gates + (i * G + k) * f_.H + j, load(job.sums + ((i * units + u) * G + k) * n) * scale, lanes(j));
      }
  }
  for (int64_t i = 0; i < count; i++) {
    CT* gates = job.gates + i * G * f_.H;
    if (small[kGain]) normalise_gates<Cell>(gates, f_.H, (const ST*)small[kGain], o.eps);
    RowNorm<CT> norm;
    for (int pass = small[kGainC] ? 0 : 1; pass < 2; pass++) {
      for (int64_t p = 0; p < walk.count(); p++)
        for (int u = 0; u < walk.units(p); u++) {
          const CT* gx = gx_of(job, walk[p], walk.units(p), base, i);
          int64_t b = walk[p] + u, j = b * n;
          CT gh[G * n];
          for (int k = 0; k < G; k++)
            store(gh + k * n, load(gates + k * f_.H + j, lanes(j)) + load(bias_hh_ + gate(job.g, b) + k * n));
          if (gx) gx += u * G * n;
          if (pass)
            optional_step_row(job, t, job.rows[i], b, 1, parity, gx, gh, norm);
          else
            keep_next_c(job, t, job.rows[i], b, gx, gh);
        }
      if (!pass) norm.c = moments(job.next_c, f_.H, o.eps);
    }
  }
}

// c' of one block as tanh will meet it, but not normalised.
template <class Cell, class M>
void ForwardScan<Cell, M>::keep_next_c(const Job& job, int64_t t, int64_t i, int64_t block, const CT* gx,
                                       const CT* gh) {
  if constexpr (K == 2) {
    int64_t row = rows_.at(t, i), j = block * n;
    V x[G], h[G], state[2], plane[Cell::kPlanes];
    load_gates(job, row, j, lanes(j), gx, gh, x, h);
    state[1] = load(c_at(job.g, i, 1) + j);
    Cell::step(x, h, state, plane, options_at(job, (row * f_.N + job.g) * f_.H, j, lanes(j), {}));
    store(job.next_c + j, state[1]);
  }
}

// One step back of all rows, once dh is there.
template <class Cell, class M>
void BackwardScan<Cell, M>::rows_back(const Job& job, int64_t t, int64_t count, int parity) {
  const void* const* small = f_.options->small + job.g * kSmalls;
  for (int64_t k = 0; k < count; k++) {
    int64_t i = job.rows[k], row = rows_.at(t, i), at = row * f_.N + job.g;
    const CT* d = job.d_rows + i * c_stride_;
    Entering from = entering(job, t, i, row);
    RowNorm<CT> norm;
    if (small[kGainC]) measure_row(job, at, from, d, &norm);
    for (int64_t j = 0; j < f_.H; j += n)
      cell_back<true>(job, row, i, j, int(f_.H - j < n ? f_.H - j : n), parity, from, load(d + j), norm);
    if (!small[kGain]) continue;
    d_normalise_gates<Cell>(job.gates, f_.H, (const CT*)f_.product + at * G * f_.H, (const ST*)small[kGain],
                            job.small + kSmalls * c_stride_, f_.options->eps);
    for (int g = 0; g < G; g++)
      for (int64_t j = 0; j < f_.H; j += n) {
        int valid = int(f_.H - j < n ? f_.H - j : n);
        V dproduct = load(job.gates + g * f_.H + j, valid);
        store((ST*)f_.dproduct + (at * G + g) * f_.H + j, dproduct, valid);
        store(dg_at(job.g, parity, i) + g * f_.H + j, dproduct, valid);
      }
  }
}

// What layer norm of c needs to know of a row: the moments of c', then the means of its gradient.
template <class Cell, class M>
void BackwardScan<Cell, M>::measure_row(const Job& job, int64_t at, const Entering& from, const CT* d,
                                        RowNorm<CT>* norm) {
  if constexpr (K == 2) {
    V dgx[G], dgh[G], denter[K];
    CT* c = job.gates + G * f_.H;
    norm->gained = c + c_stride_;
    norm->measuring = true;
    for (int pass = 0; pass < 2; pass++) {
      for (int64_t j = 0; j < f_.H; j += n) {
        int valid = int(f_.H - j < n ? f_.H - j : n);
        V dstate[K] = {load(d + j), V{}}, plane[Q], state[K];
        load_step(at, j, valid, from, plane, state);
        StepOptions<V, CT> options = options_at(job, at * f_.H, j, valid, *norm, nullptr);
        if (pass)
          Cell::step_backward(dstate, plane, state, dgx, dgh, denter, options);
        else
          store(c + j, options.clipped(Cell::raw_c(plane, state[1], options)));
      }
      if (pass) break;
      norm->c = moments(c, f_.H, f_.options->eps);
    }
    gradient_means(norm->gained, c, norm->c, f_.H, &norm->mean, &norm->slope);
    norm->measuring = false;
  }
}
