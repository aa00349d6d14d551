"""A layer moved along a direction: what forward mode asks for, and by the symmetry of second derivatives both halves of
a double backward too.

With f the layer and d the gradients from above, first derivatives are J(inputs)^T d. Their derivative along v with
respect to d is J v: the tangent of f along v. With respect to the inputs it is that of <d, J(inputs) v>, which is the
tangent of J(inputs)^T d along v, d held. So one tangent pass over forward and hand-written backward gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from rnnkern._plan import Plan, shape_only
from rnnkern._run import real, run_forward, unwatched
from rnnkern._tangent_scan import Direction, Gradients, Optionals, TangentScan, covers
from rnnkern._weights import layer_gradients
from rnnkern.backends.base import ScanOutputs

Function = Callable[..., Sequence[Tensor | None]]

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_batched = torch._C._functorch.is_legacy_batchedtensor


def serves(plan: Plan, S: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the tangents of this layer's call, of S rows, can be had here: no transform follows what is done."""
    if S == 0 or plan.samples or not plan.projects or not covers(plan.spec):
        return False
    return unwatched() and real(tensors) and not any(_wrapped(t) or _batched(t) for t in tensors)


def beneath_forward_mode(
    run: Callable[[Sequence[Tensor], Optionals], Optionals], tensors: Sequence[Tensor], tangents: Optionals
) -> tuple[Tensor | None, ...]:
    """run(tensors, tangents), below a forward-mode transform of torch.func if that is the only transform there: its
    tensors are wrapped, and what is made of them would pass through it once more, to no end.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if len(stack) != 1 or stack[0].key() != torch._C._functorch.TransformType.Jvp:
        return tuple(run(tensors, tangents))
    level, bare = stack[0].level(), torch._C._functorch._unwrap_for_grad
    tensors, tangents = [bare(t, level) for t in tensors], [t if t is None else bare(t, level) for t in tangents]
    with retrieve_current_functorch_interpreter().lower():
        found = run(tensors, tangents)
    return tuple(v if v is None else torch._C._functorch._wrap_for_grad(v, level) for v in found)


def differentiable(fast: Function, slow: Function, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """fast(*tensors), where autograd may be recording; slow gives the same, and autograd can follow it."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Deferred.apply(fast, slow, *tensors)
    return fast(*tensors)


class Deferred(torch.autograd.Function):
    """(fast, slow, *tensors) -> fast(*tensors), with the derivatives of slow: they may never be asked for."""

    @staticmethod
    def forward(ctx: Any, fast: Function, slow: Function, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.slow = slow
        ctx.save_for_backward(*tensors)
        return tuple(fast(*tensors))

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        _, back = torch.func.vjp(ctx.slow, *ctx.saved_tensors)  # type: ignore[misc]
        return None, None, *back(g)


def placed(into: Sequence[Any], at: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of `into` with others in some places."""
    found = list(into)
    for i, value in zip(at, values, strict=True):
        found[i] = value
    return found


def outputs_along(
    plan: Plan, backend: str, T: int, B: int, x: Tensor, args: tuple[Tensor, ...], direction: Optionals
) -> tuple[Tensor, ...]:
    """Tangents of y, final and of seq where it is kept. The forward is made anew, because one that needs no gradient
    keeps too little.
    """
    w_ih, b_ih = plan.projection(args)
    inputs = plan.inputs(T, B, shape_only(x, x.shape[0], len(w_ih), w_ih[0].shape[0]), args)
    kept = run_forward(backend, replace(inputs, spec=replace(plan.spec, save="all")), x, w_ih, b_ih, plan.models)
    moved, K = LayerTangents(plan, T, B, x, args, kept, direction).outputs(), len(inputs.states)
    return moved if plan.spec.save != "none" else (*moved[: 1 + K], *(v.new_empty(0) for v in moved[1 + K :]))


class LayerTangents:
    """One call of the layer, moved along one direction.

    Args:
        plan, T, B, x, args: the call.
        outputs: of its forward, without `final`.
        direction: a tangent for x and for each of args; None where it stays.
    """

    def __init__(
        self,
        plan: Plan,
        T: int,
        B: int,
        x: Tensor,
        args: tuple[Tensor, ...],
        outputs: ScanOutputs,
        direction: Optionals,
    ) -> None:
        self.plan, self.x, self.kept, self.tx = plan, x, outputs, direction[0]
        moving: Any = tuple(direction[1:])  # laid out as args are, with None in the places of what stays
        self.w_ih, _ = plan.projection(args)
        self.tw_ih, tb_ih = plan.projection(moving)
        self.inputs = plan.inputs(T, B, shape_only(x, x.shape[0], len(self.w_ih), self.w_ih[0].shape[0]), args)
        along = plan.inputs(T, B, x, moving)
        self.direction = Direction(self._project(tb_ih), along.states, along.params, along.reset_states)
        self.scan = TangentScan(self.inputs, outputs)
        self.moved = self.scan.forward(self.direction)

    def _project(self, tb_ih: Optionals) -> Tensor | None:
        """The tangent of the input projection."""
        x, tx, directions = self.x, self.tx, len(self.w_ih) // self.plan.models
        if tx is None and all(t is None for t in (*self.tw_ih, *tb_ih)):
            return None
        columns = []
        for n, (w, tw, tb) in enumerate(zip(self.w_ih, self.tw_ih, tb_ih, strict=True)):
            m = n // directions
            column = x.new_zeros(x.shape[0], w.shape[0]) if tx is None else torch.mm(tx[:, m], w.t())
            if tw is not None:
                column.addmm_(x[:, m], tw.t())
            columns.append(column if tb is None else column.add_(tb))
        return torch.stack(columns, 1)

    def outputs(self) -> tuple[Tensor, ...]:
        """Tangents of y, final and seq."""
        out, states = self.moved.outputs, self.inputs.states
        final = (v.to(s.dtype) for v, s in zip(out.final, states, strict=True))
        seq = (v.to(s.dtype) for v, s in zip(out.seq, states[1:], strict=True))
        return out.y.to(self.kept.y.dtype), *final, *seq

    def gradients(self, d: Optionals, td: Optionals, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Tangents of the gradients that `d` (dy, dfinal and dseq) give x and args; `td` are the tangents of d."""
        if not any(wanted):
            return [None] * len(wanted)
        K = len(self.inputs.states)
        primal, tangent = (Gradients(v[0], v[1 : 1 + K], v[1 + K :]) for v in (d, td))
        carried = self.scan.backward(primal)
        moved = self.scan.backward_jvp(carried, tangent, self.moved, self.direction)
        plan, out = self.plan, self.moved.outputs
        found = layer_gradients(
            plan, self.inputs, self.x, self.w_ih, self.kept.y, self.kept.hidden, self.scan.gradients(moved), wanted,
            in_place=True,
        )  # fmt: skip
        # Products of the scan's gradients have another factor, and that moves too; sums of them have none.
        factor = (self.tx is not None, *(False,) * plan.bias, *(name in ("w_hh", "w_hr") for name in plan.spec.params))
        moves = [False] * (1 + plan.first_weight) + [*factor] * len(self.w_ih)
        moves[0] = any(t is not None for t in self.tw_ih)
        more = layer_gradients(
            plan,
            replace(
                self.inputs,
                states=_filled(self.direction.states, self.inputs.states),
                reset_states=_filled(self.direction.reset_states, self.inputs.reset_states),
            ),
            self.x if self.tx is None else self.tx,
            _filled(self.tw_ih, self.w_ih),
            out.y.to(self.kept.y.dtype),
            out.hidden.to(self.kept.y.dtype),
            self.scan.gradients(carried),
            [a and b for a, b in zip(wanted, moves, strict=True)],
            in_place=True,
        )
        return [a if a is None or b is None else a.add_(b) for a, b in zip(found, more, strict=True)]


def _filled(tangents: Optionals, primals: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(tangents, primals, strict=True))
