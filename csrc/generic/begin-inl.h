// What all threads do before the first step of a scan, and after its last: packing, the states or gradients that enter
// it, and sums over all rows; no include guard.

// ---- forward -----------------------------------------------------------------------------------------------------

template <class Cell, class M>
void ForwardScan<Cell, M>::prepare(int rank) {
  for (int64_t g = 0; g < f_.N; g++) {
    for (int col = 0; col < split_.cols; col++) {
      Range own = share(blocks_, split_.cols, col), out = share(out_blocks_, split_.cols, col);
      for (int64_t b = own.begin; b < own.end; b += kUnits)
        if (split_.packer(g, col, b / kUnits) == rank) pack_gates(g, b, own.take(b, kUnits));
      if (pack_hh_ && projected_)
        for (int64_t b = out.begin; b < out.end; b += 4)
          if (split_.packer(g, col, b / 4) == rank) pack_projection(g, b, out.take(b, 4));
    }
  }
  int team = rank / split_.cols;
  Deal rows = Deal::of(f_.B, split_.rows, team % split_.rows);
  Range mine = share(rows.size, split_.cols, rank % split_.cols);
  for (int64_t g = team / split_.rows; g < f_.N; g += split_.groups)
    for (int64_t k = mine.begin; k < mine.end; k++) enter_row(g, rows[k]);
}

template <class Cell, class M>
void ForwardScan<Cell, M>::pack_gates(int64_t g, int64_t block, int units) {
  const Weights& w = f_.weights[g];
  int64_t row[kUnits * G], at = gate(g, block);
  int valid[kUnits * G];
  for (int u = 0; u < units; u++)
    for (int k = 0; k < G; k++) {
      int v = u * G + k;
      int64_t j = (block + u) * n;
      row[v] = k * f_.H + j;
      valid[v] = int(f_.H - j < n ? f_.H - j : n);
      store(bias_hh_ + at + v * n, w.b_hh ? load((const ST*)w.b_hh + row[v], valid[v]) : V{});
      store(bias_ih_ + at + v * n, w.b_ih ? load((const ST*)w.b_ih + row[v], valid[v]) : V{});
      if (norms_x_)
        store(gain_ih_ + at + v * n, load((const ST*)f_.options->small[g * kSmalls + kGainX] + row[v], valid[v]));
    }
  if (pack_hh_) pack_nt<M>((const ST*)w.w_hh, f_.P, row, valid, units * G, hh_ + at * hh_steps_);
  if (pack_ih_) pack_nt<M>((const ST*)w.w_ih, f_.I, row, valid, units * G, ih_ + at * ih_steps_);
}

template <class Cell, class M>
void ForwardScan<Cell, M>::pack_projection(int64_t g, int64_t block, int units) {
  int64_t row[4];
  int valid[4];
  for (int u = 0; u < units; u++) {
    row[u] = (block + u) * n;
    valid[u] = int(f_.P - row[u] < n ? f_.P - row[u] : n);
  }
  pack_nt<M>((const ST*)f_.weights[g].w_hr, f_.H, row, valid, units, hr_ + (g * out_blocks_ + block) * n * hr_steps_);
}

// Both h buffers and c hold the state that enters the row's first step; padding is zero.
template <class Cell, class M>
void ForwardScan<Cell, M>::enter_row(int64_t g, int64_t i) {
  int64_t b = rows_.batch_row(i), first = rows_.first(i, f_.weights[g].reverse);
  bool fresh = rows_.length(i) > 0 && rows_.resets(rows_.at(first, i), g);
  const ST* h = fresh ? reset_value<ST>(f_, 0, g, b) : initial<ST>(0, (g * f_.B + b) * f_.P);
  for (int parity = 0; parity < 2; parity++) {
    A* to = h_at(g, parity, i);
    for (int64_t j = 0; j < h_stride_; j++) to[j] = h && j < f_.P ? as_left<M>(h[j]) : A{};
    if (drops_) {
      A* left = left_at(g, parity, i);
      for (int64_t j = 0; j < h_stride_; j++) left[j] = A{};
      for (int64_t j = 0; h && j < f_.P && rows_.length(i) > 0; j += n) {
        int valid = int(f_.P - j < n ? f_.P - j : n);
        drop(g, first, i, j, valid, load(h + j, valid), left);
      }
    }
  }
  for (int k = 1; k < K; k++) {
    const CT* c = fresh ? reset_value<CT>(f_, k, g, b) : initial<CT>(k, (g * f_.B + b) * f_.H);
    CT* to = c_at(g, i, k);
    for (int64_t j = 0; j < c_stride_; j++) to[j] = c && j < f_.H ? c[j] : CT(0);
  }
  if (projected_)
    for (int64_t j = 0; j < m_stride_; j++) m_at(g, i)[j] = A{};
}

// ---- backward ----------------------------------------------------------------------------------------------------

template <class Cell, class M>
void BackwardScan<Cell, M>::prepare(int rank) {
  for (int64_t g = 0; g < f_.N; g++) {
    const Weights& w = f_.weights[g];
    for (int col = 0; pack_ && col < split_.cols; col++) {
      Range own = share(blocks_, split_.cols, col), out = share(out_blocks_, split_.cols, col);
      for (int64_t b = out.begin; b < out.end; b += 4)
        if (split_.packer(g, col, b / 4) == rank)
          pack_nn<M>((const ST*)w.w_hh, f_.P, G * f_.H, b * n, f_.P - b * n, out.take(b, 4),
                     hh_ + (g * out_blocks_ + b) * n * hh_steps_);
      for (int64_t b = own.begin; projected_ && b < own.end; b += 4)
        if (split_.packer(g, col, b / 4) == rank)
          pack_nn<M>((const ST*)w.w_hr, f_.H, f_.P, b * n, f_.H - b * n, own.take(b, 4),
                     hr_ + (g * blocks_ + b) * n * hr_steps_);
    }
  }
  int team = rank / split_.cols;
  Deal rows = Deal::of(f_.B, split_.rows, team % split_.rows);
  Range mine = share(rows.size, split_.cols, rank % split_.cols);
  for (int64_t g = team / split_.rows; g < f_.N; g += split_.groups)
    for (int64_t k = mine.begin; k < mine.end; k++) start_row(g, rows[k]);
}

template <class Cell, class M>
void BackwardScan<Cell, M>::start_row(int64_t g, int64_t i) {
  int64_t from = g * f_.B + rows_.batch_row(i);
  copy_left<Plain<CT, ST>>((const ST*)f_.dfinal[0] + from * f_.P, f_.P, h_stride_, dh_at(g, i));
  for (int k = 1; k < K; k++)
    copy_left<Plain<CT, CT>>((const CT*)f_.dfinal[k] + from * f_.H, f_.H, c_stride_, dc_at(g, i, k));
  for (int parity = 0; parity < 2; parity++)
    for (int64_t j = G * f_.H; j < g_stride_; j++) dg_at(g, parity, i)[j] = A{};
  if (projected_)
    for (int64_t j = f_.P; j < d_stride_; j++) dp_at(g, i)[j] = A{};
  if (f_.dreset_state[0]) {
    __builtin_memset(fresh_h_ + (g * f_.B + i) * h_stride_, 0, h_stride_ * sizeof(CT));
    if (K > 1) __builtin_memset(fresh_at(g, i, 1), 0, (K - 1) * c_stride_ * sizeof(CT));
  }
}

// Of the gradients of the small parameters.
template <class Cell, class M>
void BackwardScan<Cell, M>::clear_small(const Job& job) {
  Range own = job.own.columns(n, c_stride_);
  for (int k = 0; k < kSmalls + G; k++)
    __builtin_memset(job.small + k * c_stride_ + own.begin, 0, own.size() * sizeof(CT));
}

// Those of all shares of the rows, in their order.
template <class Cell, class M>
void BackwardScan<Cell, M>::add_small() {
  for (int64_t g = 0; g < f_.N; g++)
    for (int k = 0; k < kSmalls; k++) {
      CT* to = (CT*)f_.dsmall[g * kSmalls + k];
      int64_t first = k == kGain ? int(kSmalls) : k;
      for (int64_t v = 0; to && v < (k == kGain ? G : 1); v++)
        for (int64_t j = 0; j < f_.H; j++) {
          CT sum = 0;
          for (int r = 0; r < split_.rows; r++)
            sum += small_[(g * split_.rows + r) * small_size_ + (first + v) * c_stride_ + j];
          to[v * f_.H + j] = sum;
        }
    }
}
