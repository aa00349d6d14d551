"""vmap as a layout of the same call: no kernel knows of it.

Two layouts. Where no weight is batched, each row holds the n samples (row = s * n + i: the batch becomes B * n, offsets
are multiplied by n, lengths repeated; packed order stays valid). Where any weight is, the groups are repeated (N
becomes n * N). Lengths that differ from model to model fit neither: there the samples are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

from rnnkern._plan import Plan

States = tuple[Tensor, ...]
Mapped = tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]
Run = Callable[..., tuple[Tensor, ...]]  # (plan, T, B, x, *args) -> outputs

_unwrap = torch._C._functorch._unwrap_batched
_wrap = torch._C._functorch._add_batch_dim
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def sample(v: Tensor, dim: int | None, i: int) -> Tensor:
    return v if dim is None else v.select(dim, i)


def one_by_one(run: Callable[[int], Sequence[Tensor | None]], n: int) -> Mapped:
    """What `run` returns for each sample, stacked."""
    columns = list(zip(*(run(i) for i in range(n)), strict=True))
    values = tuple(None if c[0] is None else torch.stack([v for v in c if v is not None]) for c in columns)
    return values, tuple(None if v is None else 0 for v in values)


def mapped(
    run: Run, n: int, dims: Sequence[int | None], plan: Plan, T: int, B: int, tensors: Sequence[Tensor]
) -> Mapped:
    """What `run` gives for n samples: in one call if they fold into one."""
    fold = Fold(n, plan, T, B, tensors, dims)
    if fold.possible:
        return fold.split_outputs(run(fold.plan, T, fold.B, *fold.args))
    return one_by_one(lambda i: run(plan, T, B, *(sample(v, d, i) for v, d in zip(tensors, dims, strict=True))), n)


def beneath_vmap(run: Run, plan: Plan, T: int, B: int, *tensors: Tensor) -> tuple[Any, ...]:
    """run(plan, T, B, *tensors) below every vmap down to the next transform of another kind.

    What torch does by a Function's own rule for vmap; it takes longer to come there than a small layer takes to run.
    """
    if not torch._C._are_functorch_transforms_active():
        return run(plan, T, B, *tensors)
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return run(plan, T, B, *tensors)
    level = interpreter.level()
    values, dims = zip(*(_unwrap(t, level) for t in tensors), strict=True)
    inner = partial(beneath_vmap, run)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return inner(plan, T, B, *values)
        found, places = mapped(inner, interpreter.batch_size(), dims, plan, T, B, values)
    return tuple(v if v is None or dim is None else _wrap(v, dim, level) for v, dim in zip(found, places, strict=True))


def call_beneath_vmap(
    run: Callable[[Tensor, States | None], tuple[Tensor, States, Any]],
    input: Tensor,
    hx: States | None,
    params: Sequence[Tensor],
    groups: int,
    gates: int,
    batch_first: bool,
) -> tuple[Tensor, States] | None:
    """A plain call of a stack below the innermost vmap, as run(input, hx) with samples as batch rows: its output and
    final states. None where that is not all that there is to it: each layer then does what it can.

    Once per call and not once per layer, and what runs below is the call that it would be without vmap.
    """
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return None
    level = interpreter.level()
    if any(_wrapped(p) and _unwrap(p, level)[1] is not None for p in params):
        return None
    batched = input.dim() == 3
    if not batched and input.dim() != 2:
        return None
    axis = 0 if batched and batch_first else 1
    (x, dim), *states = (_unwrap(t, level) for t in (input, *(hx or ())))
    if dim is None and all(place is None for _, place in states):
        return None
    n, B = interpreter.batch_size(), input.shape[axis] if batched else 1
    if hx is not None:  # what does not fit is reported by the call as the caller made it
        widths = params[1].shape[-1], params[1].shape[0] // gates
        if any(h.shape != ((groups, B, w) if batched else (groups, w)) for h, w in zip(hx, widths, strict=False)):
            return None

    def rows(v: Tensor, dim: int | None, axis: int) -> Tensor:
        v = v.unsqueeze(axis).expand(*v.shape[:axis], n, *v.shape[axis:]) if dim is None else v.movedim(dim, axis)
        return (v.flatten(axis, axis + 1) if batched else v).contiguous()

    def samples(v: Tensor, axis: int) -> Tensor:
        return _wrap(v.unflatten(axis, (n, B)) if batched else v, axis, level)

    with interpreter.lower():
        y, final, _ = run(rows(x, dim, axis), hx and tuple(rows(v, place, 1) for v, place in states))
        return samples(y, axis), tuple(samples(v, 1) for v in final)


class Fold:
    """One vmapped layer call as an unbatched one.

    Args:
        n: samples.
        plan, T, B: of the call.
        tensors, dims: x and what follows it, and where each has its batch dimension.
        groups: take the second layout even where no weight is batched.
    """

    def __init__(
        self,
        n: int,
        plan: Plan,
        T: int,
        B: int,
        tensors: Sequence[Tensor],
        dims: Sequence[int | None],
        groups: bool = False,
    ) -> None:
        self.n, self.base, self.T = n, plan, T
        K = len(plan.cell.states)
        named = zip(("offsets", "lengths", "rows"), plan.present, strict=True)
        optional = [kind for kind, there in named if there]
        masks = ["state" if name == "h" else "rows" for name in plan.spec.noise]
        self.kinds = ["rows", *optional, *["state"] * (K + plan.resets), *masks]
        self.outputs = ["rows", *["state"] * K, *["rows"] * (K + 1)]  # y, final, seq, planes, hidden
        first = len(self.kinds)
        self.groups = groups or any(dim is not None for dim in dims[first:])
        batched = {kind for kind, dim in zip(self.kinds, dims, strict=False) if dim is not None}
        self.possible = "offsets" not in batched and not (self.groups and "lengths" in batched)
        if not self.possible:
            return
        arguments = [self.put(v, d, kind) for v, d, kind in zip(tensors, dims, self.kinds, strict=False)]
        weights = list(zip(tensors[first:], dims[first:], strict=True))
        self.weights = len(weights)
        if self.groups:
            arguments += [sample(v, dim, i) for i in range(n) for v, dim in weights]
            spec = replace(plan.spec, reverse=plan.spec.reverse * n)
            self.plan, self.B = replace(plan, spec=spec, text=spec.encode(), models=plan.models * n), B
        else:
            arguments += [v for v, _ in weights]
            self.plan, self.B = plan, B * n
        self.args = arguments

    def axis(self, kind: str) -> int:
        """Where n goes: before the groups, or behind the rows or the batch."""
        if self.groups:
            return 0 if kind == "state" else 1
        return 2 if kind == "state" else 1

    def put(self, v: Tensor, dim: int | None, kind: str) -> Tensor:
        n = self.n
        if kind == "offsets":
            return v if self.groups else v * n
        if kind == "lengths":
            if self.groups:
                return v
            return (v.unsqueeze(1).expand(-1, n) if dim is None else v.movedim(dim, 1)).reshape(-1)
        if v.dim() - (dim is not None) == 1:  # absent
            return v.new_empty(0)
        axis = self.axis(kind)
        v = v.unsqueeze(axis).expand(*v.shape[:axis], n, *v.shape[axis:]) if dim is None else v.movedim(dim, axis)
        return v.flatten(axis, axis + 1) if self.groups else v.flatten(axis - 1, axis)

    def take(self, v: Tensor | None, kind: str) -> tuple[Tensor | None, int | None]:
        """The inverse of `put`: a tensor with a batch dimension, and where that is."""
        if v is None or v.dim() == 1:
            return v, None
        axis = self.axis(kind)
        if self.groups:
            return v.unflatten(axis, (self.n, v.shape[axis] // self.n)), axis
        return v.unflatten(axis - 1, (v.shape[axis - 1] // self.n, self.n)), axis

    def split_outputs(self, outputs: Sequence[Tensor]) -> Mapped:
        taken = [self.take(v, kind) for v, kind in zip(outputs, self.outputs, strict=True)]
        return tuple(v for v, _ in taken), tuple(dim for _, dim in taken)

    def split_gradients(self, grads: Sequence[Tensor | None]) -> Mapped:
        """Gradients of x and of what follows it, those of the weights per sample."""
        taken = [self.take(v, kind) for v, kind in zip(grads, self.kinds, strict=False)]
        weights = grads[len(self.kinds) :]
        if self.groups:
            for k in range(self.weights):
                mine = [v for v in weights[k :: self.weights] if v is not None]
                taken.append((torch.stack(mine), 0) if mine else (None, None))
        else:
            inner = self.base.samples
            for v in weights:
                if v is not None and inner:
                    taken.append((v.unflatten(0, (inner, self.n)), 1))
                else:
                    taken.append((v, None if v is None else 0))
        return tuple(v for v, _ in taken), tuple(dim for _, dim in taken)
