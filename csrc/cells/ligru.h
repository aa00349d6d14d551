// Light gated unit. Mirrors rnnkern/cells/ligru/reference.py; no include guard: included once per ISA namespace.
//   z = sigmoid(gx + gh);  n = relu(gx + gh);  h' = (1 - z) n + z h;  a mask of the candidate drops from n

struct LiGru {
  static constexpr int kGates = 2, kStates = 1, kPlanes = 2;
  static constexpr bool kSplit = false, kReadsH = true, kDiagonal = false;
  static constexpr int kNorm[] = {2};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& o) {
    V z = sigmoid(gx[0] + gh[0]);
    V n = relu(gx[1] + gh[1]);
    V m = o.kept(n);
    state[0] = m + z * (state[0] - m);
    plane[0] = z, plane[1] = n;
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& o) {
    V z = plane[0], n = plane[1];
    V dh = dstate[0];
    dgx[0] = dgh[0] = dh * (state[0] - o.kept(n)) * d_sigmoid(z);
    dgx[1] = dgh[1] = n <= 0 ? V{} : o.kept(dh * (1 - z));
    denter[0] = dh * z;
  }
};
