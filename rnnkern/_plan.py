"""The static part of a layer call; with it the flat tuple of tensors that autograd handles is a call again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rnnkern.backends.base import ScanInputs, ScanSpec
from rnnkern.cells import CELLS, CellSpec


@dataclass(frozen=True)
class Plan:
    """How the tensors of a layer call follow each other: x, offsets?, lengths?, reset?, states, reset states, masks,
    and for every group w_ih?, b_ih?, then the scan's parameters.
    """

    spec: ScanSpec
    text: str  # spec as the ops take it
    models: int  # M: x is [S, M, I], and group m * D + d reads x[:, m]
    bias: bool  # b_ih is there
    projects: bool  # w_ih is there; else x is the pre-activations, [S, N, G*H]
    present: tuple[bool, bool, bool]  # offsets, lengths, reset
    resets: int  # reset states: as many as states, or none
    samples: int = 0  # n > 0: rows hold n samples each, sample minor, and weight gradients are kept per sample

    @property
    def cell(self) -> CellSpec:
        return CELLS[self.spec.cell]

    @property
    def first_state(self) -> int:
        """Where the states begin in what follows x."""
        return sum(self.present)

    @property
    def first_weight(self) -> int:
        return sum(self.present) + len(self.cell.states) + self.resets + len(self.spec.noise)

    @property
    def differentiable(self) -> int:
        """y, final and seq: the outputs that have gradients come first."""
        return 2 * len(self.cell.states)

    @property
    def per_group(self) -> int:
        return self.projects + self.bias + len(self.spec.params)

    def projection(self, args: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """w_ih and b_ih of every group; no w_ih where there is none."""
        first, size = self.first_weight, self.per_group
        if not self.projects:
            return (), (None,) * len(self.spec.reverse)
        w_ih = args[first::size]
        return w_ih, args[first + 1 :: size] if self.bias else (None,) * len(w_ih)

    def columns(self, args: tuple[Tensor, ...]) -> int:
        """G*H, the rows of w_hh."""
        return args[self.first_weight + self.projects + self.bias].shape[0]

    def inputs(self, T: int, B: int, gx: Tensor, args: tuple[Tensor, ...]) -> ScanInputs:
        """The scan of this call, given its pre-activations."""
        offsets, lengths, reset = self.optional(args)
        at = self.first_state
        states, at = args[at : at + len(self.cell.states)], at + len(self.cell.states)
        reset_states, at = args[at : at + self.resets], at + self.resets
        noise, at = args[at : at + len(self.spec.noise)], at + len(self.spec.noise)
        skip, size = self.projects + self.bias, self.per_group
        params = tuple(args[at + n * size + skip : at + (n + 1) * size] for n in range(len(self.spec.reverse)))
        return ScanInputs(self.spec, T, B, gx, states, params, offsets, lengths, reset, reset_states, noise)

    def optional(self, args: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        offsets, lengths, reset = self.present
        return (
            args[0] if offsets else None,
            args[offsets] if lengths else None,
            args[offsets + lengths] if reset else None,
        )


def make_plan(
    cell: str,
    reverse: tuple[bool, ...],
    params: tuple[str, ...],
    noise: tuple[str, ...],
    scales: tuple[float, ...],
    save: str,
    models: int,
    bias: bool,
    projects: bool,
    present: tuple[bool, bool, bool],
    resets: int,
    options: tuple[tuple[str, object], ...],
) -> Plan:
    spec = ScanSpec(cell, reverse, params, noise, save, scales=scales, **dict(options))  # type: ignore[arg-type]
    return Plan(spec, spec.encode(), models, bias, projects, present, resets)


cached_plan = lru_cache(maxsize=1024)(make_plan)  # a plan costs more than a small step does


def shape_only(like: Tensor, S: int, N: int, width: int) -> Tensor:
    """Stands for pre-activations that are not in memory: shape, dtype and device, no values."""
    return torch.empty((), dtype=like.dtype, device=like.device).expand(S, N, width)
