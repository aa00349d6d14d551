"""Modules of cells that torch.nn does not have, in the form of torch.nn.GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import functional
from rnnkern._options import Extended
from rnnkern._stack import Stack
from rnnkern.nn import one_state

__all__ = ["MGU"]


def _not_scriptable(self: torch.nn.Module) -> None:
    """What torch.jit.script asks for, to compile it in place of a module."""
    raise RuntimeError(f"torch.jit.script cannot compile rnnkern.{type(self).__name__}; torch.jit.trace can follow it")


class _OneState(Extended, Stack):
    """A stack whose cell has one state."""

    __prepare_scriptable__ = _not_scriptable

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
