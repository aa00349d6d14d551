// Minimal gated unit. Mirrors rnnkern/cells/mgu/reference.py; no include guard: included once per ISA namespace.
//   f = sigmoid(gx + gh);  n = tanh(gx_n + f gh_n);  h' = (1 - f) h + f n;  a mask of the candidate drops from n

struct Mgu {
  static constexpr int kGates = 2, kStates = 1, kPlanes = 3;
  static constexpr bool kSplit = true, kReadsH = true, kDiagonal = false;
  static constexpr int kNorm[] = {1, 1};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& o) {
    V f = sigmoid(gx[0] + gh[0]);
    V n = tanh(gx[1] + f * gh[1]);
    state[0] = state[0] + f * (o.kept(n) - state[0]);
    plane[0] = f, plane[1] = n, plane[2] = gh[1];
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& o) {
    V f = plane[0], n = plane[1], hn = plane[2];
    V dh = dstate[0];
    V dn = o.kept(dh * f) * d_tanh(n);
    V df = (dh * (o.kept(n) - state[0]) + dn * hn) * d_sigmoid(f);
    dgx[0] = dgh[0] = df;
    dgx[1] = dn;
    dgh[1] = dn * f;
    denter[0] = dh * (1 - f);
  }
};
