// Elman cell. Mirrors rnnkern/cells/rnn/reference.py; no include guard: included once per ISA namespace.
//   h' = tanh(gx + gh)  or  relu(gx + gh)

template <bool kRelu>
struct Rnn {
  static constexpr int kGates = 1, kStates = 1, kPlanes = 1;
  static constexpr bool kSplit = false, kReadsH = false, kDiagonal = false;
  static constexpr int kNorm[] = {1};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O&) {
    V a = gx[0] + gh[0];
    a = kRelu ? relu(a) : tanh(a);
    state[0] = a;
    plane[0] = a;
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V*, V* dgx, V* dgh, V* denter, const O&) {
    V a = plane[0];
    V d = kRelu ? (a <= 0 ? V{} : dstate[0]) : dstate[0] * d_tanh(a);
    dgx[0] = dgh[0] = d;
    denter[0] = V{};
  }
};
