// GRU cell. Mirrors rnnkern/cells/gru/reference.py; no include guard: included once per ISA namespace.
//   r, z = sigmoid(gx + gh);  n = tanh(gx_n + r gh_n);  h' = (1 - z) n + z h;  a mask of the candidate drops from n

struct Gru {
  static constexpr int kGates = 3, kStates = 1, kPlanes = 4;
  static constexpr bool kSplit = true, kReadsH = true, kDiagonal = false;
  static constexpr int kNorm[] = {2, 1};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& o) {
    V r = sigmoid(gx[0] + gh[0]);
    V z = sigmoid(gx[1] + gh[1]);
    V n = tanh(gx[2] + r * gh[2]);
    V m = o.kept(n);
    state[0] = m + z * (state[0] - m);
    plane[0] = r, plane[1] = z, plane[2] = n, plane[3] = gh[2];
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& o) {
    V r = plane[0], z = plane[1], n = plane[2], hn = plane[3];
    V dh = dstate[0];
    V dz = dh * (state[0] - o.kept(n)) * d_sigmoid(z);
    V dn = o.kept(dh * (1 - z)) * d_tanh(n);
    V dr = dn * hn * d_sigmoid(r);
    dgx[0] = dgh[0] = dr;
    dgx[1] = dgh[1] = dz;
    dgx[2] = dn;
    dgh[2] = dn * r;
    denter[0] = dh * z;
  }
};
