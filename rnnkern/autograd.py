"""One layer, input projection and scan, as an autograd Function over the two ops of _ops.py.

The layer and not the scan: so the pre-activations are a temporary that no backward keeps. First derivatives run on the
backend that ran the forward. Higher ones and forward mode go through the reference: its forward and hand-written
backward are plain torch operations, so they are recomputed from the layer's inputs and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from rnnkern import _ops, dispatch
from rnnkern._fold import Fold, Mapped, one_by_one, sample
from rnnkern._plan import Plan, cached_plan, make_plan, shape_only
from rnnkern._weights import layer_gradients
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs
from rnnkern.backends.reference import BACKEND as REFERENCE

_PLAIN = (Tensor, torch.nn.Parameter)


class Group(NamedTuple):
    """The weights of one direction of one model."""

    w_ih: Tensor  # [G*H, I]
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
    **spec_options: Any,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer in all its directions.

    Args:
        cell: name in CELLS.
        x: [S, M, I], rows of (time, batch) as backends/base.py lays them out, one input per model.
        states: [N, B, P] in x's dtype, then [N, B, H] in the accumulation dtype.
        groups: N = M * D of them; group m * D + d reads x[:, m].
        reverse: [N] which groups walk from the end.
        T, B: steps and batch rows.
        param_names: the names of what every group's `params` holds.
        offsets, lengths, reset, reset_states, noise: as in ScanInputs; reset states may have batch size 1.
        noise_names, scales: one per mask; scales default to 1.
        keep_states: whether the states after every step are wanted.
        backend: None for the choice of dispatch.choose.
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
    tensors = [x]
    for optional in (offsets, lengths, reset):
        if optional is not None:
            tensors.append(optional)
    tensors += states
    tensors += reset_states
    tensors += noise
    bias = b_ih[0] is not None
    for group in groups:
        tensors.append(group.w_ih)
        if group.b_ih is not None:
            tensors.append(group.b_ih)
        tensors += group.params

    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    graded = transformed or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))
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
        present,
        len(reset_states),
        tuple(spec_options.items()),
    )
    stand_in = shape_only(states[0], x.shape[0], len(w_ih), w_ih[0].shape[0])
    inputs = ScanInputs(
        plan.spec, T, B, stand_in, states, params, offsets, lengths, reset, tuple(reset_states), tuple(noise)
    )
    if backend is None:
        backend = dispatch.choose(inputs)
    if not graded and _direct(tensors):
        out = _forward(backend, inputs, x, w_ih, b_ih, plan.models)
        return out.y, out.final, out.seq if keep_states else ()
    K = len(states)
    if transformed and _forward_levels() > 1:  # torch would take a Function's jvp for a constant there
        out = _reference(plan, T, B, x, tuple(tensors[1:]))[1]
        return out.y, out.final, out.seq if keep_states else ()
    if compiling:  # without a gradient Dynamo takes a forward with *args for one that wants a context
        run = Layer.apply if graded else Layer.forward
    else:
        run = LayerWithTangents.apply
    outputs = run(plan, backend, T, B, *tensors)
    return outputs[0], outputs[1 : 1 + K], outputs[1 + K : 2 * K] if keep_states else ()


def _direct(tensors: Sequence[Any]) -> bool:
    """Whether backends may be called as they are: nobody watches the ops, and every tensor is a real one."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:
        if type(t) not in _PLAIN or t.is_meta:
            return False
    return True


def _forward_levels() -> int:
    """How many nested forward-mode transforms are active."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def _forward(
    name: str,
    inputs: ScanInputs,
    x: Tensor,
    w_ih: tuple[Tensor, ...],
    b_ih: tuple[Tensor | None, ...],
    models: int,
) -> ScanOutputs:
    """Projection and scan on a backend, without an op. `inputs.gx` is filled in where the backend wants it."""
    backend = dispatch.backend(name)
    fused = getattr(backend, "layer_forward", None)
    if fused is not None:
        return fused(inputs, x, w_ih, b_ih)
    inputs.gx = _project(x, w_ih, b_ih, models, in_place=True)
    return backend.forward(inputs)


def _project(
    x: Tensor, w_ih: Sequence[Tensor], b_ih: Sequence[Tensor | None], models: int, in_place: bool = False
) -> Tensor:
    """gx [S, N, G*H]. `in_place`: the GEMMs write where it lies, which no transform can follow."""
    if len(w_ih) == 1:
        return linear(x[:, 0], w_ih[0], b_ih[0]).unsqueeze(1)
    directions = len(w_ih) // models
    if not in_place:
        return torch.stack(
            [linear(x[:, n // directions], w, b) for n, (w, b) in enumerate(zip(w_ih, b_ih, strict=True))], 1
        )
    gx = x.new_empty(len(w_ih), x.shape[0], w_ih[0].shape[0])
    with torch.no_grad():  # nothing here needs a gradient, but `out=` asks for proof
        for n, (w, b) in enumerate(zip(w_ih, b_ih, strict=True)):
            if b is None:
                torch.mm(x[:, n // directions], w.t(), out=gx[n])
            else:
                torch.addmm(b, x[:, n // directions], w.t(), out=gx[n])
    return gx.transpose(0, 1)


def _reference(plan: Plan, T: int, B: int, x: Tensor, args: tuple[Tensor, ...]) -> tuple[ScanInputs, ScanOutputs]:
    """The layer in plain torch."""
    w_ih, b_ih = plan.projection(args)
    inputs = plan.inputs(T, B, _project(x, w_ih, b_ih, plan.models), args)
    return inputs, REFERENCE.forward(inputs)


def _differentiable(plan: Plan) -> int:
    """y, final and seq: the outputs that have gradients come first."""
    return 2 * len(plan.cell.states)


def _tangents(
    f: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """J v, as the derivative of J^T u with respect to u: reverse mode only, so it nests within any other transform."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def along(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(primals)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return f(*full)

    out, transposed = torch.func.vjp(along, *(primals[i] for i in moving))
    _, pushed = torch.func.vjp(lambda *u: transposed(u), *(torch.zeros_like(o) for o in out))
    return pushed(tuple(tangents[i] for i in moving))


class Layer(torch.autograd.Function):
    """The layer: (plan, backend, T, B, x, *args) -> (y, *final, *seq, planes, hidden); see Plan for what args are.

    Without forward mode, which Dynamo refuses; LayerWithTangents is the same with it.
    """

    @staticmethod
    def forward(plan: Plan, backend: str, T: int, B: int, x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        w_ih, b_ih = plan.projection(args)
        if _direct((x, *args)):
            stand_in = shape_only(x, x.shape[0], len(w_ih), w_ih[0].shape[0])
            out = _forward(backend, plan.inputs(T, B, stand_in, args), x, w_ih, b_ih, plan.models)
            return out.y, *out.final, *out.seq, out.planes, out.hidden
        inputs = plan.inputs(T, B, _project(x, w_ih, b_ih, plan.models), args)
        return tuple(_ops.scan_forward(plan.text, backend, T, B, inputs.gx, *_scan_arguments(inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.backend, ctx.T, ctx.B = inputs[:4]
        ctx.count = len(inputs) - 4
        K = len(ctx.plan.cell.states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2 * K :])
        ctx.save_for_backward(*inputs[4:], output[0], *output[1 + K :])

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
                return Layer._backward(ctx, d)
        return Layer._backward(ctx, d)

    @staticmethod
    def _backward(ctx: Any, d: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        y, K, at = saved[ctx.count], len(plan.cell.states), 1 + plan.first_state
        states = saved[at : at + K]
        dy = d[0] if d[0] is not None else torch.zeros((), dtype=y.dtype, device=y.device).expand(y.shape)
        dfinal = [torch.zeros_like(s) if v is None else v for v, s in zip(d[1 : 1 + K], states, strict=True)]
        dseq = [s.new_empty(0) if v is None else v for v, s in zip(d[1 + K : 2 * K], states[1:], strict=True)]
        # A traced graph, and one that nobody differentiates again, need no second Function.
        once = torch.compiler.is_compiling() or not (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        )
        run = LayerBackward.forward if once else LayerBackward.apply
        wanted = ctx.needs_input_grad[4:]
        outputs, inputs = saved[ctx.count :], saved[: ctx.count]
        grads = run(plan, ctx.backend, ctx.T, ctx.B, wanted, ctx.count, dy, *dfinal, *dseq, *outputs, *inputs)
        return None, None, None, None, *grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, backend: str, T: int, B: int, *tensors: Tensor) -> Mapped:
        function = Layer if torch.compiler.is_compiling() else LayerWithTangents
        n, dims = info.batch_size, in_dims[4:]
        fold = Fold(n, plan, T, B, tensors, dims)
        if not fold.possible:
            return one_by_one(
                lambda i: function.apply(
                    plan, backend, T, B, *(sample(v, d, i) for v, d in zip(tensors, dims, strict=True))
                ),
                n,
            )
        return fold.split_outputs(function.apply(fold.plan, backend, T, fold.B, *fold.args))


class LayerWithTangents(Layer):
    """Layer with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Layer.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        plan, T, B, count = ctx.plan, ctx.T, ctx.B, _differentiable(ctx.plan)

        def run(x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
            out = _reference(plan, T, B, x, args)[1]
            return (out.y, *out.final, *out.seq)[:count]

        return *_tangents(run, ctx.saved_tensors[: ctx.count], tangents[4:]), None, None


class LayerBackward(torch.autograd.Function):
    """The layer's gradients: (plan, backend, T, B, wanted, count, *d, *outputs, *inputs) -> one per input or None.

    `d` are dy, dfinal and dseq, `outputs` y, seq, planes and hidden, `inputs` the layer's `count` tensors, of which
    `wanted` says whose gradients are asked for.
    """

    @staticmethod
    def forward(
        plan: Plan, backend: str, T: int, B: int, wanted: tuple[bool, ...], count: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        d, (y, *seq, planes, hidden), (x, *rest) = _parts(plan, count, tensors)
        args, K = tuple(rest), len(plan.cell.states)
        w_ih, _ = plan.projection(args)
        inputs = plan.inputs(T, B, shape_only(y, y.shape[0], len(w_ih), w_ih[0].shape[0]), args)
        direct = _direct(tensors)
        if direct:
            outputs = ScanOutputs(y, (), tuple(seq), planes, hidden)
            grads = dispatch.backend(backend).backward(inputs, outputs, d[0], d[1 : 1 + K], d[1 + K :])
        else:
            flat = _ops.scan_backward(
                plan.text, backend, T, B, list(d), y, seq, planes, hidden, *_scan_arguments(inputs)
            )
            at = 4 + K + plan.resets
            small = _ops.by_group(flat[at:], len(w_ih))
            grads = ScanGrads(*flat[:4], tuple(flat[4 : 4 + K]), tuple(flat[4 + K : at]), small)
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
        ctx: Any, asked: Sequence[bool]
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[int]]:
        """The asked gradients as a differentiable function of d and of the layer's floating-point inputs.

        The forward is part of it: what the outputs saved for the backward contribute comes in through the inputs.
        Returns the function, its arguments, and where among the tensors of `forward` each of those stands.
        """
        plan, T, B, count, tensors = ctx.plan, ctx.T, ctx.B, ctx.count, ctx.saved_tensors
        k, inputs_at, K = _differentiable(plan), len(tensors) - count, len(plan.cell.states)
        places = [i for i in range(k) if tensors[i].dim() > 1]
        places += [i for i in range(inputs_at, len(tensors)) if tensors[i].is_floating_point()]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(tensors)
            for i, value in zip(places, values, strict=True):
                full[i] = value
            d, _, (x, *rest) = _parts(plan, count, full)
            args = tuple(rest)
            inputs, out = _reference(plan, T, B, x, args)
            grads = REFERENCE.backward(inputs, out, d[0], d[1 : 1 + K], d[1 + K :])
            w_ih, _ = plan.projection(args)
            found = layer_gradients(plan, inputs, x, w_ih, out.y, out.hidden, grads, asked, in_place=False)
            return tuple(v for v in found if v is not None)

        return gradients, [tensors[i] for i in places], places

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Any, ...]:
        result: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        asked = [v is not None and given for v, given in zip(g, ctx.given, strict=True)]
        if any(asked):
            function, arguments, places = LayerBackward._recomputed(ctx, asked)
            _, back = torch.func.vjp(function, *arguments)
            found = back(tuple(v for v, there in zip(g, asked, strict=True) if there))
            for i, value in zip(places, found, strict=True):
                result[i] = value
        return None, None, None, None, None, None, *result

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        function, arguments, places = LayerBackward._recomputed(ctx, ctx.given)
        moved = iter(_tangents(function, arguments, [tangents[6 + i] for i in places]))
        return tuple(next(moved) if given else None for given in ctx.given)

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
        at, k = len(tensors) - count, _differentiable(plan)
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


def _parts(plan: Plan, count: int, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """LayerBackward's tensors: d, outputs, inputs."""
    k, at = _differentiable(plan), len(tensors) - count
    return tuple(tensors[:k]), tuple(tensors[k:at]), tuple(tensors[at:])


def _scan_arguments(inputs: ScanInputs) -> tuple[Any, ...]:
    """What both ops take last."""
    flat = [p for group in inputs.params for p in group]
    states, resets, noise = list(inputs.states), list(inputs.reset_states), list(inputs.noise)
    return states, flat, inputs.offsets, inputs.lengths, inputs.reset, resets, noise
