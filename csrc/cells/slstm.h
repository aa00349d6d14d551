// sLSTM cell. Mirrors rnnkern/cells/slstm/reference.py; no include guard: included once per ISA namespace.
//   ai, af, z, o = the sum, the sum, tanh, sigmoid (gx + gh);  r = sigmoid(-af);  b = log sigmoid(af) + m
//   d = b - ai, -inf where n is 0;  i = exp(-max(d, 0));  f = exp(min(d, 0))
//   c' = f c + i z;  n' = f n + i;  m' = max(b, ai);  h' = o c' / n';  a mask of the candidate drops from z

struct SLstm {
  static constexpr int kGates = 4, kStates = 4, kPlanes = 4;
  static constexpr bool kSplit = false, kReadsH = false, kDiagonal = false;
  static constexpr int kNorm[] = {4};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& options) {
    V ai = gx[0] + gh[0], af = gx[1] + gh[1];
    V z = tanh(gx[2] + gh[2]);
    V o = sigmoid(gx[3] + gh[3]);
    V e = exp_below(af), s = 1 / (1 + e);
    V r = af > 0 ? e * s : s;
    V b = at_most(af, V{}) - log1p(e) + state[3];
    V d = state[2] == 0 ? V{} - __builtin_inff() : b - ai;
    V i, f;
    weights(d, &i, &f);
    V c = f * state[1] + i * options.kept(z);
    V n = f * state[2] + i;
    state[0] = o * (c / n);
    state[1] = c;
    state[2] = n;
    state[3] = d > 0 ? b : (d <= 0 ? ai : d);
    plane[0] = z, plane[1] = o, plane[2] = r, plane[3] = d;
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& options) {
    V z = plane[0], o = plane[1], r = plane[2], d = plane[3];
    V c0 = state[1], n0 = state[2];
    V i, f;
    weights(d, &i, &f);
    V n = f * n0 + i;
    V q = (f * c0 + i * options.kept(z)) / n;
    V dh = dstate[0], dm = dstate[3];
    V dq = dh * o / n;
    V dc = dstate[1] + dq;
    V dn = dstate[2] - dq * q;
    V di = dc * options.kept(z) + dn;
    V df = dc * c0 + dn * n0;
    V db = d > 0 ? dm - di * i : df * f;
    dgx[0] = dgh[0] = dm - db;
    dgx[1] = dgh[1] = db * r;
    dgx[2] = dgh[2] = dc * options.kept(i) * d_tanh(z);
    dgx[3] = dgh[3] = dh * q * d_sigmoid(o);
    denter[0] = V{};
    denter[1] = dc * f;
    denter[2] = dn * f;
    denter[3] = db;
  }

 private:
  // i and f, of which the larger is 1.
  template <class V>
  static RK_INLINE void weights(V d, V* i, V* f) {
    V e = exp_below(d), one = V{} + 1;
    *i = d <= 0 ? one : e;
    *f = d > 0 ? one : e;
  }
};
