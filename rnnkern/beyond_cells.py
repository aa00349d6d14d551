"""One step of the cells that torch.nn does not have, in the form of torch.nn.GRUCell and, SLSTM, torch.nn.LSTMCell."""

from __future__ import annotations

from torch import Tensor

from rnnkern import _fast, functional
from rnnkern._call import TITLES
from rnnkern._stack import BatchNormed, Heads, Independent, Step
from rnnkern.nn import step

__all__ = ["IndRNNCell", "LiGRUCell", "MGUCell", "SLSTMCell"]


def _after(module: Step, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """The states after a step."""
    cell, heads = module._cell, module._heads
    short = _fast.step(module, cell, input, hx, heads, module._gates_of_step)
    if short is not None:
        return short
    return step(module, cell, TITLES[cell] + "Cell", input, hx, heads, module._project)


class _OneState(Step):
    """A cell with one state."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _after(self, input, None if hx is None else (hx,))[0]


class MGUCell(_OneState):
    r"""One step of a minimal gated unit (Zhou et al. 2016), in the form of :class:`MGU`: the gate acts on the product.

    .. math::
        \begin{array}{ll}
            f = \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
            n = \tanh(W_{in} x + b_{in} + f \odot (W_{hn} h + b_{hn})) \\
            h' = (1 - f) \odot h + f \odot n
        \end{array}

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

    Attributes:
        weight_ih, weight_hh: `(2 * hidden_size, ...)`, rows of f, then of n; bias_ih, bias_hh: `(2 * hidden_size)`.
            Names, shapes and initial values are those of :class:`MGU` without ``_l0``.

    dtype: float64, float32, bfloat16 or float16, one for all.

    Raises:
        ValueError: input or hidden that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.

    Example::

        >>> cell, h = rnnkern.MGUCell(10, 20), None
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """

    _cell = "mgu"


class IndRNNCell(Independent, _OneState):
    r"""One step of an independently recurrent network (Li et al. 2018), :class:`IndRNN`.

    .. math::
        h' = \max(0, W_{ih} x + b_{ih} + u \odot h + b_{hh})

    or, with ``nonlinearity="tanh"``, :math:`\tanh` in place of :math:`\max(0, \cdot)`.

    Args:
        input_size, hidden_size, bias: as in :class:`MGUCell`.
        nonlinearity: ``"relu"`` or ``"tanh"``. Default: ``"relu"``
        device, dtype: of the parameters.

    Inputs: input, hidden
        See :class:`MGUCell`.

    Outputs: h'
        See :class:`MGUCell`.

    Shape:
        See :class:`MGUCell`.

    Attributes:
        weight_ih: `(hidden_size, input_size)`; weight_hh: u, `(hidden_size)`; bias_ih, bias_hh: `(hidden_size)`. Names,
            shapes and initial values are those of :class:`IndRNN` without ``_l0``.

    dtype: as :class:`MGUCell`.

    Raises:
        ValueError: an unknown nonlinearity; and as :class:`MGUCell`.
        RuntimeError: as :class:`MGUCell`.

    Example::

        >>> cell, h = rnnkern.IndRNNCell(10, 20), None
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """


class LiGRUCell(BatchNormed, _OneState):
    r"""One step of a light gated recurrent unit (Ravanelli et al. 2018), :class:`LiGRU`.

    .. math::
        \begin{array}{ll}
            z = \sigma(BN(W_{iz} x) + b_{iz} + W_{hz} h + b_{hz}) \\
            n = \max(0, BN(W_{in} x) + b_{in} + W_{hn} h + b_{hn}) \\
            h' = (1 - z) \odot n + z \odot h
        \end{array}

    where :math:`BN` is :class:`torch.nn.BatchNorm1d` with `bias_ih` as its shift. It is what :class:`LiGRU` does with a
    sequence of this one step: in training over the rows of this step's batch, of which there must be two or more, and
    every call moves the running estimates; in evaluation by the running estimates. So a loop over a sequence gives in
    evaluation what :class:`LiGRU` gives; in training it does not, for there, as in the paper, all steps are normalised
    together.

    Args:
        input_size, hidden_size, bias: as in :class:`MGUCell`.
        batch_norm: whether the input's side is normalised; without it ReLU may grow over a sequence. Default: ``True``
        device, dtype: of the parameters.

    Inputs: input, hidden
        See :class:`MGUCell`.

    Outputs: h'
        See :class:`MGUCell`.

    Shape:
        See :class:`MGUCell`.

    Attributes:
        weight_ih, weight_hh: `(2 * hidden_size, ...)`, rows of z, then of n; bias_ih, bias_hh: `(2 * hidden_size)`;
            bn_ih: gain of batch normalisation, `(2 * hidden_size)`; bn_mean, bn_var: its running estimates, buffers.
            Names, shapes and initial values are those of :class:`LiGRU` without ``_l0``.

    dtype: as :class:`MGUCell`.

    Raises:
        ValueError: batch normalisation in training over one row; and as :class:`MGUCell`.
        RuntimeError: as :class:`MGUCell`.

    Example::

        >>> cell, h = rnnkern.LiGRUCell(10, 20), None
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """


class SLSTMCell(Heads, Step):
    r"""One step of sLSTM (Beck et al. 2024), :class:`SLSTM`.

    .. math::
        \begin{array}{ll}
            \tilde{\imath} = W_{ii} x + b_{ii} + W_{hi} h + b_{hi} \\
            \tilde{f} = W_{if} x + b_{if} + W_{hf} h + b_{hf} \\
            z = \tanh(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
            o = \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
            m' = \max(\log \sigma(\tilde{f}) + m, \tilde{\imath}) \\
            i' = \exp(\tilde{\imath} - m'), \quad f' = \exp(\log \sigma(\tilde{f}) + m - m') \\
            c' = f' \odot c + i' \odot z \\
            n' = f' \odot n + i' \\
            h' = o \odot c' / n'
        \end{array}

    where the matrices :math:`W_h` are block-diagonal, a block for each head. A unit whose `n` is 0 has no past,
    whatever its `c` and `m` are: states of zeros are a beginning.

    Args:
        input_size, bias: as in :class:`MGUCell`.
        hidden_size: number of features of `h`, a multiple of `num_heads`.
        num_heads: number of heads. Default: 1
        device, dtype: of the parameters.

    Inputs: input, (h, c, n, m)
        * **input**: features of this step.
        * **h**, **c**, **n**, **m**: the states before it; zeros if not given. Where `n` is 0 no gradient comes to `c`,
          `n` and `m`.

    Outputs: (h', c', n', m')
        * **h'**, **c'**, **n'**, **m'**: the states after it.

    Shape:
        - input: `(N, H_in)` or `(H_in)`
        - all states: `(N, H)` or `(H)`, head by head

    Attributes:
        weight_ih, weight_hh: `(num_heads, 4 * hidden_size / num_heads, ...)`, in every head the rows of i, f, z and o;
            bias_ih, bias_hh: `(num_heads, 4 * hidden_size / num_heads)`. Names, shapes and initial values are those of
            :class:`SLSTM` without ``_l0``.

    dtype: as :class:`MGUCell`.

    Raises:
        ValueError: a `hidden_size` that is no multiple of `num_heads`, another number of states; and as
            :class:`MGUCell`.
        RuntimeError: as :class:`MGUCell`.

    Example::

        >>> cell, states = rnnkern.SLSTMCell(10, 20, num_heads=4), None
        >>> for x in torch.randn(6, 3, 10):
        ...     states = cell(x, states)
        >>> h = states[0]
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, c, n, m = _after(self, input, functional.four_states("hx", hx))
        return h, c, n, m
