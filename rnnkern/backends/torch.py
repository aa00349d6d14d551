"""Torch's own kernels (oneDNN, cuDNN, ATen's loops), at the call level: for where they are faster.

They take a whole stack of layers, so they can never be a scan backend. Inside an autograd Function of ours they gain
what they lack alone: a backward in evaluation mode (cuDNN needs `train=True` for it, here given whenever a gradient is
needed, with the dropout of evaluation: none), second derivatives and batched gradients, which run on the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import _call, _layouts, dispatch


class Call(NamedTuple):
    """The static part of a call."""

    cell: str
    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    batch_sizes: Tensor | None
    autocast: torch.dtype | None  # the dtype of the autocast region it ran in


def cannot(lengths: bool, reset: bool, return_states: bool, memory: str, options: str) -> str:
    """What of these torch's kernels lack, as words; empty: nothing. `options` are words already."""
    recompute = ('memory="recompute"', memory != "save")
    asked = (("lengths=", lengths), ("reset=", reset), ("return_states=", return_states), recompute)
    return ", ".join([*(name for name, given in asked if given), *([options] if options else [])])


def transformed() -> bool:
    """Whether torch.func, forward AD or a tracer is at work, which torch's kernels do not know."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def call(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    params: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    sizes: tuple[tuple[int, int, int], ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(output, final states) of a checked call, from the arguments as the caller gave them, batch dimension there."""
    if hx is None:
        hx = tuple(input.new_zeros(size) for size in sizes)
    autocast = _layouts.autocast_dtype(input.device.type)
    if not training or num_layers == 1:
        dropout = 0.0
    tensors = (input, *(h.contiguous() for h in hx), *params)
    traced = torch._C._get_tracing_state() is not None  # a graph of torch's ops, which a Function would not be
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not traced
    how = Call(cell, bias, num_layers, dropout, training or needed, bidirectional, batch_first, batch_sizes, autocast)
    # ATen's loops on the CPU are torch operations, differentiable as often as those are.
    whole = needed and (cell == "lstm" or input.device.type != "cpu")
    y, *final = Whole.apply(how, *tensors) if whole else _kernel(how, tensors)
    return y, tuple(final)


def step(
    cell: str, input: Tensor, hx: tuple[Tensor, ...] | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One step of a cell. Torch's own graph of it is differentiable twice, so it needs no Function."""
    two = cell == "lstm"
    if hx is None:
        zeros = input.new_zeros(input.size(0), w_hh.size(1))
        hx = (zeros, zeros) if two else (zeros,)
    found = getattr(torch._VF, f"{cell}_cell")(input, hx if two else hx[0], w_ih, w_hh, b_ih, b_hh)
    return found if two else (found,)


def _kernel(how: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    input, hx, params = _parts(how, tensors)
    run = getattr(torch._VF, how.cell)
    state = hx if len(hx) > 1 else hx[0]
    options = (how.bias, how.num_layers, how.dropout, how.training, how.bidirectional)
    if how.batch_sizes is None:
        return run(input, state, params, *options, how.batch_first)
    return run(input, how.batch_sizes, state, params, *options)


def _parts(how: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    count = 2 if how.cell == "lstm" else 1
    return tensors[0], tuple(tensors[1 : 1 + count]), list(tensors[1 + count :])


class Whole(torch.autograd.Function):
    """A whole call. The kernel's own graph is kept inside, over leaves of its own, and differentiated once."""

    @staticmethod
    def forward(ctx: Any, how: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.how = how
        ctx.generator = torch.get_rng_state() if how.dropout and tensors[0].device.type == "cpu" else None
        ctx.leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with torch.enable_grad():
            ctx.outputs = _kernel(how, ctx.leaves)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(o.detach() for o in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises torch's own error when the graph has been freed
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or transformed():
            leaves = [t.view_as(t) for t in tensors]  # one input may depend on another: gradients stop at the views
            with torch.enable_grad():
                outputs = _on_reference(ctx.how, leaves, ctx.generator)
            keep = {"create_graph": torch.is_grad_enabled(), "retain_graph": True}
        else:
            leaves, outputs = ctx.leaves, ctx.outputs
            keep = {"retain_graph": torch._C._autograd._get_current_graph_task_keep_graph()}
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
                [g for _, g in pairs],
                allow_unused=True,
                **keep,
            )
        )
        return (None, *(next(found) if want else None for want in wanted))


def _on_reference(how: Call, tensors: Sequence[Tensor], generator: Tensor | None) -> tuple[Tensor, ...]:
    """The same call on the reference, with the dropout masks that the kernel drew."""

    input, hx, params = _parts(how, tensors)
    device = input.device.type
    if how.dropout and generator is None:
        raise RuntimeError(
            f"torch's kernels on {device} draw the dropout between layers inside, so second derivatives cannot draw it "
            "again; take rnnkern.use_backend('reference') for this call"
        )
    with (
        torch.random.fork_rng(devices=[], enabled=generator is not None),
        torch.autocast(device, dtype=how.autocast, enabled=how.autocast is not None),
        dispatch.use_backend("reference"),
    ):
        if generator is not None:
            torch.set_rng_state(generator)
        y, final, _ = _call.run(
            how.cell, input, hx, params, how.bias, how.num_layers, how.dropout, how.training, how.bidirectional,
            how.batch_first, how.batch_sizes,
        )  # fmt: skip
    return (y, *final)
