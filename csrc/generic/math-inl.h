// exp-based activations on vectors; no include guard: included once per ISA namespace.
// Relative error a few units in the last place over the whole range; NaN stays NaN, infinities saturate.
// Coefficients: a minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, relative to exp(r) - 1 (1.3e-8
// and 1.8e-17).

template <class CT>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float log2e = 1.44269504088896341f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float magic = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr int mantissa = 23;
  static constexpr int32_t one = 0x3f800000, sign = INT32_MIN;
  static constexpr float tiny = 87.33f;      // exp(-tiny) is still a normal number
  static constexpr float saturated = 20.0f;  // 2 / (exp(saturated) + 1) is below half a unit in the last place of 1
  static RK_INLINE vec<float> tail(vec<float> r) {
    vec<float> p = splat(0.00138825062969f);
    p = p * r + 0.00836654768866f;
    p = p * r + 0.0416672008598f;
    p = p * r + 0.166665434184f;
    return p * r + 0.499999981492f;
  }
};

template <>
struct Exp<double> {
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 0x1.62e42fee00000p-1, ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double magic = 0x1.8p52;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000, sign = INT64_MIN;
  static constexpr double tiny = 708.39, saturated = 40.0;
  static RK_INLINE vec<double> tail(vec<double> r) {
    vec<double> p = splat(2.5053802802712283035e-8);
    p = p * r + 2.7626094636323359843e-7;
    p = p * r + 2.7557407609297451979e-6;
    p = p * r + 0.000024801505137260810262;
    p = p * r + 0.00019841269718786392741;
    p = p * r + 0.001388888893167273253;
    p = p * r + 0.0083333333333897032315;
    p = p * r + 0.041666666666576445261;
    p = p * r + 0.16666666666666589007;
    return p * r + 0.50000000000000052027;
  }
};

// exp(x) = scale * (1 + p), both exactly as needed for exp and for expm1; |x| must stay within the normal range.
template <class V, class CT>
RK_INLINE void exp_parts(V x, V* scale, V* p) {
  typedef Exp<CT> E;
  typedef typename Simd<CT>::i I;
  V t = x * E::log2e + E::magic;
  V n = t - E::magic;
  V r = x - n * E::ln2_hi;
  r = r - n * E::ln2_lo;
  *scale = (V)(((I)t << E::mantissa) + E::one);
  *p = E::tail(r) * (r * r) + r;
}

// Written so that they become one instruction each and let NaN through.
template <class V>
RK_INLINE V at_most(V x, V limit) {
  return limit < x ? limit : x;
}
template <class V>
RK_INLINE V at_least(V x, V limit) {
  return limit > x ? limit : x;
}

template <class V, class CT>
RK_INLINE V sigmoid_of(V x) {
  typedef Exp<CT> E;
  V scale, p;
  exp_parts<V, CT>(at_least(at_most(-x, splat(E::tiny)), splat(-E::tiny)), &scale, &p);
  V r = 1 / (scale * p + (scale + 1));
  return x < -E::tiny ? splat(CT(0)) : r;
}

template <class V, class CT>
RK_INLINE V tanh_of(V x) {
  typedef Exp<CT> E;
  typedef typename Simd<CT>::i I;
  V a = (V)((I)x & ~E::sign);
  V scale, p;
  a = a + a;
  exp_parts<V, CT>(at_most(a, splat(E::saturated)), &scale, &p);
  V e = scale * p + (scale - 1);  // expm1(2|x|): no cancellation near zero
  V r = e / (e + 2);
  return (V)((I)r | ((I)x & E::sign));
}

// log(1 + e) for e in [0, 1], by the series of 2 artanh(e / (2 + e)), whose argument is 1/3 at most: the terms left out
// are below half a unit in the last place.
template <class V, class CT>
RK_INLINE V log1p_of(V e) {
  constexpr int kTerms = sizeof(CT) == 4 ? 7 : 16;
  V s = e / (e + 2), w = s * s, p = splat(CT(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; k--) p = p * w + CT(1) / (2 * k + 1);
  return 2 * s * p;
}

// exp(-|x|): 1 and less.
template <class V, class CT>
RK_INLINE V exp_below_of(V x) {
  typedef Exp<CT> E;
  typedef typename Simd<CT>::i I;
  V a = (V)((I)x | E::sign);
  V scale, p;
  exp_parts<V, CT>(at_least(a, splat(-E::tiny)), &scale, &p);
  V r = scale * p + scale;
  return a < -E::tiny ? splat(CT(0)) : r;
}

RK_INLINE vec<float> log1p(vec<float> e) { return log1p_of<vec<float>, float>(e); }
RK_INLINE vec<double> log1p(vec<double> e) { return log1p_of<vec<double>, double>(e); }
RK_INLINE vec<float> exp_below(vec<float> x) { return exp_below_of<vec<float>, float>(x); }
RK_INLINE vec<double> exp_below(vec<double> x) { return exp_below_of<vec<double>, double>(x); }
RK_INLINE vec<float> sigmoid(vec<float> x) { return sigmoid_of<vec<float>, float>(x); }
RK_INLINE vec<double> sigmoid(vec<double> x) { return sigmoid_of<vec<double>, double>(x); }
RK_INLINE vec<float> tanh(vec<float> x) { return tanh_of<vec<float>, float>(x); }
RK_INLINE vec<double> tanh(vec<double> x) { return tanh_of<vec<double>, double>(x); }
RK_INLINE vec<float> relu(vec<float> x) { return x < 0 ? vec<float>{} : x; }  // keeps NaN
RK_INLINE vec<double> relu(vec<double> x) { return x < 0 ? vec<double>{} : x; }

// Derivatives by the activation's own value.
template <class V>
RK_INLINE V d_sigmoid(V y) {
  return y * (1 - y);
}
template <class V>
RK_INLINE V d_tanh(V y) {
  return 1 - y * y;
}
