// Layer norm of whole rows (Ba et al. 2016), without its gain; no include guard: included once per ISA namespace.
// A gradient times its gain is kept in memory before its mean is taken off: fused with that, the two would not cancel.

template <class CT>
struct Moments {
  CT mean = 0, scale = 1;  // scale: the reciprocal deviation

  vec<CT> normed(vec<CT> x) const { return (x - mean) * scale; }
};

// The sum of f(vector at j, lanes in use) over [0, size); what f gives in other lanes does not count.
template <class CT, class F>
static RK_INLINE CT sum_of(int64_t size, F f) {
  constexpr int n = Simd<CT>::n;
  vec<CT> sum{};
  int64_t j = 0;
  for (; j + n <= size; j += n) sum += f(j, n);
  CT total = 0;
  if (j < size) {
    vec<CT> last = f(j, int(size - j));
    for (int i = 0; i < size - j; i++) total += last[i];
  }
  for (int i = 0; i < n; i++) total += sum[i];
  return total;
}

template <class CT>
static Moments<CT> moments(const CT* x, int64_t size, double eps) {
  CT mean = sum_of<CT>(size, [&](int64_t j, int valid) { return load(x + j, valid); }) / CT(size);
  CT square = sum_of<CT>(size, [&](int64_t j, int valid) {
    vec<CT> d = load(x + j, valid) - mean;
    return d * d;
  });
  return {mean, CT(1 / __builtin_sqrt(square / CT(size) + CT(eps)))};
}

// The mean of d, and that of d times what x was normalised to.
template <class CT>
static void gradient_means(const CT* d, const CT* x, const Moments<CT>& m, int64_t size, CT* mean, CT* slope) {
  *mean = sum_of<CT>(size, [&](int64_t j, int valid) { return load(d + j, valid); }) / CT(size);
  *slope = sum_of<CT>(size, [&](int64_t j, int valid) { return load(d + j, valid) * m.normed(load(x + j, valid)); }) /
           CT(size);
}

// Gates of one row [G*H], each group of the cell's by itself, in place; gain [G*H].
template <class Cell, class CT, class ST>
static void normalise_gates(CT* gates, int64_t H, const ST* gain, double eps) {
  constexpr int n = Simd<CT>::n;
  for (int parts : Cell::kNorm) {
    int64_t size = parts * H;
    Moments<CT> m = moments(gates, size, eps);
    for (int64_t j = 0; j < size; j += n) {
      int valid = int(size - j < n ? size - j : n);
      store(gates + j, m.normed(load(gates + j, valid)) * load(gain + j, valid), valid);
    }
    gates += size, gain += size;
  }
}

// From the gradients of what that made, in `gates`, to those of `product`; the gradients of gain are added to dgain.
template <class Cell, class CT, class ST>
static void d_normalise_gates(CT* gates, int64_t H, const CT* product, const ST* gain, CT* dgain, double eps) {
  constexpr int n = Simd<CT>::n;
  for (int parts : Cell::kNorm) {
    int64_t size = parts * H;
    Moments<CT> m = moments(product, size, eps);
    for (int64_t j = 0; j < size; j += n) {
      int valid = int(size - j < n ? size - j : n);
      vec<CT> d = load(gates + j, valid);
      store(dgain + j, load(dgain + j, valid) + d * m.normed(load(product + j, valid)), valid);
      store(gates + j, d * load(gain + j, valid), valid);
    }
    CT mean, slope;
    gradient_means(gates, product, m, size, &mean, &slope);
    for (int64_t j = 0; j < size; j += n) {
      int valid = int(size - j < n ? size - j : n);
      vec<CT> normed = m.normed(load(product + j, valid));
      store(gates + j, m.scale * (load(gates + j, valid) - mean - normed * slope), valid);
    }
    gates += size, product += size, gain += size, dgain += size;
  }
}
