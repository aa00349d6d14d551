"""Modules of cells that torch.nn does not have, in the form of torch.nn.GRU, and that of torch.nn.LSTM for SLSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear
from torch.nn.utils.rnn import PackedSequence

from rnnkern import functional
from rnnkern._options import Extended
from rnnkern._run import real, unwatched
from rnnkern._stack import Stack
from rnnkern.autograd import Group
from rnnkern.backends.base import accumulation_dtype
from rnnkern.nn import one_state, sequence

__all__ = ["MGU", "SLSTM", "IndRNN", "LiGRU"]


def _not_scriptable(self: torch.nn.Module) -> None:
    """What torch.jit.script asks for, to compile it in place of a module."""
    raise RuntimeError(f"torch.jit.script cannot compile rnnkern.{type(self).__name__}; torch.export can follow it")


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


class IndRNN(_OneState):
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

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        if nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity  # says which cell this is
        super().__init__(*args, **kwargs)

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"indrnn_{self.nonlinearity}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._flat_weights_names:
            if name.startswith("weight_hh"):
                torch.nn.init.uniform_(getattr(self, name))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "relu" else f", nonlinearity={self.nonlinearity}")


class LiGRU(_OneState):
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

    _cell = "ligru"
    momentum, eps = 0.1, 1e-5

    def __init__(self, *args: Any, batch_norm: bool = True, **kwargs: Any) -> None:
        self.batch_norm = False  # there is nothing of it yet
        super().__init__(*args, **kwargs)
        if batch_norm and self.layer_norm:
            raise ValueError("layer_norm: LiGRU normalises over the batch; with batch_norm=False it can over the layer")
        self.batch_norm = batch_norm
        if not batch_norm:
            return
        like = self.all_weights[0][0].detach()
        for end in self._ends(range(self.num_layers)):
            self.register_parameter("bn_ih" + end, torch.nn.Parameter(like.new_ones(like.shape[0])))
            self.register_buffer("bn_mean" + end, like.new_zeros(like.shape[0]))
            self.register_buffer("bn_var" + end, like.new_ones(like.shape[0]))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for end in self._ends(range(self.num_layers if self.batch_norm else 0)):
            for name, value in (("bn_ih", 1.0), ("bn_mean", 0.0), ("bn_var", 1.0)):
                torch.nn.init.constant_(getattr(self, name + end), value)

    @property
    def _project(self) -> Any:
        return self._normalised if self.batch_norm else None

    def _normalised(
        self, k: int, x: Tensor, groups: Sequence[Group], exist: Tensor | None
    ) -> tuple[Tensor, Sequence[Group]]:
        """What _call.stack asks of a projection."""
        columns, rest = [], []
        if exist is not None:  # nothing is known of padding, and NaN times a gradient of 0 is NaN
            x = x.masked_fill(~exist.unsqueeze(1), 0)
        for end, (w_ih, b_ih, params) in zip(self._ends([k]), groups, strict=True):
            assert w_ih is not None
            gain, mean, var = (getattr(self, name + end) for name in ("bn_ih", "bn_mean", "bn_var"))
            product = linear(x, w_ih)
            if exist is None or not self.training:
                gx = batch_norm(product, mean, var, gain, None, self.training, self.momentum, self.eps)
            else:
                gx = self._over_existing(product, exist.unsqueeze(1), mean, var) * gain
            columns.append((gx if b_ih is None else gx + b_ih).to(x.dtype))
            rest.append(Group(None, None, params))
        return torch.stack(columns, 1), rest

    def _folded(self, end: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`weight_ih` and `bias_ih` that have normalisation by the running estimates in them."""
        names = ("weight_ih", "bn_ih", "bn_mean", "bn_var")
        weight, gain, mean, var = (getattr(self, name + end).detach().to(dtype) for name in names)
        scale = gain * (var + self.eps).rsqrt()
        shift = -mean * scale
        bias = getattr(self, "bias_ih" + end, None)
        return weight * scale.unsqueeze(1), shift if bias is None else shift + bias.detach().to(dtype)

    def _over_existing(self, product: Tensor, exist: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Batch normalisation of the rows that exist; without looking for them, which would wait for a GPU."""
        product = product.to(accumulation_dtype(product.dtype))
        rows = exist.sum()
        if exist.is_cpu and unwatched() and real((product, exist)) and rows == 1:
            raise ValueError("Expected more than 1 value per channel when training, got one row that exists")
        count = rows.clamp_min(1).to(product.dtype)
        centre = product.masked_fill(~exist, 0).sum(0) / count
        spread = (product - centre).masked_fill(~exist, 0).square().sum(0) / count
        with torch.no_grad():
            moved = self.momentum * (rows > 0).to(mean.dtype)  # by no rows, not at all
            mean.lerp_(centre.to(mean.dtype), moved)
            var.lerp_((spread * (count / (count - 1).clamp_min(1))).to(var.dtype), moved)
        return (product - centre) * (spread + self.eps).rsqrt()

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.batch_norm else ", batch_norm=False")


class SLSTM(Extended, Stack):
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

    __prepare_scriptable__ = _not_scriptable
    _cell = "slstm"

    def __init__(self, *args: Any, num_heads: int = 1, **kwargs: Any) -> None:
        self.num_heads = self._heads = num_heads
        super().__init__(*args, **kwargs)

    def _shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        H, heads = self.hidden_size, self.num_heads
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or H % heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {H}, got {heads!r}")
        shapes = super()._shapes(k)
        shapes["weight_hh"] = (4 * H, H // heads)
        return {name: (heads, rows // heads, *rest) for name, (rows, *rest) in shapes.items()}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._flat_weights_names:
            if name.startswith("bias_ih"):
                of_f = getattr(self, name).detach().chunk(4, 1)[1]
                of_f.copy_(torch.linspace(3, 6, of_f.shape[1], device=of_f.device, dtype=of_f.dtype))

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
        restart = functional.four_states("reset_state", reset_state)
        return sequence(self, self._cell, input, states, lengths, reset, restart, return_states)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.num_heads == 1 else f", num_heads={self.num_heads}")
