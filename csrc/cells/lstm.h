// LSTM cell. Mirrors rnnkern/cells/lstm/reference.py; no include guard: included once per ISA namespace.
//   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (gx + gh);  c' = f c + i g;  h' = o tanh(c')
// Options: i and f see c and o sees c' through peepholes, masks drop from g, c' is clipped, and normalised for tanh.

struct Lstm {
  static constexpr int kGates = 4, kStates = 2, kPlanes = 4;
  static constexpr bool kSplit = false, kReadsH = false, kDiagonal = false;
  static constexpr int kNorm[] = {4};  // gates normalised together

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& options) {
    V i = sigmoid(options.peep(kPeepholeI, gx[0] + gh[0], state[1]));
    V f = sigmoid(options.peep(kPeepholeF, gx[1] + gh[1], state[1]));
    V g = tanh(gx[2] + gh[2]);
    V c = options.clipped(f * state[1] + i * options.kept(g));
    V o = sigmoid(options.peep(kPeepholeO, gx[3] + gh[3], c));
    state[0] = output(o, c);
    state[1] = c;
    plane[0] = i, plane[1] = f, plane[2] = g, plane[3] = o;
  }

  static constexpr int kOutputGate = 3;

  // h' of c', normalised or not, and the gradient at c' of d at h', where `u` is c' behind its tanh.
  template <class V>
  static RK_INLINE V output(V o, V c) {
    return o * tanh(c);
  }
  template <class V>
  static RK_INLINE V d_output(V d, V o, V u) {
    return d * o * d_tanh(u);
  }

  // c' before its clip: rebuilt, not saved.
  template <class V, class O>
  static RK_INLINE V raw_c(const V* plane, V c0, const O& options) {
    return plane[1] * c0 + plane[0] * options.kept(plane[2]);
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& options) {
    V i = plane[0], f = plane[1], g = plane[2], o = plane[3];
    V c0 = state[1];
    V raw = raw_c(plane, c0, options), c = options.clipped(raw);
    V u = options.squashed(c);
    V dh = dstate[0];
    V d_o = dh * u * d_sigmoid(o);
    V dc = dstate[1] + options.d_normed(d_output(dh, o, u), c);
    dc = options.d_clipped(options.d_peep(kPeepholeO, dc, d_o, c), raw);
    dgx[0] = dgh[0] = dc * options.kept(g) * d_sigmoid(i);
    dgx[1] = dgh[1] = dc * c0 * d_sigmoid(f);
    dgx[2] = dgh[2] = dc * options.kept(i) * d_tanh(g);
    dgx[3] = dgh[3] = d_o;
    denter[0] = V{};
    denter[1] = options.d_peep(kPeepholeF, options.d_peep(kPeepholeI, dc * f, dgx[0], c0), dgx[1], c0);
  }
};
