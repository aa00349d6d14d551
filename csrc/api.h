// The boundary between Python and the kernels: plain structs of pointers, sizes and strides. Neither torch nor Python
// here.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rnnkern {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, mgu, indrnn_tanh, indrnn_relu, ligru, slstm };
enum class DType : int { f64, f32, bf16, f16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

constexpr int kMaxStates = 4;  // h first; the others have width H and the accumulation dtype

constexpr int states_of(Cell cell) { return cell == Cell::lstm ? 2 : cell == Cell::slstm ? 4 : 1; }
constexpr bool is_diagonal(Cell cell) { return cell == Cell::indrnn_tanh || cell == Cell::indrnn_relu; }

// One group of weights: a direction of a layer, or a member of an ensemble. Row-major and contiguous, gates in torch
// order.
struct Weights {
  const void* w_hh = nullptr;  // [G*H, P], or [G*H] for a diagonal recurrence
  const void* b_hh = nullptr;  // [G*H] or null
  const void* w_hr = nullptr;  // [P, H] or null: then P == H
  const void* w_ih = nullptr;  // [G*H, I]: only where the kernel projects the input itself
  const void* b_ih = nullptr;  // [G*H] or null
  bool reverse = false;
};

// Which entries are kept, bytes of 0 and 1 [rows, width], and what these are multiplied by; null: all, and by 1.
struct Mask {
  const uint8_t* keep = nullptr;
  double scale = 1;
};

// Parameters of a group beyond its matrices and biases, in the storage dtype: the gains of layer norm on h's product
// [G*H]; peepholes, and gain and shift of layer norm on c [H]; and, where a forward projects the input itself and no
// backward will come, the gains of layer norm on x's product [G*H].
enum Small : int { kGain, kPeepholeI, kPeepholeF, kPeepholeO, kGainC, kShiftC, kGainX, kSmalls };

// What a scan does beyond the plain one.
struct Options {
  Mask h;                          // [N, B, P] of the h that meets w_hh, at every step of a sequence
  Mask h_step;                     // [S, N, P] the same, step by step
  Mask candidate;                  // [S, N, H]
  const uint8_t* zoneout[2] = {};  // [S, N, width] where h and c keep what entered; or null
  double share[2] = {};            // how much of it stays, where there is no such mask
  double cell_clip = 0, proj_clip = 0, grad_clip = 0;  // 0: none
  double eps = 0;                                      // of layer norm
  const void* const* small = nullptr;                  // [N][kSmalls], null where there is none

  bool whole_rows() const { return small && (small[kGain] || small[kGainC]); }
  // Nothing but layer norm: steps have no other equations.
  bool only_norms() const {
    return whole_rows() && !small[kPeepholeI] && !drops() && !candidate.keep && !zones(0) && !zones(1) &&
           !(cell_clip > 0 || proj_clip > 0 || grad_clip > 0);
  }

  bool zones(int k) const { return zoneout[k] || share[k] > 0; }
  bool drops() const { return h.keep || h_step.keep; }
};

// What forward and backward share. S rows of (time, batch), N groups; row of (t, b) is offsets[t] + b.
struct Scan {
  Cell cell = Cell::lstm;
  DType dtype = DType::f32;
  int64_t T = 0, B = 0, S = 0, N = 0, I = 0, H = 0, P = 0;
  int64_t models = 1;                // x is [S, models, I]; group n reads x[:, n / (N / models)]
  const int64_t* offsets = nullptr;  // [T]; null: t * B
  const int64_t* lengths = nullptr;  // [B]; null: all T
  const uint8_t* reset = nullptr;    // [S, N] with the strides below; null: none
  int64_t reset_s = 0, reset_n = 0;
  const void* reset_state[kMaxStates] = {};  // [N, B, width], batch stride 0 allowed; null: zero
  int64_t reset_state_n[kMaxStates] = {}, reset_state_b[kMaxStates] = {};
  const Options* options = nullptr;     // null: a plain scan
  const Weights* weights = nullptr;     // [N]
  const void* state[kMaxStates] = {};   // [N, B, width] contiguous; forward only: null for zero
  int64_t planes_s = 0, product_s = 0;  // between rows of planes and of product
  int threads = 1;
};

struct Forward : Scan {
  const void* gx = nullptr;  // [S, N, G*H], last stride 1; null: computed here from x
  int64_t gx_s = 0, gx_n = 0;
  const void* x = nullptr;  // [S, models, I], last stride 1
  int64_t x_s = 0, x_m = 0;
  void* y = nullptr;                   // [S, N, P]
  void* final_state[kMaxStates] = {};  // [N, B, width]; h may be null where nobody asks for it
  void* seq[kMaxStates] = {};          // [S, N, H] every state but h, which y is, after every step; or null
  void* planes = nullptr;              // [S, N, Q, H] or null
  void* product = nullptr;             // [S, N, G*H] of h and w_hh, accumulation dtype; with kGain only, or null
  void* hidden = nullptr;              // [S, N, H] or null
};

struct Backward : Scan {
  const void* y = nullptr;           // [S, N, P] of the forward
  const void* seq[kMaxStates] = {};  // [S, N, H], of every state but h
  const void* planes = nullptr;      // [S, N, Q, H]
  const void* dy = nullptr;          // [S, N, P], last stride 1
  int64_t dy_s = 0, dy_n = 0;
  const void* dseq[kMaxStates] = {};    // [S, N, H] contiguous or null
  const void* product = nullptr;        // [S, N, G*H] of h and w_hh, accumulation dtype; with kGain only
  const void* projected = nullptr;      // [S, N, P] by w_hr before the clip, accumulation dtype; with proj_clip only
  const void* dfinal[kMaxStates] = {};  // [N, B, width] contiguous
  void* dgx = nullptr;                  // [S, N, G*H]
  void* dgh = nullptr;                  // [S, N, G*H], cells with a split gate only
  void* dproduct = nullptr;             // [S, N, G*H], with kGain only
  void* dh = nullptr;                   // [S, N, P], with w_hr only
  void* const* dsmall = nullptr;        // [N][kSmalls], accumulation dtype; null where there is none
  void* dstate[kMaxStates] = {};        // [N, B, width]
  void* dreset_state[kMaxStates] = {};  // [N, B, width], zeroed by the caller; null without reset states
};

// How a stream's weights are given and kept: in the accumulation dtype, as bf16, or as int8 with a scale for each row.
enum class Form : int { whole, bf16, int8 };

struct StreamShape {
  Cell cell = Cell::lstm;
  DType dtype = DType::f32;  // of inputs, outputs and h; f64 only with whole weights
  Form form = Form::whole;
  int64_t layers = 0, B = 0, I = 0, H = 0, P = 0;  // I 0: the first layer's input comes as gates
  int64_t groups = 1;                              // of hidden units that see of h their own alone; 1 if projected
  int64_t V = 0;                                   // outputs of a linear head on the last layer; 0: there is none
  bool projected = false;
};

// One layer as the caller has it, contiguous, group by group: weights in the form's type, biases in the accumulation
// dtype, or null; so w_hh [G*H] of a diagonal recurrence.
struct StreamLayer {
  const void *w_ih = nullptr, *w_hh = nullptr, *w_hr = nullptr;   // [G*H, I], [G*H, P / groups], [P, H]
  const void *b_ih = nullptr, *b_hh = nullptr;                    // [G*H]
  const float *s_ih = nullptr, *s_hh = nullptr, *s_hr = nullptr;  // [rows], for int8
};

struct StreamHead {
  const void *w = nullptr, *b = nullptr;  // [V, P], [V]
  const float* s = nullptr;               // [V], for int8
};

// Steps of a stream; strides in elements, rows of neighbouring ones.
struct StreamCall {
  int64_t T = 1;
  const void* x = nullptr;  // [T, B, I]
  int64_t x_t = 0, x_b = 0;
  const void* const* gates = nullptr;  // [B] of [G*H] in the accumulation dtype, with I 0 and T 1: x W_ih^T
  void* y = nullptr;                   // [T, B, P]; null: nobody asks for it
  int64_t y_t = 0, y_b = 0;
  void* logits = nullptr;           // [B, V] after the last step, of the rows that advance, accumulation dtype; or null
  const void* read = nullptr;       // [B, P] that the head reads; null: the last layer's h
  const uint8_t* active = nullptr;  // [B]: rows that advance; y of the others is zero; null: all
};

// Packed weights, states and scratch of a stack of layers. For one thread at a time.
class Stepper {
 public:
  virtual ~Stepper() = default;
  virtual void pack(const StreamLayer* layers, const StreamHead& head) = 0;
  virtual void run(const StreamCall& call) = 0;

  // States by number, h first: [layers, B, width] in the dtype.
  virtual int states() const = 0;
  virtual void read(int state, void* to) const = 0;
  virtual void write(int state, const void* from, const uint8_t* active) = 0;  // from null: zero

  virtual void select(const int64_t* from) = 0;  // [B]: every row's states become those of another

  // Of a row of logits: the largest, NaN where any is; and exp((logits - peak) / temperature), with its sum.
  virtual double highest(const void* logits) const = 0;
  virtual double odds(const void* logits, double peak, double temperature, void* to) const = 0;
};

// What the network of a decoder with attention reads behind its token: nothing more, the context of the h before the
// step, or the readout of the step before.
enum class Fed : int { nothing, context, readout };

struct AttentionShape {
  DType dtype = DType::f32;
  Fed fed = Fed::nothing;
  bool additive = false;               // else by products of queries and keys
  int64_t N = 0, beams = 1;            // sources, and neighbouring rows of the stepper that share one
  int64_t L = 0, S = 0, A = 0, P = 0;  // steps of a source, features of values, keys and queries
  int64_t width() const { return fed == Fed::context ? S : fed == Fed::readout ? P : 0; }
};

// Contiguous; matrices as bf16 if that is the dtype, all else and an additive one's keys in the accumulation dtype.
struct AttentionWeights {
  const void *keys = nullptr, *values = nullptr;  // [N, L, A], [N, S, L]
  const int64_t* lengths = nullptr;               // [N]: steps of each source that exist
  const void *query = nullptr, *score = nullptr;  // [A, P] and [A], additive only
  const void* readout = nullptr;                  // [P, S + P]
};

// Attention over sources, and the readout tanh(W [context; h]). For one thread at a time.
class Attention {
 public:
  explicit Attention(const AttentionShape& s) : shape(s) {}
  virtual ~Attention() = default;
  virtual void pack(const AttentionWeights& weights) = 0;

  // Of the active rows [N * beams] or, with null, all: contexts of queries [rows, P], kept for `read`, and given with
  // the stride `context_b` where context is not null; then the readouts [rows, P] of h [rows, P]. In the dtype.
  virtual void attend(const void* query, const uint8_t* active, void* context, int64_t context_b) = 0;
  virtual void read(const void* h, const uint8_t* active, void* readout) = 0;

  const AttentionShape shape;
};

// out [M, N] = a [M, K] b [K, N], or that added to it, in f32 or f64. One of a's strides is 1; rows of b and of out are
// of neighbouring elements. No size is 0.
struct Gemm {
  DType dtype = DType::f32;
  int64_t M = 0, N = 0, K = 0;
  const void *a = nullptr, *b = nullptr;
  void* out = nullptr;
  int64_t a_m = 0, a_k = 0, b_k = 0, out_m = 0;
  bool add = false;
  int threads = 1;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  Stepper* (*stepper)(const StreamShape&);         // with zero states and nothing packed; throws std::runtime_error
  Attention* (*attention)(const AttentionShape&);  // nothing packed; throws likewise
  void (*gemm)(const Gemm&);                       // null: there is none
};

extern const Kernels kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16;

// The set that RNNKERN_CPU_ISA names or else the best that this machine has; throws std::runtime_error with the reason.
const Kernels& choose_kernels(const char* requested);
const char* const* known_isas();  // null-terminated, best first

// Whether its matrix products are faster here than those that torch calls. On AMD's processors MKL keeps to AVX2: half
// as many numbers an instruction as a Zen 5 computes.
bool gemm_pays(const Kernels& kernels);

}  // namespace rnnkern
