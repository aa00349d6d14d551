// What a scan does beyond the plain one, on vectors: masks, fixed mixtures, bounds; no include guard.
//
// The drivers ask once per row or vector whether there is anything of it, and then call other functions, not inlined;
// the equations take it as a type. So a plain step is the plain equations, in the registers that it had.

// Of a plain step.
struct NoOptions {
  template <class V>
  RK_INLINE V kept(V candidate) const {
    return candidate;
  }
  template <class V>
  RK_INLINE V clipped(V c) const {
    return c;
  }
  template <class V>
  RK_INLINE V d_clipped(V d, V) const {
    return d;
  }
  template <class V>
  RK_INLINE V peep(Small, V gate, V) const {
    return gate;
  }
  template <class V>
  RK_INLINE V d_peep(Small, V d, V, V) const {
    return d;
  }
  template <class V>
  RK_INLINE V normed(V c) const {
    return c;
  }
  template <class V>
  RK_INLINE V d_normed(V d, V) const {
    return d;
  }
};

// Of one row's step under layer norm of c: its moments, and in a backward what a first pass, which is `measuring`,
// leaves for the second: the gradients with their gain [H], and then their means.
template <class CT>
struct RowNorm {
  Moments<CT> c;
  CT* gained = nullptr;
  CT mean = 0, slope = 0;
  bool measuring = false;
};

template <class V, class CT>
struct StepOptions {
  V keep;      // what the candidate is multiplied by
  bool clips;  // within [-bound, bound]
  V bound;
  bool peeps, norms;
  V small[kSmalls];
  RowNorm<CT> row;
  CT* dsmall[kSmalls];  // where their gradients are added up; or null

  RK_INLINE V kept(V candidate) const { return candidate * keep; }
  RK_INLINE V clipped(V c) const { return clips ? at_least(at_most(c, bound), -bound) : c; }
  // The gradient at `raw` of clipped(raw); NaN lies outside of every bound.
  RK_INLINE V d_clipped(V d, V raw) const { return clips ? (raw >= -bound ? (raw <= bound ? d : V{}) : V{}) : d; }

  // `gate` as it sees c.
  RK_INLINE V peep(Small k, V gate, V c) const { return peeps ? gate + small[k] * c : gate; }
  // The gradient at c, from `d` of its other ways and that of the gate.
  RK_INLINE V d_peep(Small k, V d, V d_gate, V c) const {
    if (!peeps) return d;
    add(k, d_gate * c);
    return d + small[k] * d_gate;
  }

  RK_INLINE V normed(V c) const { return norms ? row.c.normed(c) * small[kGainC] + small[kShiftC] : c; }
  // The gradient at c from that at normed(c).
  RK_INLINE V d_normed(V d, V c) const {
    if (!norms) return d;
    if (row.measuring) {
      store(row.gained, d * small[kGainC]);
      return d;
    }
    V normed = row.c.normed(c);
    add(kGainC, d * normed);
    add(kShiftC, d);
    return row.c.scale * (load(row.gained) - row.mean - normed * row.slope);
  }

 private:
  RK_INLINE void add(Small k, V d) const {
    if (dsmall[k]) store(dsmall[k], load(dsmall[k]) + d);
  }
};

// Bytes of 0 and 1 as numbers.
template <class CT>
RK_INLINE vec<CT> load_bytes(const uint8_t* p, int valid) {
  typedef uint8_t bytes __attribute__((vector_size(Simd<CT>::n)));
  bytes b{};
  __builtin_memcpy(&b, p, valid < Simd<CT>::n ? valid : Simd<CT>::n);
  return __builtin_convertvector(b, vec<CT>);
}

// What a mask [rows, width] keeps, 1 and 0; and the factors that these stand for. 1 where there is no mask.
template <class CT>
RK_INLINE vec<CT> kept(const Mask& mask, int64_t at, int valid) {
  return mask.keep ? load_bytes<CT>(mask.keep + at, valid) : splat(CT(1));
}
template <class CT>
RK_INLINE vec<CT> factors(const Mask& mask, int64_t at, int valid) {
  return kept<CT>(mask, at, valid) * CT(mask.scale);
}

// The share of state k's entering value that stays.
template <class CT>
RK_INLINE vec<CT> stays(const Options& o, int k, int64_t at, int valid) {
  return o.zoneout[k] ? load_bytes<CT>(o.zoneout[k] + at, valid) : splat(CT(o.share[k]));
}

template <class V>
RK_INLINE V mixed(V stay, V old, V now) {
  return stay * old + (1 - stay) * now;
}

// Of column j and on in row `at` of [S, N, H]; `small` are the group's, `dsmall` [kSmalls][dsmall_stride] or null.
template <class CT, class ST>
RK_INLINE StepOptions<vec<CT>, CT> step_options(const Options& o, const void* const* small, int64_t at, int64_t j,
                                                int valid, const RowNorm<CT>& row, CT* dsmall, int64_t dsmall_stride) {
  StepOptions<vec<CT>, CT> s{
      factors<CT>(o.candidate, at + j, valid), o.cell_clip > 0, splat(CT(o.cell_clip)), false, false, {}, row, {}};
  if (!small) return s;
  s.peeps = small[kPeepholeI] != nullptr;
  s.norms = small[kGainC] != nullptr;
  if (s.row.gained) s.row.gained += j;
  for (int k = kPeepholeI; k < kSmalls; k++)
    if (small[k]) {
      s.small[k] = load((const ST*)small[k] + j, valid);
      s.dsmall[k] = dsmall ? dsmall + k * dsmall_stride + j : nullptr;
    }
  return s;
}

// The gradient at `raw` of bounded(raw, bound); NaN lies outside of every bound.
template <class V, class CT>
RK_INLINE V d_bounded(V d, V raw, CT bound) {
  return raw >= -bound ? (raw <= bound ? d : V{}) : V{};
}

template <class V, class CT>
RK_INLINE V bounded(V d, CT bound) {
  return bound > 0 ? at_least(at_most(d, splat(bound)), splat(-bound)) : d;
}
