"""``memory="recompute"``: a layer that keeps, of its whole forward, the states with which segments of time begin.

Its backward makes each segment's forward anew, with all that the scan's backward reads, then the gradients, and goes on
to the segment before: what lies in memory at any time is one segment's, about the square root of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from rnnkern import _ops, dispatch
from rnnkern._backward import LayerBackward, gradients_in_torch, legacy_batched, materialized, once
from rnnkern._plan import Plan, shape_only
from rnnkern._run import project, real, run_forward, scan_arguments, unwatched
from rnnkern._segments import Segment, backward_in_segments, evenly, in_order, part
from rnnkern.backends.base import ScanInputs, ScanOutputs

SMALLEST = 2**20  # bytes of a segment's pre-activations: with less, packing weights and adding up gradients would show


def edges_of_layer(inputs: ScanInputs) -> list[int]:
    """Where a layer is cut: into about sqrt(T) segments, or fewer where they would be very small."""
    _, N, columns = inputs.gx.shape
    bytes_of_a_step = max(1, inputs.B * N * columns * inputs.gx.element_size())
    steps = max(isqrt(inputs.T), -(-SMALLEST // bytes_of_a_step))
    return evenly(inputs.T, -(-inputs.T // steps))


class Way:
    """The groups of a layer that walk the same way, as a layer of their own: opposite walks meet segments in opposite
    orders. `tensors` are all of the whole layer's; `places` says which of them this one has.
    """

    def __init__(self, plan: Plan, T: int, B: int, tensors: Sequence[Tensor], back: bool) -> None:
        reverse = plan.spec.reverse
        first, count = reverse.index(back), reverse.count(back)
        step = 1 if all(way == back for way in reverse[first : first + count]) else 2  # models' directions take turns
        self.groups = groups = slice(first, first + step * count, step)
        assert reverse[groups] == (back,) * count
        spec = replace(plan.spec, reverse=reverse[groups])
        self.plan = replace(plan, spec=spec, text=spec.encode())
        self.first_weight, size = 1 + plan.first_weight, plan.per_group
        self.places = [*range(self.first_weight)]
        for n in range(len(reverse))[groups]:
            self.places += range(self.first_weight + n * size, self.first_weight + (n + 1) * size)
        self.x, *args = (tensors[at] for at in self.places)
        self.w_ih, self.b_ih = self.plan.projection(tuple(args))
        gx = shape_only(self.x, self.x.shape[0], len(spec.reverse), self.plan.columns(tuple(args)))
        if not plan.projects:
            self.x = self.x[:, groups]
        whole = self.plan.inputs(T, B, gx, tuple(args))
        self.inputs = replace(
            whole,
            states=tuple(s[groups] for s in whole.states),
            reset=None if whole.reset is None else whole.reset[:, groups],
            reset_states=tuple(s[groups] for s in whole.reset_states),
            noise=tuple(
                m[groups] if name == "h" else m[:, groups] for name, m in zip(spec.noise, whole.noise, strict=True)
            ),
        )

    def scan(self, backend: str, segment: Segment, states: tuple[Tensor, ...], save: str) -> ScanOutputs:
        inputs = part(self.inputs, segment, states)
        inputs.spec = replace(inputs.spec, save=save)
        return run_forward(backend, inputs, self.x[segment.rows], self.w_ih, self.b_ih, self.plan.models)


def ways(plan: Plan, T: int, B: int, tensors: Sequence[Tensor]) -> list[Way]:
    return [Way(plan, T, B, tensors, back) for back in dict.fromkeys(plan.spec.reverse)]


class Recomputed(torch.autograd.Function):
    """autograd.Layer with less kept: (plan, backend, keep_states, T, B, x, *args) -> (y, *final, *seq).

    For plain tensors and eager calls only; tracing and transforms have the other one. What comes later, derivatives of
    derivatives, runs on the whole again.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, backend: str, keep_states: bool, T: int, B: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x, K, at = tensors[0], len(plan.cell.states), 1 + plan.first_state
        initial, S, N = tensors[at : at + K], x.shape[0], len(plan.spec.reverse)
        y = x.new_empty(S, N, initial[0].shape[-1])
        final = tuple(torch.empty_like(s) for s in initial)
        seq = tuple(s.new_empty(S, N, s.shape[-1]) for s in initial[1:]) if keep_states else ()
        both = ways(plan, T, B, tensors)
        edges = edges_of_layer(plan.inputs(T, B, shape_only(x, S, N, plan.columns(tensors[1:])), tensors[1:]))
        entering = tuple(s.new_empty(len(edges) - 1, *s.shape) for s in initial)
        for way in both:
            states = way.inputs.states
            for segment in in_order(way.inputs, edges):
                for kept, s in zip(entering, states, strict=True):
                    kept[segment.number, way.groups] = s
                out = way.scan(backend, segment, states, "states" if keep_states else "none")
                y[segment.rows, way.groups] = out.y
                for whole, rows in zip(seq, out.seq, strict=False):
                    whole[segment.rows, way.groups] = rows
                states = out.final
            for whole, s in zip(final, states, strict=True):
                whole[way.groups] = s
        ctx.plan, ctx.backend, ctx.T, ctx.B, ctx.edges = plan, backend, T, B, edges
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *entering)
        return y, *final, *seq

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        K = len(ctx.plan.cell.states)
        d = (*d, *(None,) * (2 * K - len(d)))  # states that were not asked for have no gradients
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return None, None, None, None, None, *Recomputed._backward(ctx, d, K)

    @staticmethod
    def _backward(ctx: Any, d: tuple[Tensor | None, ...], K: int) -> Sequence[Tensor | None]:
        plan, T, B = ctx.plan, ctx.T, ctx.B
        tensors, entering = ctx.saved_tensors[:-K], ctx.saved_tensors[-K:]
        given, wanted = materialized(plan, d, tensors), ctx.needs_input_grad[5:]
        if legacy_batched(d):
            return gradients_in_torch(plan, T, B, wanted, given, tensors)
        if once() and unwatched() and real((*given, *tensors)):
            return _in_segments(plan, ctx.backend, T, B, ctx.edges, tensors, entering, given, wanted)
        with torch.no_grad():
            x, *args = tensors
            w_ih, b_ih = plan.projection(tuple(args))
            inputs = plan.inputs(T, B, project(x, w_ih, b_ih, plan.models), tuple(args))
            y, *rest = _ops.scan_forward(plan.text, ctx.backend, T, B, inputs.gx, *scan_arguments(inputs))
        run = LayerBackward.forward if once() else LayerBackward.apply
        return run(plan, ctx.backend, T, B, wanted, len(tensors), *given, y, *rest[K:], *tensors)


def _in_segments(
    plan: Plan,
    backend: str,
    T: int,
    B: int,
    edges: Sequence[int],
    tensors: Sequence[Tensor],
    entering: Sequence[Tensor],
    d: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    K, state_at = len(plan.cell.states), 1 + plan.first_state
    total: list[Tensor | None] = [None] * len(tensors)
    for way in ways(plan, T, B, tensors):
        groups = way.groups

        def scan_of(segment: Segment, way: Way = way) -> tuple[ScanInputs, ScanOutputs]:
            states = tuple(kept[segment.number, way.groups] for kept in entering)
            out = way.scan(backend, segment, states, "all")
            return part(way.inputs, segment, states), replace(out, final=())

        above = (
            d[0][:, groups],
            *(v[groups] for v in d[1 : 1 + K]),
            *(v[:, groups] if v.dim() > 1 else v for v in d[1 + K :]),
        )
        found = backward_in_segments(
            way.plan,
            dispatch.backend(backend),
            in_order(way.inputs, edges),
            scan_of,
            above,
            way.x,
            way.w_ih,
            [wanted[at] for at in way.places],
            total[0] if plan.projects else None,
        )
        for at, value in zip(way.places, found, strict=True):
            if at == 0 and not plan.projects and value is not None:
                whole = total[0] = torch.empty_like(tensors[0]) if total[0] is None else total[0]
                whole[:, groups] = value
                continue
            if value is None or not state_at <= at < way.first_weight:
                total[at] = value
                continue
            whole = total[at]
            if whole is None:
                whole = total[at] = value.new_empty(tensors[at].shape)
            whole[groups] = value
    return total
