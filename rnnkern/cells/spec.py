"""What a cell says about itself: gates, states and equations. Nothing about time, tiles, strides or devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Aux(NamedTuple):
    """What a step may need besides gx, gh and the entering states; every tensor broadcasts against [rows, H]."""

    params: dict[str, Tensor]  # elementwise parameters of the cell, "peephole_i": [H]
    noise: dict[str, Tensor]  # keep factors of this step, "candidate": [rows, H]
    cell_clip: float  # 0: off
    eps: float = 1e-5  # layer norm


Row = tuple[Tensor, ...]  # one tensor per gate, state or plane
StepGrads = tuple[Row, Row, Row, Row]  # dgx, dgh, dentering, dsmall


class Jacobian(NamedTuple):
    """Of a step's new states. Each unit depends on its own gates and states alone, so it is a small matrix per unit."""

    gx: tuple[Tensor, ...]  # per new state, with respect to every gate: [..., G, H]
    gh: tuple[Tensor, ...]  # the same tensors for cells without `split`
    states: tuple[tuple[Tensor | None, ...], ...]  # [new][entering], with [..., H] each; None: zero


@dataclass(frozen=True)
class CellSpec:
    """The static description of a cell, and its reference equations.

    ``step(gx, gh, states, aux) -> (new states, planes)`` takes and returns tuples with one tensor per gate, state or
    plane; the new h has width H, before projection. ``step_backward(dstates, planes, states, aux) -> (dgx, dgh,
    dentering, dsmall)`` is written by hand: kernels mirror it line for line.

    Three more make second derivatives and forward mode fast, for a cell without small parameters, masks and clips; a
    cell that lacks them has the reference differentiated. Arguments and results that begin with t are tangents.

    * ``jacobian(planes, states) -> Jacobian`` of the new states.
    * ``planes_jvp(tgx, tgh, planes, tstates) -> tplanes``
    * ``step_backward_jvp(dstates, planes, tplanes, states, tstates) -> (tdgx, tdgh, tdentering)``: how the result of
      step_backward moves while dstates stay. It is linear in those: with their own tangents it is the Jacobian's
      transpose.
    """

    name: str  # registry key; travels inside ScanSpec.cell
    gates: tuple[str, ...]  # torch order: row blocks of w_ih and w_hh, column blocks of gx and gh
    states: tuple[str, ...]  # h first (storage dtype, width P); the others in the accumulation dtype, width H
    planes: tuple[str, ...]  # activations that step_backward reads, storage dtype
    step: Callable[..., tuple[Row, Row]]
    step_backward: Callable[..., StepGrads]
    jacobian: Callable[[Row, Row], Jacobian] | None = None
    planes_jvp: Callable[[Row, Row, Row, Row], Row] | None = None
    step_backward_jvp: Callable[..., tuple[Row, Row, Row]] | None = None
    split: tuple[str, ...] = ()  # gates whose dgh differs from dgx (GRU: n); empty: dgh is not stored
    small: tuple[str, ...] = ()  # elementwise parameters it accepts; the driver sums their gradients, no atomics
    row: tuple[str, ...] = ()  # of those, the ones that need a whole row of H in one place
    norm: tuple[int, ...] = (1,)  # gates normalised together under ln_hh (Ba et al. 2016: LSTM (4,), GRU (2, 1))
    masks: tuple[str, ...] = ()  # step masks that the equations read ("candidate"); a driver refuses one not listed
    scaled: bool = False  # the states beyond h are one value and its scale: none of them is clipped or zoned out alone
    mixes_h: bool = False  # the equations read h itself, at full width: backends refuse a projection
    recurrence: str = "dense"  # "dense": h W_hh^T; "diagonal": h * w_hh. Block-diagonal heads are groups

    @property
    def dense(self) -> bool:
        return self.recurrence == "dense"

    @property
    def has_c(self) -> bool:
        """Whether there is a state c that can be clipped and zoned out."""
        return len(self.states) > 1 and not self.scaled

    def recurrent_shape(self, H: int, P: int) -> tuple[int, ...]:
        """Of w_hh."""
        return (len(self.gates) * H, P) if self.dense else (len(self.gates) * H,)
