// The loop of rnnkern.generate over a Stepper with a head: no Python here.
#pragma once
#include <memory>

#include "api.h"

namespace rnnkern {

// Columns of a layer's gates.
inline int64_t gates(const StreamShape& s) {
  switch (s.cell) {
    case Cell::lstm:
    case Cell::slstm:
      return 4 * s.H;
    case Cell::gru:
      return 3 * s.H;
    case Cell::mgu:
    case Cell::ligru:
      return 2 * s.H;
    default:
      return s.H;
  }
}

struct GenerateCall {
  int64_t N = 0, L = 0, most = 0, beams = 1;  // the stepper has N * beams rows
  int64_t reads = 0;                          // tokens of the table
  const int64_t* prompt = nullptr;            // [N, L], copied
  const int64_t* lengths = nullptr;           // [N], copied
  const void* table = nullptr;      // [reads, embedded] in the dtype; if that is 0: [reads, G*H], accumulation dtype
  const double* uniform = nullptr;  // [N, most] in [0, 1): draws; null: greedy or beams
  double temperature = 1, top_p = 1, penalty = 1;
  int64_t top_k = 0;               // 0: all
  const int64_t* stops = nullptr;  // copied
  int64_t stop_count = 0;
  int64_t* tokens = nullptr;  // [N, most]; what a row does not get is left
  int64_t* counts = nullptr;  // [N]
  double* scores = nullptr;   // [N], of beams

  Attention* attention = nullptr;  // packed; null: there is none
  const void* readout = nullptr;   // [N * beams, P] in the dtype: of the step before the first, where it is read
  // Behind the token's features the stepper reads what attention feeds.
  int64_t embedded(const StreamShape& s) const { return s.I - (attention ? attention->shape.width() : 0); }
};

class Generation {
 public:
  virtual ~Generation() = default;
  virtual bool advance() = 0;  // some tens of milliseconds more; whether anything is left to do

  // Where logits were that cannot be chosen from; row -1: nowhere. Nothing is left to do then.
  int64_t row = -1, step = 0;
  double peak = 0;
};

// Throws std::invalid_argument where a token or length of the prompt is out of range.
std::unique_ptr<Generation> make_generation(const StreamShape& shape, Stepper& stepper, const GenerateCall& call);

}  // namespace rnnkern
