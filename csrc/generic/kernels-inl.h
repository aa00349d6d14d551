// All generic code of one instruction set, in order; no include guard. The including file has opened the namespace and
// the target region and defined RK_VBYTES, RK_REGISTERS and the feature macros; it includes every-inl.h or bf16-inl.h,
// which say what is compiled of this.

// clang-format off: the order is the meaning
#include "simd-inl.h"
#include "math-inl.h"
#include "range-inl.h"
#include "norm-inl.h"
#include "options-inl.h"
#include "tiles-inl.h"
#include "product-inl.h"
#include "plan-inl.h"
#include "../cells/rnn.h"
#include "../cells/indrnn.h"
#include "../cells/lstm.h"
#include "../cells/gru.h"
#include "../cells/mgu.h"
#include "../cells/ligru.h"
#include "../cells/slstm.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "begin-inl.h"
#include "rows-inl.h"
#include "forms-inl.h"
#include "stored-inl.h"
#include "logits-inl.h"
#include "stream-inl.h"
#include "attention-inl.h"
// clang-format on

template <class ST>
struct ModeOf {
  typedef Plain<typename Accumulate<ST>::type, ST> type;
};
#ifdef RK_BF16
template <>
struct ModeOf<bf16> {
  typedef Pairs type;
};
#endif

// The one place that goes from run-time cell and dtype to their types.
template <template <class, class> class Driver, class M, class Call>
static void run_cell(const Call& call) {
  switch (call.cell) {
    case Cell::rnn_tanh:
      return Driver<Rnn<false>, M>::run(call);
    case Cell::rnn_relu:
      return Driver<Rnn<true>, M>::run(call);
    case Cell::lstm:
      return Driver<Lstm, M>::run(call);
    case Cell::gru:
      return Driver<Gru, M>::run(call);
    case Cell::mgu:
      return Driver<Mgu, M>::run(call);
    case Cell::indrnn_tanh:
      return Driver<IndRnn<false>, M>::run(call);
    case Cell::indrnn_relu:
      return Driver<IndRnn<true>, M>::run(call);
    case Cell::ligru:
      return Driver<LiGru, M>::run(call);
    case Cell::slstm:
      return Driver<SLstm, M>::run(call);
  }
}
