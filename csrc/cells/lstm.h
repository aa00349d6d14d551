// LSTM cell. Mirrors rnnkern/cells/lstm/reference.py; no include guard: included once per ISA namespace.
//   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (gx + gh);  c' = f c + i g;  h' = o tanh(c')
// Options drop from g and clip c'.

struct Lstm {
  static constexpr int kGates = 4, kStates = 2, kPlanes = 4;
  static constexpr bool kSplit = false, kReadsH = false, kDiagonal = false;

  template <class V, class O>
  static RK_INLINE void step(const V* gx, const V* gh, V* state, V* plane, const O& options) {
    V i = sigmoid(gx[0] + gh[0]);
    V f = sigmoid(gx[1] + gh[1]);
    V g = tanh(gx[2] + gh[2]);
    V o = sigmoid(gx[3] + gh[3]);
    V c = options.clipped(f * state[1] + i * options.kept(g));
    state[0] = o * tanh(c);
    state[1] = c;
    plane[0] = i, plane[1] = f, plane[2] = g, plane[3] = o;
  }

  template <class V, class O>
  static RK_INLINE void step_backward(const V* dstate, const V* plane, const V* state, V* dgx, V* dgh, V* denter,
                                      const O& options) {
    V i = plane[0], f = plane[1], g = plane[2], o = plane[3];
    V c0 = state[1];
    V raw = f * c0 + i * options.kept(g);  // rebuilt, not saved
    V u = tanh(options.clipped(raw));
    V dh = dstate[0];
    V dc = options.d_clipped(dstate[1] + dh * o * d_tanh(u), raw);
    dgx[0] = dgh[0] = dc * options.kept(g) * d_sigmoid(i);
    dgx[1] = dgh[1] = dc * c0 * d_sigmoid(f);
    dgx[2] = dgh[2] = dc * options.kept(i) * d_tanh(g);
    dgx[3] = dgh[3] = dh * u * d_sigmoid(o);
    denter[0] = V{};
    denter[1] = dc * f;
  }
};
