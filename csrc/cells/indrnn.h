// Independently recurrent cell. Mirrors rnnkern/cells/indrnn/__init__.py; no include guard: included once per ISA
// namespace. The equations of rnn.h, where a unit sees of h itself alone:  gh = u h + b

template <bool kRelu>
struct IndRnn : Rnn<kRelu> {
  static constexpr bool kDiagonal = true;
};
