// What generate asks of a row of logits; no include guard: included once per ISA namespace.

// NaN where any is.
template <class CT>
static double largest(const CT* x, int64_t size) {
  constexpr int n = Simd<CT>::n;
  typedef vec<CT> V;
  typename Simd<CT>::i strange = {};
  V best = splat(-CT(__builtin_inf()));
  int64_t j = 0;
  for (; j + n <= size; j += n) {
    V one = load(x + j);
    strange |= one != one;
    best = at_least(one, best);
  }
  CT peak = best[0];
  for (int i = 0; i < n; i++) {
    if (strange[i]) return __builtin_nan("");
    if (best[i] > peak) peak = best[i];
  }
  for (; j < size; j++) {
    if (x[j] != x[j]) return __builtin_nan("");
    if (x[j] > peak) peak = x[j];
  }
  return peak;
}

// exp((x - peak) / temperature), and its sum.
template <class CT>
static double odds_of(const CT* x, int64_t size, double peak, double temperature, CT* to) {
  constexpr int n = Simd<CT>::n;
  typedef vec<CT> V;
  typedef Exp<CT> E;
  const CT most = sizeof(CT) == 4 ? CT(3e38) : CT(1e300);
  const CT top = CT(peak), divisor = temperature < 1 / most ? 1 / most : temperature > most ? most : CT(temperature);
  V sum = {};
  for (int64_t j = 0; j < size; j += n) {
    int valid = int(size - j < n ? size - j : n);
    V power = (load(x + j, valid) - top) / divisor, scale, p;
    exp_parts<V, CT>(at_least(power, splat(-E::tiny)), &scale, &p);
    V weight = power < -E::tiny ? V{} : scale * p + scale;
    store(to + j, weight, valid);
    sum += valid == n ? weight : load(to + j, valid);
  }
  double total = 0;
  for (int i = 0; i < n; i++) total += sum[i];
  return total;
}
