"""RNN, LSTM, GRU and their cells: torch.nn's classes with rnnkern's kernels under them.

Constructors, parameters, initialisation, state dicts and errors are inherited. What is new is `forward`: it reads the
weights by attribute at each call (so parametrizations, weight drop and functional_call work) and hands over to
:mod:`rnnkern.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import _call, _checks, _fast, _layouts, functional
from rnnkern._fast import layer as short_layer
from rnnkern._options import Extended

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _not_scriptable(self: torch.nn.Module) -> None:
    """What torch.jit.script asks for, to compile it in place of a module."""
    raise RuntimeError(
        f"torch.jit.script cannot compile rnnkern.{type(self).__name__}. Script the model with torch.nn's modules, and "
        "run the result on rnnkern: scripted = torch.jit.script(rnnkern.restore(model)); "
        "with rnnkern.override(): scripted(x)"
    )


class RNN(Extended, torch.nn.RNN):
    r"""Elman network (Elman 1990, "Finding structure in time"), :class:`torch.nn.RNN` with fused kernels.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or, with ``nonlinearity="relu"``, :math:`\max(0, \cdot)` in place of :math:`\tanh`.

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `h`.
        num_layers: number of layers; each takes the outputs of the one before. Default: 1
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        batch_first: whether input and output are `(N, L, ...)` and not `(L, N, ...)`; states are not affected.
            Default: ``False``
        dropout: probability of dropout on the outputs of every layer but the last, in training. Default: 0
        bidirectional: whether every layer also runs from the end to the start. Default: ``False``
        memory: ``"save"`` or ``"recompute"``, see :class:`LSTM`. Default: ``"save"``
        recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, grad_clip: see :class:`LSTM`. Default: none
        layer_norm: as in :class:`LSTM`: each product is normalised, not their sum. Default: ``False``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, h_0, *, lengths, reset, reset_state, return_states
        See :class:`LSTM`; there is one state, so `h_0` and `reset_state` are tensors.

    Outputs: output, h_n
        See :class:`LSTM`; with ``return_states=True`` the third output has one tensor per layer.

    Shape:
        - input: `(L, N, H_in)`, `(N, L, H_in)` with `batch_first`, `(L, H_in)` unbatched, or a PackedSequence
        - h_0, h_n: `(D * num_layers, N, H)`, unbatched `(D * num_layers, H)`; `D` is 2 if bidirectional, else 1
        - output: as input, with `D * H` features

    dtype: float64, float32, bfloat16 or float16, one for all; sums are in float32 (float64 for float64).

    Raises:
        ValueError, RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.RNN(10, 20, 2, nonlinearity="relu")
        >>> output, hn = rnn(torch.randn(5, 3, 10))
    """

    __prepare_scriptable__ = _not_scriptable

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return "rnn_relu" if self.mode == "RNN_RELU" else "rnn_tanh"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: functional.Lengths | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        return one_state(self, self._cell, input, hx, lengths, reset, reset_state, return_states)


class LSTM(Extended, torch.nn.LSTM):
    r"""Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000; projection: Sak et al.
    2014), :class:`torch.nn.LSTM` with fused kernels.

    .. math::
        \begin{array}{ll}
            i_t = \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
            f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
            g_t = \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
            o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
            c_t = f_t \odot c_{t-1} + i_t \odot g_t \\
            h_t = o_t \odot \tanh(c_t)
        \end{array}

    and with a projection :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`.

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `c`, and of `h` where there is no projection.
        num_layers: number of layers; each takes the outputs of the one before. Default: 1
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        batch_first: whether input and output are `(N, L, ...)` and not `(L, N, ...)`; states are not affected.
            Default: ``False``
        dropout: probability of dropout on the outputs of every layer but the last, in training; one seed gives
            torch.nn's masks. Default: 0
        bidirectional: whether every layer also runs from the end to the start. Default: ``False``
        proj_size: if above 0, features of `h` after a projection; smaller than `hidden_size`. Default: 0
        memory: ``"save"`` keeps for the backward what it reads; ``"recompute"`` keeps the input and, about
            :math:`\sqrt{L}` times over the sequence, the states, and computes the rest again segment by segment: long
            sequences in a fraction of the memory, for another forward's time. Same results. No difference without a
            gradient to come, in graphs of torch.compile, under transforms of :mod:`torch.func` and in forward mode,
            and for one or two steps of RNN and GRU. Default: ``"save"``
        recurrent_dropout: probability of dropout in the recurrence, in training. Default: 0
        recurrent_dropout_mode: what it drops. ``"sequence"``: entries of the `h` that meets :math:`W_{hh}`, the same at
            every step of a sequence and for all gates (Gal and Ghahramani 2016). ``"step"``: the same, drawn anew at
            every step. ``"candidate"``: entries of :math:`g_t` (GRU: :math:`n_t`), anew at every step, so that nothing
            that is remembered is dropped (Semeniuta et al. 2016; not for RNN). Default: ``"sequence"``
        zoneout: probability with which a unit keeps the state that it had, anew at every step (Krueger et al. 2017);
            one for both states, or a pair for `h` and `c` (RNN and GRU: one). In evaluation states are mixed by it:
            :math:`h_t = p \, h_{t-1} + (1 - p) \, \tilde h_t`. Default: 0
        weight_dropout: probability of dropout on :math:`W_{hh}`, in training, one mask per call (Merity et al. 2018).
            Default: 0
        cell_clip: bound of :math:`|c_t|` (Sak et al. 2014); 0 is none, as for the next two. Default: 0
        proj_clip: bound of the projected `h` (Sak et al. 2014). Default: 0
        grad_clip: bound of every entry of the gradients of `h` and `c` as they leave a step, against exploding ones
            (after Graves 2013, who clips at the gates). Default: 0
        layer_norm: layer normalisation (Ba et al. 2016) of both products, :math:`W_{ih} x_t` and
            :math:`W_{hh} h_{t-1}`, over all gates together, with gains `ln_ih` and `ln_hh` and before the biases are
            added, and of :math:`c_t` in :math:`h_t = o_t \odot \tanh(LN(c_t))`, with gain `ln_c` and bias `ln_c_bias`.
            ``memory="recompute"`` then keeps the normalised products of the input. Default: ``False``
        peephole: gates that see the cell (Gers and Schmidhuber 2000): :math:`p_i \odot c_{t-1}` and
            :math:`p_f \odot c_{t-1}` are added in the gates i and f, :math:`p_o \odot c_t` in o. Default: ``False``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, (h_0, c_0), *, lengths, reset, reset_state, return_states
        * **input**: the sequence, batched, unbatched or a :class:`~torch.nn.utils.rnn.PackedSequence`.
        * **h_0**, **c_0**: initial states; zeros if not given.
        * **lengths**: for padded input, the steps of every sequence: integers on any device, in any order, zero
          allowed. Padding is not computed; outputs there are 0 and final states are those at each sequence's end.
        * **reset**: bool, in the container and layout of the input without features (a PackedSequence with the same
          batch sizes and indices for a packed one). True at t: a segment begins at t, and nothing crosses between t-1
          and t in either direction; at the first step it replaces the initial states of the forward direction.
        * **reset_state**: the states with which segments begin, as (h_0, c_0) or with batch size 1; zeros if not
          given. It may be learned.
        * **return_states**: whether to return all states of all layers as well.

    Outputs: output, (h_n, c_n)
        * **output**: `h` of the last layer at every step, both directions side by side, in the input's container.
        * **h_n**, **c_n**: states after the last step of every layer and direction.
        * with ``return_states=True`` a third output: a tuple over layers of `(h, c)` at every step, in the input's
          container and layout, before dropout; `h` of the last layer is `output` itself.

    Shape:
        - input: `(L, N, H_in)`, `(N, L, H_in)` with `batch_first`, `(L, H_in)` unbatched
        - h_0, h_n: `(D * num_layers, N, H_out)`; c_0, c_n: `(D * num_layers, N, H_cell)`; without `N` if unbatched
        - output: `(L, N, D * H_out)`, `(N, L, D * H_out)` with `batch_first`, `(L, D * H_out)` unbatched
        - lengths: `(N)`

        where `D` is 2 if bidirectional, else 1, `H_cell` is hidden_size and `H_out` is proj_size or hidden_size.

    Attributes:
        ln_ih_l[k], ln_hh_l[k]: gains of layer normalisation, `(4 * hidden_size)`, at first 1; with ``_reverse`` for the
            reverse direction, as below.
        ln_c_l[k], ln_c_bias_l[k]: its gain and bias for `c`, `(hidden_size)`, at first 1 and 0.
        peephole_i_l[k], peephole_f_l[k], peephole_o_l[k]: `(hidden_size)`, drawn as torch.nn's weights are.

    The others are torch.nn's. Options can be given new values (``lstm.zoneout = 0.2``) but for `layer_norm` and
    `peephole`, which have parameters.

    dtype: float64, float32, bfloat16 or float16, one for all; sums and `c` are in float32 (float64 for float64) from
    step to step. Under autocast, outputs have the dtypes that torch.nn's have.

    Raises:
        ValueError: arguments of the constructor out of range, or not of this class; input of the wrong rank or dtype;
            lengths, reset or reset_state that do not fit the input.
        RuntimeError: features, states, dtypes or devices that do not fit; no time steps; a backend asked for with
            :class:`rnnkern.use_backend` that cannot do it.

    Example::

        >>> rnn = rnnkern.LSTM(10, 20, 2)
        >>> input, h0, c0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        >>> output, (hn, cn) = rnn(input, (h0, c0))
        >>> output, (hn, cn), states = rnn(input, lengths=[5, 0, 3], return_states=True)
    """

    __prepare_scriptable__ = _not_scriptable
    _cell = "lstm"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: functional.Lengths | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        if lengths is None and reset is None and reset_state is None and not return_states:
            short = short_layer(self, "lstm", input, hx)
            if short is not None:
                return short
        states = functional.two_states("lstm", hx)
        restart = functional.two_states("lstm: reset_state", reset_state)
        return sequence(self, "lstm", input, states, lengths, reset, restart, return_states)


class GRU(Extended, torch.nn.GRU):
    r"""Gated recurrent unit (Cho et al. 2014, with the reset gate after the product as in cuDNN), :class:`torch.nn.GRU`
    with fused kernels.

    .. math::
        \begin{array}{ll}
            r_t = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
            z_t = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
            n_t = \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
            h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}
        \end{array}

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `h`.
        num_layers: number of layers; each takes the outputs of the one before. Default: 1
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        batch_first: whether input and output are `(N, L, ...)` and not `(L, N, ...)`; states are not affected.
            Default: ``False``
        dropout: probability of dropout on the outputs of every layer but the last, in training. Default: 0
        bidirectional: whether every layer also runs from the end to the start. Default: ``False``
        memory: ``"save"`` or ``"recompute"``, see :class:`LSTM`. Default: ``"save"``
        recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, grad_clip: see :class:`LSTM`. Default: none
        layer_norm: as in :class:`LSTM`, over r and z together and over n alone (Ba et al. 2016). Default: ``False``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, h_0, *, lengths, reset, reset_state, return_states
        See :class:`LSTM`; there is one state, so `h_0` and `reset_state` are tensors.

    Outputs: output, h_n
        See :class:`LSTM`; with ``return_states=True`` the third output has one tensor per layer.

    Shape:
        - input: `(L, N, H_in)`, `(N, L, H_in)` with `batch_first`, `(L, H_in)` unbatched, or a PackedSequence
        - h_0, h_n: `(D * num_layers, N, H)`, unbatched `(D * num_layers, H)`; `D` is 2 if bidirectional, else 1
        - output: as input, with `D * H` features

    dtype: float64, float32, bfloat16 or float16, one for all; sums are in float32 (float64 for float64).

    Raises:
        ValueError, RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.GRU(10, 20, 2, batch_first=True)
        >>> output, hn = rnn(torch.randn(3, 5, 10), lengths=torch.tensor([5, 2, 4]))
    """

    __prepare_scriptable__ = _not_scriptable
    _cell = "gru"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: functional.Lengths | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        return one_state(self, "gru", input, hx, lengths, reset, reset_state, return_states)


class RNNCell(torch.nn.RNNCell):
    r"""One step of an Elman network, :class:`torch.nn.RNNCell` with fused kernels.

    .. math::
        h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    or, with ``nonlinearity="relu"``, :math:`\max(0, \cdot)` in place of :math:`\tanh` (Elman 1990).

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `h`.
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, hidden
        * **input**: features of this step.
        * **hidden**: the state before it; zeros if not given.

    Outputs: h'
        * **h'**: the state after it.

    Shape:
        - input: `(N, H_in)` or `(H_in)`
        - hidden, h': `(N, H)` or `(H)`

    dtype: float64, float32, bfloat16 or float16, one for all.

    Raises:
        ValueError: input or hidden that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Example::

        >>> cell, h = rnnkern.RNNCell(10, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """

    __prepare_scriptable__ = _not_scriptable

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        short = _fast.step(self, f"rnn_{self.nonlinearity}", input, None if hx is None else (hx,))
        if short is not None:
            return short[0]
        return step(self, f"rnn_{self.nonlinearity}", "RNNCell", input, None if hx is None else (hx,))[0]


class LSTMCell(torch.nn.LSTMCell):
    r"""One step of long short-term memory, :class:`torch.nn.LSTMCell` with fused kernels.

    .. math::
        \begin{array}{ll}
            i = \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
            f = \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
            g = \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
            o = \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
            c' = f \odot c + i \odot g \\
            h' = o \odot \tanh(c')
        \end{array}

    (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `h` and `c`.
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, (h, c)
        * **input**: features of this step.
        * **h**, **c**: the states before it; zeros if not given.

    Outputs: (h', c')
        * **h'**, **c'**: the states after it.

    Shape:
        - input: `(N, H_in)` or `(H_in)`
        - h, c, h', c': `(N, H)` or `(H)`

    dtype: float64, float32, bfloat16 or float16, one for all.

    Raises:
        ValueError: input or states that are neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Example::

        >>> cell, state = rnnkern.LSTMCell(10, 20), None
        >>> for x in torch.randn(6, 3, 10):
        ...     state = cell(x, state)
    """

    __prepare_scriptable__ = _not_scriptable

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        short = _fast.step(self, "lstm", input, hx)
        if short is not None:
            return short
        h, c = step(self, "lstm", "LSTMCell", input, None if hx is None else tuple(hx))
        return h, c


class GRUCell(torch.nn.GRUCell):
    r"""One step of a gated recurrent unit, :class:`torch.nn.GRUCell` with fused kernels.

    .. math::
        \begin{array}{ll}
            r = \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
            z = \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
            n = \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
            h' = (1 - z) \odot n + z \odot h
        \end{array}

    (Cho et al. 2014, with the reset gate after the product as in cuDNN).

    Args:
        input_size: number of features of `x`.
        hidden_size: number of features of `h`.
        bias: whether there are biases `b_ih` and `b_hh`. Default: ``True``
        device: where the parameters live.
        dtype: dtype of the parameters.

    Inputs: input, hidden
        * **input**: features of this step.
        * **hidden**: the state before it; zeros if not given.

    Outputs: h'
        * **h'**: the state after it.

    Shape:
        - input: `(N, H_in)` or `(H_in)`
        - hidden, h': `(N, H)` or `(H)`

    dtype: float64, float32, bfloat16 or float16, one for all.

    Raises:
        ValueError: input or hidden that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Example::

        >>> cell, h = rnnkern.GRUCell(10, 20), None
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """

    __prepare_scriptable__ = _not_scriptable

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        short = _fast.step(self, "gru", input, None if hx is None else (hx,))
        if short is not None:
            return short[0]
        return step(self, "gru", "GRUCell", input, None if hx is None else (hx,))[0]


def _weight(module: torch.nn.Module, name: str) -> Any:
    """``getattr(module, name)``, past Module.__getattr__ for the plain parameter that it nearly always is."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def one_state(
    module: Extended,
    cell: str,
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    lengths: functional.Lengths | None,
    reset: Tensor | PackedSequence | None,
    reset_state: Tensor | None,
    return_states: bool,
) -> tuple[Any, ...]:
    if lengths is None and reset is None and reset_state is None and not return_states:
        short = short_layer(module, cell, input, hx)
        if short is not None:
            return short
    states = None if hx is None else (hx,)
    restart = None if reset_state is None else (reset_state,)
    y, (final,), *kept = sequence(module, cell, input, states, lengths, reset, restart, return_states)
    return (y, final, tuple(h for (h,) in kept[0])) if kept else (y, final)


def sequence(
    module: Extended,
    cell: str,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, ...] | None,
    lengths: functional.Lengths | None,
    reset: Tensor | PackedSequence | None,
    reset_state: tuple[Tensor, ...] | None,
    return_states: bool,
) -> tuple[Any, ...]:
    """A module's forward: (output, final states[, states of every layer]), with packed containers opened and closed."""
    weights = module._weights()
    data, sizes, order, back = input if isinstance(input, PackedSequence) else (input, None, None, None)
    if isinstance(reset, PackedSequence) or (reset is not None and sizes is not None):
        reset = _layouts.packed_reset(input, reset)
    if sizes is not None and order is not None:
        batch = order.numel()
        hx = hx and _layouts.in_order(module, hx, order, batch, "hidden")
        if reset_state is not None and all(state.dim() == 3 for state in reset_state):
            reset_state = _layouts.in_order(module, reset_state, order, batch, "reset_state", shared=True)
    if weights[0].is_cuda and isinstance(module, torch.nn.RNNBase):
        module._update_flat_weights()  # cuDNN wants the weights in one piece; replaced ones are laid out again
    y, final, states = _call.run(
        cell, data, hx, weights, module.bias, module.num_layers, module.dropout, module.training,
        module.bidirectional, module.batch_first, sizes, lengths, reset, reset_state, return_states,
        module.memory, module.options, module._project, module._heads,
    )  # fmt: skip
    if sizes is None:
        return (y, final, states) if return_states else (y, final)
    output = PackedSequence(y, sizes, order, back)
    if back is not None:
        final = tuple(h.index_select(1, back) for h in final)
    kept = tuple(tuple(output if s is y else PackedSequence(s, sizes, order, back) for s in layer) for layer in states)
    return (output, final, kept) if return_states else (output, final)


def step(
    module: torch.nn.Module, cell: str, title: str, input: Tensor, hx: tuple[Tensor, ...] | None, heads: int = 0,
    project: _call.Projection | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A cell's forward where it has no short way: its states after the step."""
    _checks.step_rank(title, input, hx)
    w_ih, w_hh, b_ih, b_hh = (_weight(module, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return _call.run_cell(cell, title, input, hx, w_ih, w_hh, b_ih, b_hh, heads, project)
