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
  RK_INLINE V squashed(V c) const {
    return tanh(c);
  }
  template <class V>
  RK_INLINE V d_normed(V d, V) const {
    return d;
  }
};

// Of one row's step back under layer norm of c, what was measured before: its gradient's norm, and in memory c' behind
// its tanh, and the gradients there times the gain [H].
template <class CT>
struct RowNorm {
  NormGradient<CT> c;
  const CT *squashed = nullptr, *gained = nullptr;
};

// Of a step back with layer norm of c and nothing else.
template <class V, class CT>
struct NormOptions : NoOptions {
  RowNorm<CT> row;
  CT *dgain = nullptr, *dshift = nullptr;  // where their gradients are added up; or null

  RK_INLINE V squashed(V) const { return load(row.squashed); }
  // The gradient at c from that at what it was normalised to, gain and shift included.
  RK_INLINE V d_normed(V d, V c) const {
    V normed = row.c.x.normed(c);
    if (dgain) store(dgain, load(dgain) + d * normed);
    if (dshift) store(dshift, load(dshift) + d);
    return row.c(load(row.gained), normed);
  }
};

template <class V, class CT>
struct StepOptions {
  V keep;      // what the candidate is multiplied by
  bool clips;  // within [-bound, bound]
  V bound;
  bool peeps, norms;
  V small[kSmalls];
  CT* dsmall[kSmalls];  // where their gradients are added up; or null
  NormOptions<V, CT> norm;

  RK_INLINE V kept(V candidate) const { return candidate * keep; }
  RK_INLINE V clipped(V c) const { return clips ? at_least(at_most(c, bound), -bound) : c; }
  // The gradient at `raw` of clipped(raw); NaN lies outside of every bound.
  RK_INLINE V d_clipped(V d, V raw) const { return clips ? (raw >= -bound ? (raw <= bound ? d : V{}) : V{}) : d; }

  // `gate` as it sees c.
  RK_INLINE V peep(Small k, V gate, V c) const { return peeps ? gate + small[k] * c : gate; }
  // The gradient at c, from `d` of its other ways and that of the gate.
  RK_INLINE V d_peep(Small k, V d, V d_gate, V c) const {
    if (!peeps) return d;
    if (dsmall[k]) store(dsmall[k], load(dsmall[k]) + d_gate * c);
    return d + small[k] * d_gate;
  }

  RK_INLINE V squashed(V c) const { return norms ? norm.squashed(c) : tanh(c); }
  RK_INLINE V d_normed(V d, V c) const { return norms ? norm.d_normed(d, c) : d; }
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

// Of column j and on of a row; dsmall [kSmalls][dsmall_stride] or null.
template <class CT>
RK_INLINE NormOptions<vec<CT>, CT> norm_options(int64_t j, RowNorm<CT> row, CT* dsmall, int64_t dsmall_stride) {
  row.squashed += j, row.gained += j;
  CT *dgain = dsmall ? dsmall + kGainC * dsmall_stride + j : nullptr,
     *dshift = dsmall ? dsmall + kShiftC * dsmall_stride + j : nullptr;
  return {{}, row, dgain, dshift};
}

// The same in row `at` of [S, N, H]; `small` are the group's.
template <class CT, class ST>
RK_INLINE StepOptions<vec<CT>, CT> step_options(const Options& o, const void* const* small, int64_t at, int64_t j,
                                                int valid, const RowNorm<CT>& row, CT* dsmall, int64_t dsmall_stride) {
  StepOptions<vec<CT>, CT> s{
      factors<CT>(o.candidate, at + j, valid), o.cell_clip > 0, splat(CT(o.cell_clip)), false, false, {}, {}, {}};
  if (!small) return s;
  s.peeps = small[kPeepholeI] != nullptr;
  for (int k = kPeepholeI; s.peeps && k <= kPeepholeO; k++) {
    s.small[k] = load((const ST*)small[k] + j, valid);
    s.dsmall[k] = dsmall ? dsmall + k * dsmall_stride + j : nullptr;
  }
  s.norms = row.squashed != nullptr;
  if (s.norms) s.norm = norm_options<CT>(j, row, dsmall, dsmall_stride);
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
