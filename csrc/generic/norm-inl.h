// Layer norm of whole rows (Ba et al. 2016), without its gain; no include guard: included once per ISA namespace.
// A gradient times its gain is kept in memory before its mean is taken off: fused with that, the two would not cancel.

template <class CT>
struct Moments {
  CT mean = 0, scale = 1;  // scale: the reciprocal deviation

  vec<CT> normed(vec<CT> x) const { return (x - mean) * scale; }
};

// Of some numbers x of a row: how many, their mean, and the sum of squared deviations from it; of gradients d at what
// they are normalised to, times its gain, the sum, and that of each times the deviation of its x.
template <class CT>
struct Tally {
  CT size = 0, mean = 0, square = 0, d = 0, slope = 0;

  // More numbers of the row (Chan, Golub and LeVeque 1979: nothing cancels).
  void add(const Tally& o) {
    CT off = o.mean - mean, step = off * (o.size / (size + o.size));
    square += o.square + off * step * size;
    slope += o.slope - d * step + o.d * (off - step);
    mean += step, d += o.d, size += o.size;
  }

  Moments<CT> moments(double eps) const { return {mean, CT(1 / __builtin_sqrt(square / size + CT(eps)))}; }
};

// From gradients times their gain to those of x.
template <class CT>
struct NormGradient {
  Moments<CT> x;
  CT mean = 0, slope = 0;  // of the gradients, and of these times what x is normalised to

  NormGradient() = default;
  NormGradient(const Tally<CT>& all, double eps)
      : x(all.moments(eps)), mean(all.d / all.size), slope(all.slope * x.scale / all.size) {}

  vec<CT> operator()(vec<CT> gained, vec<CT> normed) const { return x.scale * (gained - mean - normed * slope); }
};

// What threads of a team tell one another of rows whose columns they share: a slot for the gates of each group that the
// cell normalises together, and for c. Between writing and reading one lies a barrier, between reading and writing too.
template <class Cell, class CT>
struct Tallies {
  static constexpr int kParts = sizeof(Cell::kNorm) / sizeof(int), kC = kParts, kDc = kC + 1, kSlots = kDc + 1;
  Tally<CT>* all = nullptr;  // [rank][row][kSlots]
  int64_t stride = 0;
  int cols = 1;

  // Of how many; each rank has its own cache lines.
  int64_t plan(int threads, int columns, int64_t rows) {
    cols = columns, stride = ceil_div(rows * kSlots, 16) * 16;
    return threads * stride;
  }
  Tally<CT>& own(int rank, int64_t row, int slot) const { return all[rank * stride + row * kSlots + slot]; }
  // That of the whole row.
  Tally<CT> joined(int rank, int64_t row, int slot) const {
    int first = rank / cols * cols;
    Tally<CT> sum = own(first, row, slot);
    for (int r = first + 1; r < first + cols; r++) sum.add(own(r, row, slot));
    return sum;
  }
};

// Which group of gates each one is in.
template <class Cell>
constexpr int norm_part(int gate) {
  int part = 0;
  for (int end = Cell::kNorm[0]; gate >= end; end += Cell::kNorm[part]) part++;
  return part;
}

// Sums of vectors, of each gate's, over the groups.
template <class Cell, class CT>
static RK_INLINE void sum_parts(const vec<CT>* of_gate, CT* sums) {
  for (int part = 0, k = 0; part < Tallies<Cell, CT>::kParts; part++) {
    vec<CT> sum = of_gate[k++];
    for (int rest = Cell::kNorm[part]; rest > 1; rest--) sum += of_gate[k++];
    sums[part] = total(sum);
  }
}

// Size, mean and squares of what `each` goes through: it calls its argument with vectors, lanes in use and the gate.
template <class Cell, class CT, class Each>
static RK_INLINE void tally_gates(int64_t columns, Each each, Tally<CT>* to) {
  constexpr int G = Cell::kGates, kParts = Tallies<Cell, CT>::kParts;
  CT sums[kParts];
  vec<CT> sum[G] = {}, square[G] = {}, mean[G];
  each([&](vec<CT> x, int valid, int k) RK_LAMBDA { sum[k] += only<CT>(x, valid); });
  sum_parts<Cell, CT>(sum, sums);
  for (int p = 0; p < kParts; p++) to[p] = {CT(Cell::kNorm[p] * columns), sums[p] / CT(Cell::kNorm[p] * columns)};
  for (int k = 0; k < G; k++) mean[k] = splat(to[norm_part<Cell>(k)].mean);
  each([&](vec<CT> x, int valid, int k) RK_LAMBDA {
    vec<CT> d = only<CT>(x - mean[k], valid);
    square[k] += d * d;
  });
  sum_parts<Cell, CT>(square, sums);
  for (int p = 0; p < kParts; p++) to[p].square = sums[p];
}
