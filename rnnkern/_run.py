"""How a planned layer call is executed: on a backend as it is, through the ops, or in plain torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from rnnkern import dispatch
from rnnkern._dynamo import constant
from rnnkern._plan import Plan
from rnnkern.backends.base import ScanInputs, ScanOutputs, accumulation_dtype
from rnnkern.backends.reference import BACKEND as REFERENCE
from rnnkern.cells import CELLS, Aux

PLAIN = (Tensor, torch.nn.Parameter)


def unwatched() -> bool:
    """Whether nobody traces, transforms or intercepts what runs now: a backend may then be called without an op."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or (forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())
        or torch._C._get_tracing_state() is not None
    )


def holds_numbers(t: Tensor) -> bool:
    """Whether its numbers lie in memory: not those of a negated view, of a stand-in for zeros, or of a subclass."""
    return type(t) in PLAIN and not t.is_neg() and not t._is_zerotensor()


def real(tensors: Sequence[Tensor]) -> bool:
    return all(holds_numbers(t) and not t.is_meta for t in tensors)


def forward_levels() -> int:
    """How many nested forward-mode transforms are active."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


@constant  # asked at trace time: Dynamo enters the transforms that it traces
def transformed_in_a_trace() -> bool:
    """Whether the trace that is being made is inside a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def may_be_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether an active transform, or autograd around it, may come back for gradients of a call with these tensors."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels):
        return True
    return torch.is_grad_enabled() and any(_unwrapped(t).requires_grad for t in tensors)


def _unwrapped(t: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def run_forward(
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
    if fused is not None and w_ih:
        return fused(inputs, x, w_ih, b_ih)
    inputs.gx = project(x, w_ih, b_ih, models, in_place=True)
    return backend.forward(inputs)


def project(
    x: Tensor, w_ih: Sequence[Tensor], b_ih: Sequence[Tensor | None], models: int, in_place: bool = False
) -> Tensor:
    """gx [S, N, G*H]; with no weights, x is that already. `in_place`: the GEMMs write where it lies, which neither
    autograd nor a transform can follow.
    """
    if not w_ih:
        return x
    if len(w_ih) == 1:
        return linear(x[:, 0], w_ih[0], b_ih[0]).unsqueeze(1)
    directions = len(w_ih) // models
    if not in_place:
        return torch.stack(
            [linear(x[:, n // directions], w, b) for n, (w, b) in enumerate(zip(w_ih, b_ih, strict=True))], 1
        )
    gx = x.new_empty(len(w_ih), x.shape[0], w_ih[0].shape[0])
    for n, (w, b) in enumerate(zip(w_ih, b_ih, strict=True)):
        if b is None:
            torch.mm(x[:, n // directions], w.t(), out=gx[n])
        else:
            torch.addmm(b, x[:, n // directions], w.t(), out=gx[n])
    return gx.transpose(0, 1)


def run_reference(plan: Plan, T: int, B: int, x: Tensor, args: tuple[Tensor, ...]) -> tuple[ScanInputs, ScanOutputs]:
    """The layer in plain torch."""
    w_ih, b_ih = plan.projection(args)
    inputs = plan.inputs(T, B, project(x, w_ih, b_ih, plan.models), args)
    return inputs, REFERENCE.forward(inputs)


def run_step(
    cell: str, gx: Tensor, states: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None, heads: int
) -> tuple[Tensor, ...]:
    """One step [B, G*H] in plain torch, with nothing of a scan around it: states but h are in the accumulation dtype.
    With heads, these are the first dimension of the weights.
    """
    spec, dtype, wide = CELLS[cell], gx.dtype, accumulation_dtype(gx.dtype)
    gates = len(spec.gates)
    if heads:
        gx, *states = (v.unflatten(1, (heads, -1)) for v in (gx, *states))
        gh = torch.bmm(states[0].transpose(0, 1), w_hh.transpose(1, 2)).transpose(0, 1)
    elif spec.dense:
        gh = linear(states[0], w_hh, b_hh)
    else:
        gh = w_hh * (states[0] if gates == 1 else states[0].repeat(1, gates))
    if b_hh is not None and (heads or not spec.dense):
        gh = gh + b_hh
    if dtype is not wide:
        gx, gh, *states = (v.to(wide) for v in (gx, gh, *states))
    x, h = ((v,) if gates == 1 else v.chunk(gates, -1) for v in (gx, gh))
    new, _ = spec.step(x, h, tuple(states), Aux({}, {}, 0.0))
    if heads:
        new = tuple(v.flatten(1) for v in new)
    return new if dtype is wide else (new[0].to(dtype), *new[1:])


def scan_arguments(inputs: ScanInputs) -> tuple[Any, ...]:
    """What both ops take last."""
    flat = [p for group in inputs.params for p in group]
    states, resets, noise = list(inputs.states), list(inputs.reset_states), list(inputs.noise)
    return states, flat, inputs.offsets, inputs.lengths, inputs.reset, resets, noise
