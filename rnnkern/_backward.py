"""The layer's first derivatives, and as functions of their own arguments the derivatives of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import _ops, dispatch
from rnnkern._fold import Fold, Mapped, one_by_one, sample
from rnnkern._plan import Plan, shape_only
from rnnkern._run import real, run_reference, scan_arguments, unwatched
from rnnkern._segments import backward_in_segments, edges_of_backward, in_order, saved
from rnnkern._tangents import LayerTangents, beneath_forward_mode, differentiable, placed, serves
from rnnkern._weights import layer_gradients
from rnnkern.backends.base import ScanGrads, ScanOutputs
from rnnkern.backends.reference import BACKEND as REFERENCE


def tangents_of(
    f: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """J v, as the derivative of J^T u with respect to u: reverse mode only, so it nests within any other transform."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def along(*values: Tensor) -> tuple[Tensor, ...]:
        return f(*placed(primals, moving, values))

    out, transposed = torch.func.vjp(along, *(primals[i] for i in moving))  # type: ignore[misc]
    _, pushed = torch.func.vjp(lambda *u: transposed(u), *(torch.zeros_like(o) for o in out))  # type: ignore[misc]
    return pushed(tuple(tangents[i] for i in moving))


class LayerBackward(torch.autograd.Function):
    """The layer's gradients: (plan, backend, T, B, wanted, count, *d, *outputs, *inputs) -> one per input or None.

    `d` are dy, dfinal and dseq, `outputs` y, seq, planes and hidden, `inputs` the layer's `count` tensors, of which
    `wanted` says whose gradients are asked for.
    """

    @staticmethod
    def forward(
        plan: Plan, backend: str, T: int, B: int, wanted: tuple[bool, ...], count: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        d, (y, *seq, planes, hidden), (x, *rest) = parts(plan, count, tensors)
        args, K = tuple(rest), len(plan.cell.states)
        w_ih, _ = plan.projection(args)
        inputs = plan.inputs(T, B, shape_only(y, y.shape[0], len(plan.spec.reverse), plan.columns(args)), args)
        direct = unwatched() and real(tensors)
        if direct:
            outputs = ScanOutputs(y, (), tuple(seq), planes, hidden)
            run, edges = dispatch.backend(backend), edges_of_backward(plan, inputs, x.shape[-1])
            if len(edges) > 2:
                segments, cut = in_order(inputs, edges), saved(inputs, outputs)
                return tuple(backward_in_segments(plan, run, segments, cut, d, x, w_ih, wanted))
            grads = run.backward(inputs, outputs, d[0], d[1 : 1 + K], d[1 + K :])
        else:
            flat = _ops.scan_backward(
                plan.text, backend, T, B, list(d), y, seq, planes, hidden, *scan_arguments(inputs)
            )
            at = 4 + K + plan.resets
            small = _ops.by_group(flat[at:], len(plan.spec.reverse))
            grads = ScanGrads(
                flat[0], flat[1], flat[2], flat[3], tuple(flat[4 : 4 + K]), tuple(flat[4 + K : at]), small
            )
        return tuple(layer_gradients(plan, inputs, x, w_ih, y, hidden, grads, wanted, in_place=direct))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.plan, _, ctx.T, ctx.B, _, ctx.count = inputs[:6]
        ctx.given = tuple(v is not None for v in output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[6:])
        ctx.save_for_forward(*inputs[6:])

    @staticmethod
    def _recomputed(
        ctx: Any, tensors: Sequence[Tensor], asked: Sequence[bool]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[int]]:
        """The asked gradients as a differentiable function of d and of the layer's floating-point inputs.

        The forward is part of it: what the outputs saved for the backward contribute comes in through the inputs.
        Returns the function, its arguments, and where among the tensors of `forward` each of those stands.
        """
        plan, T, B, count = ctx.plan, ctx.T, ctx.B, ctx.count
        k, inputs_at = plan.differentiable, len(tensors) - count
        places = [i for i in range(k) if tensors[i].dim() > 1]
        places += [i for i in range(inputs_at, len(tensors)) if tensors[i].is_floating_point()]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            d, _, layer_inputs = parts(plan, count, placed(tensors, places, values))
            return tuple(v for v in gradients_in_torch(plan, T, B, asked, d, layer_inputs) if v is not None)

        return gradients, [tensors[i] for i in places], places

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Any, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return None, None, None, None, None, None, *LayerBackward._backward(ctx, g)

    @staticmethod
    def _backward(ctx: Any, g: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        tensors, count = ctx.saved_tensors, ctx.count
        asked = [v is not None and given for v, given in zip(g, ctx.given, strict=True)]
        none: list[Tensor | None] = [None] * len(tensors)
        if not any(asked):
            return none
        function, arguments, places = LayerBackward._recomputed(ctx, tensors, asked)
        n, there = len(arguments), [i for i, present in enumerate(asked) if present]
        values = [*arguments, *(v for v, present in zip(g, asked, strict=True) if present and v is not None)]
        wanted = (True,) * count if torch.is_grad_enabled() else ctx.needs_input_grad[-count:]

        def slow(*values: Tensor) -> tuple[Tensor, ...]:
            _, back = torch.func.vjp(function, *values[:n])  # type: ignore[misc]
            return back(values[n:])

        def fast(*values: Tensor) -> list[Tensor | None]:
            d, kept, layer_inputs = parts(ctx.plan, count, placed(tensors, places, values[:n]))
            along = tangents_along(ctx, kept, layer_inputs, placed([None] * count, there, values[n:]))
            found = [*along.outputs(), *(None for _ in kept), *along.gradients(d, (None,) * len(d), wanted)]
            return [found[i] for i in places]

        served = serves(ctx.plan, tensors[0].shape[0], (*tensors, *values))
        return placed(none, places, differentiable(fast, slow, values) if served else slow(*values))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        return beneath_forward_mode(partial(LayerBackward._jvp, ctx), ctx.saved_tensors, tangents[6:])

    @staticmethod
    def _jvp(ctx: Any, tensors: Sequence[Tensor], moving: Sequence[Tensor | None]) -> list[Tensor | None]:
        count = ctx.count
        function, arguments, places = LayerBackward._recomputed(ctx, tensors, ctx.given)
        n, moved = len(arguments), [i for i in places if moving[i] is not None]
        values = [*arguments, *(t for i in moved if (t := moving[i]) is not None)]

        def slow(*values: Tensor) -> tuple[Tensor, ...]:
            along = placed(moving, moved, values[n:])
            return tangents_of(function, values[:n], [along[i] for i in places])

        def fast(*values: Tensor) -> list[Tensor | None]:
            d, kept, layer_inputs = parts(ctx.plan, count, placed(tensors, places, values[:n]))
            td, _, direction = parts(ctx.plan, count, placed([None] * len(tensors), moved, values[n:]))
            found = tangents_along(ctx, kept, layer_inputs, direction).gradients(d, td, ctx.given)
            return [v for v in found if v is not None]

        served = serves(ctx.plan, tensors[0].shape[0], (*tensors, *values))
        results = iter(differentiable(fast, slow, values) if served else slow(*values))
        return [next(results) if given else None for given in ctx.given]

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        plan: Plan,
        backend: str,
        T: int,
        B: int,
        wanted: tuple[bool, ...],
        count: int,
        *tensors: Tensor,
    ) -> Mapped:
        n, dims = info.batch_size, in_dims[6:]
        at, k = len(tensors) - count, plan.differentiable
        # Sums that the scan makes itself are over all rows: per sample, each needs its own group.
        summed = [_ops.has_own_gradient(plan.spec, name) for name in plan.spec.params]
        fold = Fold(n, plan, T, B, tensors[at:], dims[at:], groups=any(summed))
        if not fold.possible:
            return one_by_one(
                lambda i: LayerBackward.apply(
                    plan, backend, T, B, wanted, count, *(sample(v, d, i) for v, d in zip(tensors, dims, strict=True))
                ),
                n,
            )
        K = len(plan.cell.states)
        kinds = fold.outputs[:k] + fold.outputs[:1] + fold.outputs[1 + K :]
        outer = [fold.put(v, dim, kind) for v, dim, kind in zip(tensors[:at], dims[:at], kinds, strict=True)]
        weights = wanted[len(fold.kinds) :]
        folded, asked = fold.plan, wanted
        if fold.groups:
            asked = wanted + weights * (n - 1)
        else:
            folded = replace(folded, samples=max(plan.samples, 1) * n)
        grads = LayerBackward.apply(folded, backend, T, fold.B, asked, len(fold.args), *outer, *fold.args)
        return fold.split_gradients(grads)


def gradients_in_torch(
    plan: Plan, T: int, B: int, asked: Sequence[bool], d: Sequence[Tensor], layer_inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """The layer's asked gradients from its inputs alone, in plain torch operations: differentiable to any order."""
    x, args, K = layer_inputs[0], tuple(layer_inputs[1:]), len(plan.cell.states)
    inputs, out = run_reference(plan, T, B, x, args)
    grads = REFERENCE.backward(inputs, out, d[0], tuple(d[1 : 1 + K]), tuple(d[1 + K :]))
    w_ih, _ = plan.projection(args)
    return layer_gradients(plan, inputs, x, w_ih, out.y, out.hidden, grads, asked, in_place=False)


def materialized(plan: Plan, d: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """dy, dfinal and dseq of the layer with these inputs, as the scan's backward takes them: what is None is zero."""
    x, K, at = inputs[0], len(plan.cell.states), 1 + plan.first_state
    states = inputs[at : at + K]
    dy = d[0]
    if dy is None:
        shape = x.shape[0], len(plan.spec.reverse), states[0].shape[-1]
        dy = torch.zeros((), dtype=x.dtype, device=x.device).expand(shape)
    dfinal = (torch.zeros_like(s) if v is None else v for v, s in zip(d[1 : 1 + K], states, strict=True))
    dseq = (s.new_empty(0) if v is None else v for v, s in zip(d[1 + K : 2 * K], states[1:], strict=True))
    return dy, *dfinal, *dseq


def once() -> bool:
    """Whether nobody differentiates again what a backward computes now; a traced graph needs no second Function."""
    return torch.compiler.is_compiling() or not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())


def legacy_batched(d: Sequence[Tensor | None]) -> bool:
    """autograd.grad(is_grads_batched=True) maps by the older vmap, which knows no Function and no backend."""
    return not torch.compiler.is_compiling() and any(
        v is not None and torch._C._functorch.is_legacy_batchedtensor(v) for v in d
    )


def tangents_along(
    ctx: Any, outputs: Sequence[Tensor], layer_inputs: Sequence[Tensor], direction: Sequence[Tensor | None]
) -> LayerTangents:
    y, *seq, planes, hidden = outputs
    kept = ScanOutputs(y, (), tuple(seq), planes, hidden)
    return LayerTangents(ctx.plan, ctx.T, ctx.B, layer_inputs[0], tuple(layer_inputs[1:]), kept, direction)


def parts(plan: Plan, count: int, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """LayerBackward's tensors: d, outputs, inputs."""
    k, at = plan.differentiable, len(tensors) - count
    return tuple(tensors[:k]), tuple(tensors[k:at]), tuple(tensors[at:])
