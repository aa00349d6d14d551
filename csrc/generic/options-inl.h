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
};

template <class V>
struct StepOptions {
  V keep;      // what the candidate is multiplied by
  bool clips;  // within [-bound, bound]
  V bound;

  RK_INLINE V kept(V candidate) const { return candidate * keep; }
  RK_INLINE V clipped(V c) const { return clips ? at_least(at_most(c, bound), -bound) : c; }
  // The gradient at `raw` of clipped(raw); NaN lies outside of every bound.
  RK_INLINE V d_clipped(V d, V raw) const { return clips ? (raw >= -bound ? (raw <= bound ? d : V{}) : V{}) : d; }
};

// Bytes of 0 and 1 as numbers.
template <class CT>
RK_INLINE vec<CT> load_bytes(const uint8_t* p, int valid) {
  typedef uint8_t bytes __attribute__((vector_size(Simd<CT>::n)));
  bytes b{};
  __builtin_memcpy(&b, p, valid < Simd<CT>::n ? valid : Simd<CT>::n);
  return __builtin_convertvector(b, vec<CT>);
}

// What keeps and what drops: the factors of a mask [rows, width]; 1 where there is none.
template <class CT>
RK_INLINE vec<CT> factors(const Mask& mask, int64_t at, int valid) {
  return mask.keep ? load_bytes<CT>(mask.keep + at, valid) * CT(mask.scale) : splat(CT(1));
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

template <class CT>
RK_INLINE StepOptions<vec<CT>> step_options(const Options& o, int64_t at, int valid) {
  return {factors<CT>(o.candidate, at, valid), o.cell_clip > 0, splat(CT(o.cell_clip))};
}

template <class V, class CT>
RK_INLINE V bounded(V d, CT bound) {
  return bound > 0 ? at_least(at_most(d, splat(bound)), splat(-bound)) : d;
}
