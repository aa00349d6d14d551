"""Padded rows as the rows of a packed batch, and back.

The scan takes either. But what a backward does after it, GEMMs over all rows, would be done over padding too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnkern import _fast
from rnnkern._run import real, unwatched

States = tuple[Tensor, ...]


def worth_packing(x: Tensor, lengths: Tensor) -> bool:
    """With a gradient to come, on a CPU (where lengths are read at no cost), and unless a trace or transform is at work
    that would have to follow how rows are found.
    """
    if not (torch.is_grad_enabled() and x.is_cpu and unwatched() and real((x, lengths))):
        return False
    return lengths.numel() > 0 and bool(lengths.any())


class Packing:
    """The rows that exist, longest sequence first, step by step."""

    def __init__(self, lengths: Tensor, T: int, batch_first: bool) -> None:
        self.shape, self.batch_first = (T, lengths.size(0)), batch_first
        plan = _planned(lengths, T, batch_first)
        self.order, self.back, self.lengths, self.offsets, self.rows, self.inverse = plan
        self.steps = self.offsets.size(0)

    def put(
        self, x: Tensor, hx: States | None, reset: Tensor | None, reset_state: States | None
    ) -> tuple[Tensor, States | None, Tensor | None, States | None]:
        """What a scan of the packed batch takes. `x` lies as the caller's input, `reset` is [T * B, D]."""
        hx = hx and tuple(h.index_select(1, self.order) for h in hx)
        if reset is not None:
            if self.batch_first:
                reset = reset.unflatten(0, self.shape).transpose(0, 1).flatten(0, 1)
            reset = reset.index_select(0, self.rows)
        if reset_state is not None:  # a batch of 1 is for all rows
            reset_state = tuple(h if h.size(1) == 1 else h.index_select(1, self.order) for h in reset_state)
        return Moved.apply(x.reshape(-1, x.size(-1)), self.rows, self.inverse), hx, reset, reset_state

    def take(self, y: Tensor, final: States, states: tuple[States, ...]) -> tuple[Tensor, States, tuple[States, ...]]:
        """What it gives, as the caller's input lies; the last layer's h stays the very output tensor."""
        out = self._padded(y)
        kept = tuple(tuple(out if s is y else self._padded(s) for s in layer) for layer in states)
        return out, tuple(h.index_select(1, self.back) for h in final), kept

    def _padded(self, rows: Tensor) -> Tensor:
        T, B = self.shape
        return Moved.apply(rows, self.inverse, self.rows).unflatten(0, (B, T) if self.batch_first else (T, B))


class Moved(torch.autograd.Function):
    """x[index], and zeros where that is negative; `inverse` is the way back. (Torch's index_select would add gradients
    up one by one.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _moved(x, index)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return Moved.apply(d.contiguous(), inverse, index), None, None


def _planned(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, ...]:
    if _fast.available():
        from rnnkern import _cpu

        if (plan := _cpu.plan_rows(lengths, T, batch_first)) is not None:
            return plan
    B = lengths.size(0)
    ordered, order = lengths.sort(descending=True, stable=True)
    step = torch.arange(int(ordered[0]))
    exist = step.unsqueeze(1) < ordered
    at = step.unsqueeze(1) + T * order if batch_first else B * step.unsqueeze(1) + order
    rows, sizes = at[exist], exist.sum(1)
    inverse = torch.full((T * B,), -1).index_copy_(0, rows, torch.arange(rows.size(0)))
    return order, torch.argsort(order), ordered, sizes.cumsum(0) - sizes, rows, inverse


def _moved(x: Tensor, index: Tensor) -> Tensor:
    if _fast.available():
        from rnnkern import _cpu

        if (moved := _cpu.move_rows(x, index, torch.get_num_threads())) is not None:
            return moved
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0)
