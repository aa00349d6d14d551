"""Modules of cells that torch.nn does not have, in the form of torch.nn.GRU, and that of torch.nn.LSTM for SLSTM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import functional
from rnnkern._fast import layer as short_layer
from rnnkern._options import Extended
from rnnkern._stack import BatchNormed, Heads, Independent, Stack
from rnnkern.nn import one_state, sequence

__all__ = ["MGU", "SLSTM", "IndRNN", "LiGRU"]


class _OneState(Extended, Stack):
    """A stack whose cell has one state."""

    def forward(
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


class MGU(_OneState):
    r"""Minimal gated unit (Zhou et al. 2016, "Minimal gated unit for recurrent neural networks"): one gate, in the form
    where it acts on the product, as the reset gate of :class:`torch.nn.GRU` does. In the paper's own it acts on `h`.

    .. math::
        \begin{array}{ll}
            f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
            n_t = \tanh(W_{in} x_t + b_{in} + f_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
            h_t = (1 - f_t) \odot h_{t-1} + f_t \odot n_t
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
        layer_norm: as in :class:`LSTM`, over f and over n. Default: ``False``
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

    Attributes:
        weight_ih_l[k], weight_hh_l[k]: `(2 * hidden_size, ...)`, rows of f, then of n; bias_ih_l[k], bias_hh_l[k]:
            `(2 * hidden_size)`; with ``_reverse`` for the reverse direction. Drawn from
            :math:`\mathcal{U}(-\sqrt{1/H}, \sqrt{1/H})`, as torch.nn draws them.

    dtype: float64, float32, bfloat16 or float16, one for all; sums are in float32 (float64 for float64). Under autocast
    as :class:`GRU`.

    Raises:
        ValueError, RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.MGU(10, 20, 2, batch_first=True)
        >>> output, hn = rnn(torch.randn(3, 5, 10), lengths=torch.tensor([5, 2, 4]))
    """

    _cell = "mgu"


class IndRNN(Independent, _OneState):  # type: ignore[override]
    r"""Independently recurrent network (Li et al. 2018, "Independently recurrent neural network (IndRNN): building a
    longer and deeper RNN"): a unit sees of `h` itself alone, and layers mix them.

    .. math::
        h_t = \max(0, W_{ih} x_t + b_{ih} + u \odot h_{t-1} + b_{hh})

    or, with ``nonlinearity="tanh"``, :math:`\tanh` in place of :math:`\max(0, \cdot)`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in :class:`MGU`.
        nonlinearity: ``"relu"`` or ``"tanh"``. Default: ``"relu"``
        memory, recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, grad_clip: see :class:`LSTM`.
            Default: none
        layer_norm: as in :class:`LSTM`, of :math:`W_{ih} x_t` and of :math:`u \odot h_{t-1}`. Default: ``False``
        device, dtype: of the parameters.

    Inputs: input, h_0, *, lengths, reset, reset_state, return_states
        See :class:`MGU`.

    Outputs: output, h_n
        See :class:`MGU`.

    Shape:
        See :class:`MGU`.

    Attributes:
        weight_hh_l[k]: u, `(hidden_size)`, drawn from :math:`\mathcal{U}(0, 1)`. What grows over a sequence are powers
            of it: the paper keeps :math:`|u| \le 2^{1/L}`, as ``rnn.weight_hh_l0.data.clamp_(-bound, bound)`` does
            after a step of the optimizer.
        weight_ih_l[k]: `(hidden_size, ...)`; bias_ih_l[k], bias_hh_l[k]: `(hidden_size)`. Drawn as torch.nn draws them.

    dtype: as :class:`MGU`.

    Raises:
        ValueError: an unknown nonlinearity; and as :class:`LSTM`.
        RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.IndRNN(10, 20, 6)
        >>> output, hn = rnn(torch.randn(5, 3, 10))
    """


class LiGRU(BatchNormed, _OneState):
    r"""Light gated recurrent unit (Ravanelli et al. 2018, "Light gated recurrent units for speech recognition"): a GRU
    without reset gate, with ReLU, and with batch normalisation of the input's side.

    .. math::
        \begin{array}{ll}
            z_t = \sigma(BN(W_{iz} x_t) + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
            n_t = \max(0, BN(W_{in} x_t) + b_{in} + W_{hn} h_{t-1} + b_{hn}) \\
            h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}
        \end{array}

    where :math:`BN` is :class:`torch.nn.BatchNorm1d` with `bias_ih` as its shift: over all steps of all sequences of a
    batch in training, padding left out, and by running estimates in evaluation.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in :class:`MGU`.
        batch_norm: whether the input's side is normalised; without it ReLU may grow over a sequence. Default: ``True``
        memory, recurrent_dropout, recurrent_dropout_mode, zoneout, weight_dropout, grad_clip: see :class:`LSTM`. The
            paper's recurrent dropout is ``recurrent_dropout_mode="sequence"``. ``memory="recompute"`` keeps the
            normalised products of the input. Default: none
        layer_norm: as in :class:`LSTM`, over z and n together; not with `batch_norm`. Default: ``False``
        device, dtype: of the parameters.

    Inputs: input, h_0, *, lengths, reset, reset_state, return_states
        See :class:`MGU`.

    Outputs: output, h_n
        See :class:`MGU`.

    Shape:
        See :class:`MGU`.

    Attributes:
        weight_ih_l[k], weight_hh_l[k]: `(2 * hidden_size, ...)`, rows of z, then of n; bias_ih_l[k], bias_hh_l[k]:
            `(2 * hidden_size)`. Drawn as torch.nn draws them.
        bn_ih_l[k]: gain of batch normalisation, `(2 * hidden_size)`, at first 1.
        bn_mean_l[k], bn_var_l[k]: its running estimates, buffers, at first 0 and 1; a batch moves them by a tenth.

    dtype: as :class:`MGU`.

    Raises:
        ValueError: `batch_norm` together with `layer_norm`, or in training over one row; and as :class:`LSTM`.
        RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.LiGRU(10, 20, 2, bidirectional=True, recurrent_dropout=0.2)
        >>> output, hn = rnn(torch.randn(5, 3, 10))
    """

    def __init__(self, *args: Any, batch_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, batch_norm=batch_norm, **kwargs)
        if batch_norm and self.layer_norm:
            raise ValueError("layer_norm: LiGRU normalises over the batch; with batch_norm=False it can over the layer")


class SLSTM(Heads, Extended, Stack):
    r"""sLSTM, the cell of xLSTM with a scalar memory (Beck et al. 2024, "xLSTM: extended long short-term memory",
    section 2.2): an LSTM whose input gate is an exponential, with a normaliser `n` and heads.

    .. math::
        \begin{array}{ll}
            \tilde{\imath}_t = W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi} \\
            \tilde{f}_t = W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf} \\
            z_t = \tanh(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
            o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
            m_t = \max(\log \sigma(\tilde{f}_t) + m_{t-1}, \tilde{\imath}_t) \\
            i'_t = \exp(\tilde{\imath}_t - m_t), \quad f'_t = \exp(\log \sigma(\tilde{f}_t) + m_{t-1} - m_t) \\
            c_t = f'_t \odot c_{t-1} + i'_t \odot z_t \\
            n_t = f'_t \odot n_{t-1} + i'_t \\
            h_t = o_t \odot c_t / n_t
        \end{array}

    where the matrices :math:`W_h` are block-diagonal: a head sees its own units of `h`. Of the paper's two forget
    gates, :math:`\sigma` and :math:`\exp`, it has the first. A unit whose `n` is 0 has no past and begins with
    :math:`m_t = \tilde{\imath}_t` and :math:`f'_t = 0`, whatever its `c` and `m` are. So states of zeros are a
    beginning, and from the first step on `n` is 1 or more. The paper's block around the cell (a convolution before it,
    group normalisation and projections after it) is left to torch.nn.

    Args:
        input_size, num_layers, bias, batch_first, dropout, bidirectional: as in :class:`MGU`.
        hidden_size: number of features of `h`, a multiple of `num_heads`.
        num_heads: number of heads. Default: 1
        memory, recurrent_dropout, recurrent_dropout_mode, weight_dropout, grad_clip: see :class:`LSTM`; the candidate
            is z. `zoneout`, `cell_clip`, `layer_norm` and `peephole` are refused. Default: none
        device, dtype: of the parameters.

    Inputs: input, (h_0, c_0, n_0, m_0), *, lengths, reset, reset_state, return_states
        See :class:`LSTM`; `reset_state` has four states too. With :math:`n_0 = 0` no gradient comes to `c_0`, `n_0` and
        `m_0`: states that are to be learned begin with :math:`n_0 = 1`.

    Outputs: output, (h_n, c_n, n_n, m_n)
        See :class:`LSTM`; with ``return_states=True`` the third output has ``(h, c, n, m)`` for every layer.

    Shape:
        - input: `(L, N, H_in)`, `(N, L, H_in)` with `batch_first`, `(L, H_in)` unbatched, or a PackedSequence
        - all states: `(D * num_layers, N, H)`, unbatched `(D * num_layers, H)`; `D` is 2 if bidirectional, else 1
        - output: as input, with `D * H` features, head by head

    Attributes:
        weight_ih_l[k], weight_hh_l[k]: `(num_heads, 4 * hidden_size / num_heads, ...)`, in every head the rows of i, f,
            z and o; the last dimension of weight_hh is `hidden_size / num_heads`. bias_ih_l[k], bias_hh_l[k]:
            `(num_heads, 4 * hidden_size / num_heads)`. With ``_reverse`` for the reverse direction. Drawn as torch.nn
            draws them, but for bias_ih of f: evenly from 3 to 6 over the units of a head, so that at first they keep
            0.95 to 0.998 of their past at each step.

    dtype: float64, float32, bfloat16 or float16, one for all; sums, and c, n and m within a call, are in float32
    (float64 for float64). Under autocast as :class:`GRU`.

    Raises:
        ValueError: a `hidden_size` that is no multiple of `num_heads`, another number of states; and as :class:`LSTM`.
        RuntimeError: as :class:`LSTM`.

    Example::

        >>> rnn = rnnkern.SLSTM(10, 20, 2, num_heads=4)
        >>> output, (hn, cn, nn, mn) = rnn(torch.randn(5, 3, 10))
    """

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        *,
        lengths: functional.Lengths | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        states = functional.four_states("hx", hx)
        if lengths is None and reset is None and reset_state is None and not return_states:
            short = short_layer(self, self._cell, input, states)
            if short is not None:
                return short
        restart = functional.four_states("reset_state", reset_state)
        return sequence(self, self._cell, input, states, lengths, reset, restart, return_states)
