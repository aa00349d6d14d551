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
#include "gemm-inl.h"
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
template <template <class, class> class Driver, class M, Cell kCell, class Type, class Call>
static void run_as(const Call& call) {
  static_assert(Type::kStates == states_of(kCell) && Type::kDiagonal == is_diagonal(kCell), "api.h says otherwise");
  Driver<Type, M>::run(call);
}

template <template <class, class> class Driver, class M, class Call>
static void run_cell(const Call& call) {
  switch (call.cell) {
    case Cell::rnn_tanh:
      return run_as<Driver, M, Cell::rnn_tanh, Rnn<false>>(call);
    case Cell::rnn_relu:
      return run_as<Driver, M, Cell::rnn_relu, Rnn<true>>(call);
    case Cell::lstm:
      return run_as<Driver, M, Cell::lstm, Lstm>(call);
    case Cell::gru:
      return run_as<Driver, M, Cell::gru, Gru>(call);
    case Cell::mgu:
      return run_as<Driver, M, Cell::mgu, Mgu>(call);
    case Cell::indrnn_tanh:
      return run_as<Driver, M, Cell::indrnn_tanh, IndRnn<false>>(call);
    case Cell::indrnn_relu:
      return run_as<Driver, M, Cell::indrnn_relu, IndRnn<true>>(call);
    case Cell::ligru:
      return run_as<Driver, M, Cell::ligru, LiGru>(call);
    case Cell::slstm:
      return run_as<Driver, M, Cell::slstm, SLstm>(call);
  }
}
