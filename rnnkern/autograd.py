"""One layer, input projection and scan, as an autograd Function over the ops of _ops.py.

The layer and not the scan: so the pre-activations are a temporary that no backward keeps. First derivatives run on the
backend that ran the forward. Second ones and forward mode are one tangent pass (_tangents.py). What that does not
take, third derivatives, and what torch.func maps or differentiates further go through the reference: its forward and
hand-written backward are plain torch operations, so they are recomputed from the layer's inputs and differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import _ops, dispatch
from rnnkern._backward import LayerBackward, gradients_in_torch, legacy_batched, materialized, once, tangents_of
from rnnkern._fold import Mapped, beneath_vmap, mapped
from rnnkern._plan import Plan, cached_plan, make_plan, shape_only
from rnnkern._recompute import Recomputed
from rnnkern._run import (
    forward_levels,
    holds_numbers,
    may_be_differentiated,
    project,
    real,
    run_forward,
    run_reference,
    scan_arguments,
    transformed_in_a_trace,
    unwatched,
)
from rnnkern._tangents import beneath_forward_mode, differentiable, outputs_along, placed, serves
from rnnkern.backends.base import ScanInputs

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Group(NamedTuple):
    """The weights of one direction of one model."""

    w_ih: Tensor | None  # [G*H, I]; None, of all groups: x is the pre-activations, [S, N, G*H], and there is no b_ih
    b_ih: Tensor | None  # [G*H]
    params: tuple[Tensor, ...]  # in the order of the layer's param_names: w_hh, b_hh?, w_hr?, ...


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    groups: Sequence[Group],
    reverse: tuple[bool, ...],
    T: int,
    B: int,
    *,
    param_names: tuple[str, ...],
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_states: Sequence[Tensor] = (),
    noise: Sequence[Tensor] = (),
    noise_names: tuple[str, ...] = (),
    scales: tuple[float, ...] = (),
    keep_states: bool = False,
    backend: str | None = None,
    memory: str = "save",
    **spec_options: Any,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer in all its directions.

    Args:
        cell: name in CELLS.
        x: [S, M, I], rows of (time, batch) as backends/base.py lays them out, one input per model; [S, N, G*H] where
            groups have no w_ih.
        states: [N, B, P] in x's dtype, then [N, B, H] in the accumulation dtype.
        groups: N = M * D of them; group m * D + d reads x[:, m].
        reverse: [N] which groups walk from the end.
        T, B: steps and batch rows.
        param_names: the names of what every group's `params` holds.
        offsets, lengths, reset, reset_states, noise: as in ScanInputs; reset states may have batch size 1.
        noise_names, scales: one per mask; scales default to 1.
        keep_states: whether the states after every step are wanted.
        backend: None for the choice of dispatch.choose.
        memory: "recompute" keeps less for the backward (_recompute.py), where no trace or transform is at work.
        spec_options: further fields of ScanSpec.

    Returns:
        y [S, N, P], the final states, and with `keep_states` every state but h after every step, [S, N, H] each.
    """
    states = tuple(states)
    if reset_states:
        reset_states = tuple(
            r if r.shape == s.shape else r.expand(s.shape) for r, s in zip(reset_states, states, strict=True)
        )
    w_ih, b_ih, params = zip(*groups, strict=True)
    if w_ih[0] is None:
        w_ih = ()
    tensors = [x]
    for optional in (offsets, lengths, reset):
        if optional is not None:
            tensors.append(optional)
    tensors += states
    tensors += reset_states
    tensors += noise
    bias = b_ih[0] is not None
    for group in groups:
        if group.w_ih is not None:
            tensors.append(group.w_ih)
        if group.b_ih is not None:
            tensors.append(group.b_ih)
        tensors += group.params

    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    direct = not (compiling or transformed or x.is_meta) and unwatched()
    graded = transformed and may_be_differentiated(tensors)
    # What torch.export makes has no backward, so it need not keep what one would read.
    graded_mode = torch.is_grad_enabled() and not (compiling and torch.compiler.is_exporting())
    for t in tensors:
        if direct and (_wrapped(t) or not holds_numbers(t)):  # what leaked out of a transform stays wrapped
            direct = False
        if graded_mode and t.requires_grad:
            graded = True
    present = (offsets is not None, lengths is not None, reset is not None)
    plan = (make_plan if compiling else cached_plan)(
        cell,
        reverse,
        param_names,
        noise_names,
        scales or (1.0,) * len(noise_names),
        "all" if graded else "states" if keep_states else "none",
        x.shape[1],
        bias,
        bool(w_ih),
        present,
        len(reset_states),
        tuple(spec_options.items()),
    )
    stand_in = shape_only(states[0], x.shape[0], len(groups), params[0][0].shape[0])
    inputs = ScanInputs(
        plan.spec, T, B, stand_in, states, params, offsets, lengths, reset, tuple(reset_states), tuple(noise)
    )
    if backend is None:
        backend = dispatch.choose(inputs)
    if direct and not graded:
        out = run_forward(backend, inputs, x, w_ih, b_ih, plan.models)
        return out.y, out.final, out.seq if keep_states else ()
    K = len(states)
    # Dynamo has no vmap and no jvp of a Function; in nested forward mode torch would take its jvp for a constant.
    if (compiling and transformed_in_a_trace()) or (transformed and forward_levels() > 1):
        out = run_reference(plan, T, B, x, tuple(tensors[1:]))[1]
        return out.y, out.final, out.seq if keep_states else ()
    if memory == "recompute" and direct:
        outputs = Recomputed.apply(plan, backend, keep_states, T, B, *tensors)
        return outputs[0], outputs[1 : 1 + K], outputs[1 + K :]
    if transformed:
        outputs = beneath_vmap(partial(_below, graded, backend), plan, T, B, *tensors)
    else:
        if compiling:  # without a gradient Dynamo takes a forward with *args for one that wants a context
            run = Layer.apply if graded else Layer.forward
        else:
            run = _apply if direct else LayerWithTangents.apply
        outputs = run(plan, backend, direct, T, B, *tensors)
    return outputs[0], outputs[1 : 1 + K], outputs[1 + K : 2 * K] if keep_states else ()


class Layer(torch.autograd.Function):
    """The layer: (plan, backend, direct, T, B, x, *args) -> (y, *final, *seq, planes, hidden). Plan says what args are,
    `direct` that the caller has seen no need of an op.

    Without forward mode, which Dynamo refuses; LayerWithTangents is the same with it.
    """

    @staticmethod
    def forward(plan: Plan, backend: str, direct: bool, T: int, B: int, x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        w_ih, b_ih = plan.projection(args)
        if direct or (unwatched() and real((x, *args))):
            stand_in = shape_only(x, x.shape[0], len(plan.spec.reverse), plan.columns(args))
            out = run_forward(backend, plan.inputs(T, B, stand_in, args), x, w_ih, b_ih, plan.models)
            return out.y, *out.final, *out.seq, out.planes, out.hidden
        if w_ih and dispatch.projects(backend):
            biases = [b for b in b_ih if b is not None]
            scan = scan_arguments(plan.inputs(T, B, x, args))
            found = _ops.layer_forward(plan.text, backend, T, B, x, list(w_ih), biases, *scan)
        else:
            inputs = plan.inputs(T, B, project(x, w_ih, b_ih, plan.models), args)
            found = _ops.scan_forward(plan.text, backend, T, B, inputs.gx, *scan_arguments(inputs))
        absent = plan.differentiable + 2 - len(found)  # the ops leave out what nobody keeps
        return *found, *(x.new_empty(0) for _ in range(absent))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.backend, _, ctx.T, ctx.B = inputs[:5]
        ctx.count = len(inputs) - 5
        K = len(ctx.plan.cell.states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2 * K :])
        ctx.save_for_backward(*inputs[5:], output[0], *output[1 + K :])

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
                return Layer._backward(ctx, d)
        return Layer._backward(ctx, d)

    @staticmethod
    def _backward(ctx: Any, d: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        outputs, inputs = saved[ctx.count :], saved[: ctx.count]
        given, wanted = materialized(plan, d, inputs), ctx.needs_input_grad[5:]
        if legacy_batched(d):
            grads: Sequence[Tensor | None] = gradients_in_torch(plan, ctx.T, ctx.B, wanted, given, inputs)
        else:
            run = LayerBackward.forward if once() else LayerBackward.apply
            grads = run(plan, ctx.backend, ctx.T, ctx.B, wanted, ctx.count, *given, *outputs, *inputs)
        return None, None, None, None, None, *grads

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], plan: Plan, backend: str, direct: bool, T: int, B: int, *tensors: Tensor
    ) -> Mapped:
        function = Layer if torch.compiler.is_compiling() else LayerWithTangents

        def run(plan: Plan, T: int, B: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            return function.apply(plan, backend, False, T, B, *tensors)

        return mapped(run, info.batch_size, in_dims[5:], plan, T, B, tensors)


class LayerWithTangents(Layer):
    """Layer with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Layer.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[5:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        return *beneath_forward_mode(partial(LayerWithTangents._jvp, ctx), ctx.saved_tensors, tangents[5:]), None, None

    @staticmethod
    def _jvp(ctx: Any, tensors: Sequence[Tensor], moving: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        plan, T, B, count = ctx.plan, ctx.T, ctx.B, ctx.plan.differentiable
        floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
        n, moved = len(floating), [i for i, t in enumerate(moving) if t is not None]
        values = [*(tensors[i] for i in floating), *(t for t in moving if t is not None)]

        def run(x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
            out = run_reference(plan, T, B, x, args)[1]
            return (out.y, *out.final, *out.seq)[:count]

        def slow(*values: Tensor) -> tuple[Tensor, ...]:
            along = placed(moving, moved, values[n:])
            return tangents_of(run, placed(tensors, floating, values[:n]), along)

        def fast(*values: Tensor) -> tuple[Tensor, ...]:
            x, *args = placed(tensors, floating, values[:n])
            return outputs_along(plan, ctx.backend, T, B, x, tuple(args), placed(moving, moved, values[n:]))

        served = serves(plan, tensors[0].shape[0], (*tensors, *values))
        return differentiable(fast, slow, values) if served else slow(*values)


# Function.apply without the inspection of forward's signature that it makes at every call, for defaults that are not
# there. With no transform active, and no tensor left from one, that is all it adds.
_apply = super(torch.autograd.Function, LayerWithTangents).apply


def _below(graded: bool, backend: str, plan: Plan, T: int, B: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The layer below vmap: where nothing else is either, as a plain call."""
    plain = unwatched() and not any(map(_wrapped, tensors))
    run = LayerWithTangents.apply if not plain else _apply if graded else Layer.forward
    return run(plan, backend, False, T, B, *tensors)
