"""Initial values for recurrent networks, in the manner of torch.nn.init: in place, and the module is returned.

Each takes a recurrent network or cell of torch.nn or rnnkern, or a whole model, and sets every one in it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_"]

M = TypeVar("M", bound=nn.Module)
KINDS = {
    "RNN": (nn.RNN, nn.RNNCell),
    "LSTM": (nn.LSTM, nn.LSTMCell),
    "GRU": (nn.GRU, nn.GRUCell),
}
CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@torch.no_grad()
def forget_bias_(module: M, value: float = 1.0) -> M:
    r"""Sets the bias of every LSTM's forget gate, so that it remembers before it has learned to (Gers et al. 2000,
    "Learning to forget"; Jozefowicz et al. 2015, who recommend 1).

    .. math::
        b_{if} = value, \quad b_{hf} = 0

    Args:
        module: with at least one LSTM or LSTMCell in it.
        value: of the two biases' sum. Default: 1

    Returns:
        `module`.

    Raises:
        ValueError: nothing to set, or what is made of other parameters, as by a parametrization.

    Example::

        >>> lstm = rnnkern.init.forget_bias_(rnnkern.LSTM(10, 20))
    """
    for _, b_ih, b_hh in _gated("forget_bias_", module, "LSTM"):
        b_ih.chunk(4)[1].fill_(value)
        b_hh.chunk(4)[1].zero_()
    return module


@torch.no_grad()
def chrono_(module: M, longest: float) -> M:
    r"""Sets the gates' biases so that units forget over times from one step to `longest` (Tallec and Ollivier 2018,
    "Can recurrent neural networks warp time?", section 2).

    .. math::
        u \sim U(1, T_{max} - 1), \quad \text{LSTM: } b_f = \log u, \; b_i = -\log u, \quad \text{GRU: } b_z = \log u

    GRU: in torch.nn's form :math:`z` keeps the state, in theirs :math:`1 - z` does, hence the sign. The other one of
    each pair of biases becomes 0.

    Args:
        module: with at least one LSTM or GRU, or a cell of them, in it.
        longest: :math:`T_{max}`, the longest time to remember, in steps; above 2.

    Returns:
        `module`.

    Raises:
        ValueError: `longest` not above 2 and finite; and as :func:`forget_bias_`.

    Example::

        >>> gru = rnnkern.init.chrono_(rnnkern.GRU(10, 20), 784)
    """
    if not 2 < longest < torch.finfo(torch.float32).max:
        raise ValueError(f"chrono_: expected the longest time to be a finite number above 2 steps, got {longest!r}")
    for kind, b_ih, b_hh in _gated("chrono_", module, "LSTM", "GRU"):
        gates, recurrent = b_ih.chunk(4 if kind == "LSTM" else 3), b_hh.chunk(4 if kind == "LSTM" else 3)
        times = torch.empty_like(gates[1]).uniform_(1.0, longest - 1.0).log_()
        gates[1].copy_(times)  # f of i, f, g, o and z of r, z, n
        recurrent[1].zero_()
        if kind == "LSTM":
            gates[0].copy_(-times)
            recurrent[0].zero_()
    return module


@torch.no_grad()
def orthogonal_(module: M, gain: float = 1.0) -> M:
    r"""Makes the recurrent weights of every gate orthogonal (Saxe et al. 2014): what the product alone does to a
    gradient then neither shrinks nor grows it.

    Args:
        module: with at least one recurrent network or cell in it. With `proj_size`, columns are orthonormal.
        gain: factor of all of them. Default: 1

    Returns:
        `module`.

    Raises:
        ValueError: nothing to set, or what is made of other parameters, as by a parametrization.

    Example::

        >>> rnn = rnnkern.init.orthogonal_(rnnkern.RNN(10, 20))
    """
    for kind, weight in _recurrent("orthogonal_", module, *KINDS):
        for gate in weight.chunk({"RNN": 1, "LSTM": 4, "GRU": 3}[kind]):
            gate.copy_(nn.init.orthogonal_(torch.empty_like(gate, dtype=_wide(gate)), gain))
    return module


@torch.no_grad()
def identity_(module: M, gain: float = 1.0) -> M:
    r"""Makes the recurrent weights of every RNN the identity and its biases zero (Le et al. 2015, "A simple way to
    initialize recurrent networks of rectified linear units"; for ``nonlinearity="relu"``).

    Args:
        module: with at least one RNN or RNNCell in it.
        gain: factor of the identity; below 1 for short memories. Default: 1

    Returns:
        `module`.

    Raises:
        ValueError: nothing to set, or what is made of other parameters, as by a parametrization.

    Example::

        >>> rnn = rnnkern.init.identity_(rnnkern.RNN(10, 20, nonlinearity="relu"))
    """
    parts = _modules("identity_", module, "RNN")
    biases = [bias for part in parts if part.bias for bias in _own("identity_", part, "bias")]
    for _, weight in _recurrent("identity_", module, "RNN"):
        weight.copy_(torch.eye(len(weight)) * gain)
    for bias in biases:
        bias.zero_()
    return module


def _wide(x: Tensor) -> torch.dtype:
    """QR, by which orthogonal matrices are made, has no 16-bit form."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _modules(title: str, module: nn.Module, *kinds: str) -> list[nn.Module]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{title}: expected a module, got {type(module).__name__}")
    wanted = tuple(kind for name in kinds for kind in KINDS[name])
    found = [part for part in module.modules() if isinstance(part, wanted)]
    if not found:
        raise ValueError(f"{title}: {type(module).__name__} has no {' or '.join(kinds)} in it")
    return found


def _own(title: str, part: Any, prefix: str) -> list[Tensor]:
    """The parameters of a network or cell whose names begin so."""
    names = getattr(part, "_flat_weights_names", CELL_NAMES)
    found = {name: part._parameters.get(name) for name in names if name.startswith(prefix)}
    for name, parameter in found.items():
        if parameter is None:
            raise ValueError(
                f"{title}: {name} of {type(part).__name__} is no parameter: it is made of others, by a parametrization "
                "or pruning. Give it its values before that"
            )
    return [parameter for parameter in found.values() if parameter is not None]


def _recurrent(title: str, module: nn.Module, *kinds: str) -> list[tuple[str, Tensor]]:
    parts = _modules(title, module, *kinds)
    return [(_kind(part), weight) for part in parts for weight in _own(title, part, "weight_hh")]


def _gated(title: str, module: nn.Module, *kinds: str) -> list[tuple[str, Tensor, Tensor]]:
    found = []
    for part in _modules(title, module, *kinds):
        if not part.bias:
            raise ValueError(f"{title}: {type(part).__name__} was made with bias=False")
        pairs = zip(_own(title, part, "bias_ih"), _own(title, part, "bias_hh"), strict=True)
        found += [(_kind(part), b_ih, b_hh) for b_ih, b_hh in pairs]
    return found


def _kind(part: nn.Module) -> str:
    return next(kind for kind in KINDS if isinstance(part, KINDS[kind]))
