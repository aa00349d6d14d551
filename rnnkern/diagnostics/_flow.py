"""How a loss's gradient flows back through time, and how fast the recurrence makes it shrink or grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.diagnostics import _picture
from rnnkern.diagnostics._recorder import Track, call, recording

VANISHED, EXPLODED = 1e-3, 1e3  # what is left of a gradient at a sequence's other end


@dataclass(frozen=True)
class LayerFlow:
    """Gradients of one layer and direction, or of one cell, by time.

    Attributes:
        name: path in the model, layer and direction.
        gradient: :math:`\\partial L / \\partial h_t`, `(L, N, H)`, by every way on which :math:`h_t` has a part in the
            loss: the layers above and the later steps.
        cell_gradient: :math:`\\partial L / \\partial c_t` of an LSTM, of the :math:`c_t` that the next step takes; else
            None.
        growth: factor by which the recurrence's Jacobian multiplies a gradient for each step back in time.
    """

    name: str
    gradient: Tensor
    cell_gradient: Tensor | None
    growth: float

    @property
    def norms(self) -> Tensor:
        """Norm of `gradient` over the batch at every step, `(L)`."""
        return self.gradient.flatten(1).norm(dim=1)

    @property
    def reach(self) -> float:
        """What the recurrence alone leaves of a gradient from one end of the sequence to the other."""
        return float(torch.tensor(self.growth, dtype=torch.float64) ** (len(self.gradient) - 1))

    @property
    def verdict(self) -> str:
        """``"vanishing"`` where :attr:`reach` is below 1e-3, ``"exploding"`` above 1e3, else ``"flowing"``."""
        return "vanishing" if self.reach < VANISHED else "exploding" if not self.reach <= EXPLODED else "flowing"

    def __str__(self) -> str:
        back = len(self.gradient) - 1
        if not back:
            return f"{self.name}: one step, nothing to flow through"
        how = {"vanishing": "shrinks to", "exploding": "grows to", "flowing": "keeps"}[self.verdict]
        return (
            f"{self.name}: {self.verdict}: over {back} step{'s'[: back > 1]} back, a gradient {how} {self.reach:.1e} "
            f"of itself ({self.growth:.3g} a step)"
        )


@dataclass(frozen=True)
class GradientFlow:
    """What :func:`gradient_flow` finds; as text, a sentence for every layer.

    Attributes:
        loss: its value.
        layers: by their names, in the order of the model.
    """

    loss: float
    layers: dict[str, LayerFlow]

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers.values())

    def plot(self, axes: Any, label: str = "{}") -> None:
        """Lines on axes of matplotlib: the norms of all layers over time. `label` has a place for a layer's name."""
        for layer in self.layers.values():
            norms = layer.norms.double().cpu()
            axes.semilogy(range(1, len(norms) + 1), norms.clamp_min(1e-30).numpy(), label=label.format(layer.name))
        axes.set(xlabel="step t", ylabel="norm of dLoss/dh at t")

    def draw(self, path: str | Path) -> None:
        """The norms of all layers over time, as a picture. Needs matplotlib."""
        figure = _picture.figure(7.5, 4)
        axes = figure.subplots()
        self.plot(axes)
        axes.legend(frameon=False)
        worst = max(self.layers.values(), key=lambda layer: abs(torch.tensor(layer.reach).log().item()))
        axes.set_title(str(worst), fontsize=9, loc="left")
        _picture.tidy(axes)
        _picture.save(figure, path)


def gradient_flow(module: nn.Module, x: Any, loss: Callable[[Any], Tensor]) -> GradientFlow:
    r"""The gradient of a loss at every step of every recurrent layer: does it vanish, does it explode?

    Every RNN, LSTM, GRU and cell in `module` runs step by step, with the numbers of its own forward, and the norms of
    :math:`\partial L / \partial h_t` are read from autograd's graph. They depend on the loss. The recurrence itself
    multiplies a gradient by the Jacobian :math:`\partial h_t / \partial h_{t-1}` (LSTM: of both states) at every
    step back; its growth rate (Pascanu et al. 2013, "On the difficulty of training recurrent neural networks") is
    measured with a random vector :math:`v` at the last step,

    .. math::
        \left( \frac{\lVert v^\top \partial h_T / \partial h_1 \rVert}{\lVert v \rVert} \right)^{1 / (T - 1)}

    Args:
        module: a recurrent network of torch.nn or rnnkern, or any model with some in it, or with cells that it calls
            in a loop. Nothing in it is changed.
        x: what `module` is called with; a tuple: with several arguments.
        loss: from what `module` returns to a scalar.

    Returns:
        a :class:`GradientFlow`: its ``layers`` have ``gradient``, ``norms``, ``growth`` and a ``verdict``; as text, a
        sentence for each; ``draw(path)`` draws it.

    Raises:
        TypeError: `module` is no module, or has a recurrent network with a forward of its own.
        ValueError: no recurrent network, one with dropout or zoneout in training mode, packed input or `lengths=`,
            an empty batch, a loss that is no scalar or does not depend on the states.

    Example::

        >>> rnn = rnnkern.RNN(3, 20)
        >>> flow = rnnkern.diagnostics.gradient_flow(rnn, torch.randn(100, 8, 3), lambda out: out[0][-1].sum())
        >>> print(flow)
        RNN: vanishing: over 99 steps back, a gradient shrinks to 1.1e-24 of itself (0.572 a step)
    """
    with torch.enable_grad(), recording("gradient_flow", module) as tracks:
        value = loss(call(module, x))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"gradient_flow: expected a scalar loss, got {got}")
        tracks = [track for track in tracks if track.states]
        if not value.requires_grad or not tracks:
            raise ValueError("gradient_flow: the loss does not depend on the states of a recurrent network")
        flat = [state for track in tracks for states in track.states for state in states]
        if not all(state.numel() for state in flat):
            raise ValueError("gradient_flow: expected at least one sequence, got an empty batch")
        found = iter(torch.autograd.grad(value, flat, retain_graph=True, allow_unused=True))
        layers = {}
        for track in tracks:
            each = [[_or_zeros(next(found), state) for state in states] for states in track.states]
            whole = [torch.stack([rows(step) for step in parts]) for parts in zip(*each, strict=True)]
            whole = [part.flip(0) for part in whole] if track.reverse else whole
            layers[track.name] = LayerFlow(track.name, whole[0], whole[1] if len(whole) > 1 else None, growth(track))
    return GradientFlow(float(value.detach()), layers)


def _or_zeros(gradient: Tensor | None, state: Tensor) -> Tensor:
    return torch.zeros_like(state) if gradient is None else gradient


def rows(state: Tensor) -> Tensor:
    """A network's step has a dimension for its one layer, an unbatched cell none for the batch: [N, H]."""
    return state.reshape(-1, state.shape[-1])


def growth(track: Track) -> float:
    """Factor for each step back, from the last step to the first one that a number can still hold."""
    draw = torch.Generator().manual_seed(0)  # not the caller's: nothing that he draws may change
    last = track.states[-1]
    vectors = [torch.randn(s.shape, generator=draw, dtype=torch.float64).to(s) for s in last]
    states = [state for states in track.states for state in states]
    if len(track.states) == 1 or not any(s.requires_grad for s in last):
        return 1.0
    found = torch.autograd.grad(last, states, vectors, retain_graph=True, allow_unused=True)
    squares = [0.0 if g is None else float(g.double().square().sum()) for g in found]
    norms = [sum(squares[k : k + len(last)]) ** 0.5 for k in range(0, len(squares), len(last))]
    tiny = torch.finfo(last[0].dtype).tiny
    lasting = [k for k, norm in enumerate(norms) if tiny < norm < float("inf")]
    first = min(lasting[0], len(norms) - 2) if lasting else len(norms) - 2
    return (norms[first] / norms[-1]) ** (1 / (len(norms) - 1 - first))
