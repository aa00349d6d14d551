"""Random numbers as the states of a cell."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rnnkern.cells import CellSpec


def natural(cell: CellSpec, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Such as a step may have left: sLSTM divides by n, a sum of weights of which one is 1."""
    named = zip(cell.states, states, strict=True)
    return tuple((s.detach().abs() + 1).requires_grad_(s.requires_grad) if k == "n" else s for k, s in named)
