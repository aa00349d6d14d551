"""The opaque ops of the library, and their fakes. Nothing else registers ops.

A scan forward, a scan backward, a layer forward, for backends that do the input projection within the scan, and a whole
plain call of which no gradient comes: one op with few arguments, for it may be shorter than the way to an op.

Opaque to torch.compile, torch.export and dispatch modes, and without derivatives of their own: those belong to the
layer (autograd.py). Every option travels in the one string `spec` (ScanSpec.encode), so the schemas never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rnnkern import _call, _fast, dispatch
from rnnkern._plan import shape_only
from rnnkern._run import run_forward
from rnnkern.backends.base import ScanInputs, ScanOutputs, ScanSpec
from rnnkern.cells import CELLS

Tensors = Sequence[Tensor]

_SCAN = "Tensor[] states, Tensor[] params, Tensor? offsets, Tensor? lengths, Tensor? reset, Tensor[] reset_states, "
_FORWARD = f"(str spec, str backend, SymInt T, SymInt B, Tensor gx, {_SCAN}Tensor[] noise) -> Tensor[]"
_LAYER = (
    "(str spec, str backend, SymInt T, SymInt B, Tensor x, Tensor[] w_ih, Tensor[] b_ih, "
    f"{_SCAN}Tensor[] noise) -> Tensor[]"
)
_BACKWARD = (
    "(str spec, str backend, SymInt T, SymInt B, Tensor[] grads, Tensor y, Tensor[] seq, Tensor planes, Tensor hidden, "
    f"{_SCAN}Tensor[] noise) -> Tensor[]"
)
_INFERENCE = (
    "(str cell, Tensor input, Tensor[] hx, Tensor[] params, bool bias, int layers, bool bidirectional) -> Tensor[]"
)


def by_group(flat: Tensors, groups: int) -> tuple[tuple[Tensor, ...], ...]:
    """A flat list of every group's tensors as one tuple per group."""
    size = len(flat) // groups
    return tuple(tuple(flat[n * size : (n + 1) * size]) for n in range(groups))


def has_own_gradient(spec: ScanSpec, name: str) -> bool:
    """Whether the scan itself sums this parameter's gradient (the others are GEMMs of the layer)."""
    return name == "ln_hh" or name in CELLS[spec.cell].small


def _inputs(
    spec: str,
    T: int,
    B: int,
    gx: Tensor,
    states: Tensors,
    params: Tensors,
    offsets: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_states: Tensors,
    noise: Tensors,
) -> ScanInputs:
    decoded = ScanSpec.decode(spec)
    groups = by_group(params, len(decoded.reverse))
    return ScanInputs(
        decoded, T, B, gx, tuple(states), groups, offsets, lengths, reset, tuple(reset_states), tuple(noise)
    )


def _scan_forward(spec: str, backend: str, T: int, B: int, gx: Tensor, *rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
    inputs = _inputs(spec, T, B, gx, *rest)
    return _flat(inputs.spec, dispatch.backend(backend).forward(inputs))


def _flat(spec: ScanSpec, out: ScanOutputs) -> list[Tensor]:
    """As the fakes promise them: contiguous, and absent ones alias nothing; what nobody keeps is left out."""
    save, y = spec.save, out.y.contiguous()
    if save == "none":
        return [y, *(final.contiguous() for final in out.final)]
    planes = out.planes[:, :, : len(CELLS[spec.cell].planes)] if out.planes.dim() > 1 else out.planes
    if save == "all" and planes.dim() == 1:  # a backend's layer_forward leaves out a plane that is the output
        planes = y.unsqueeze(2).clone()
    return [
        y,
        *(final.contiguous() for final in out.final),
        *(seq.contiguous() for seq in out.seq),
        planes.contiguous() if save == "all" else y.new_empty(0),
        out.hidden.contiguous() if "w_hr" in spec.params else y.new_empty(0),
    ]


def _scan_forward_fake(spec: str, backend: str, T: int, B: int, gx: Tensor, states: Tensors, *rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
    decoded = ScanSpec.decode(spec)
    cell, save, projected = CELLS[decoded.cell], decoded.save, "w_hr" in decoded.params
    S, N, width = gx.shape
    H = width // len(cell.gates)
    needed = [gx.new_empty(S, N, states[0].shape[-1]), *(state.new_empty(state.shape) for state in states)]
    if save == "none":
        return needed
    return [
        *needed,
        *(state.new_empty(S, N, H) for state in states[1:]),
        gx.new_empty((S, N, len(cell.planes), H) if save == "all" else 0),
        gx.new_empty((S, N, H) if projected else 0),
    ]


def _layer_forward(  # type: ignore[no-untyped-def]
    spec: str, backend: str, T: int, B: int, x: Tensor, w_ih: Tensors, b_ih: Tensors, *rest
) -> list[Tensor]:
    inputs = _inputs(spec, T, B, shape_only(x, x.shape[0], len(w_ih), w_ih[0].shape[0]), *rest)
    biases = tuple(b_ih) or (None,) * len(w_ih)
    return _flat(inputs.spec, run_forward(backend, inputs, x, tuple(w_ih), biases, x.shape[1]))


def _layer_forward_fake(  # type: ignore[no-untyped-def]
    spec: str, backend: str, T: int, B: int, x: Tensor, w_ih: Tensors, b_ih: Tensors, *rest
) -> list[Tensor]:
    return _scan_forward_fake(spec, backend, T, B, shape_only(x, x.shape[0], len(w_ih), w_ih[0].shape[0]), *rest)


def _scan_backward(  # type: ignore[no-untyped-def]
    spec: str,
    backend: str,
    T: int,
    B: int,
    grads: Tensors,
    y: Tensor,
    seq: Tensors,
    planes: Tensor,
    hidden: Tensor,
    states: Tensors,
    params: Tensors,
    *rest,
) -> list[Tensor]:
    S, N = y.shape[:2]
    gx = y.new_empty(()).expand(S, N, params[0].shape[0])
    inputs = _inputs(spec, T, B, gx, states, params, *rest)
    outputs = ScanOutputs(y, (), tuple(seq), planes, hidden)
    dfinal, dseq = tuple(grads[1 : 1 + len(states)]), tuple(grads[1 + len(states) :])
    d = dispatch.backend(backend).backward(inputs, outputs, grads[0], dfinal, dseq)
    names, cell = inputs.spec.params, CELLS[inputs.spec.cell]
    return [
        d.dgx.contiguous(),
        d.dgh.contiguous() if cell.split else y.new_empty(0),
        d.dprod.contiguous() if "ln_hh" in names else y.new_empty(0),
        d.dh.contiguous() if "w_hr" in names else y.new_empty(0),
        *(v.contiguous() for v in (*d.dstates, *d.dreset_states)),
        *(v.contiguous() for group in d.dsmall for v in group),
    ]


def _scan_backward_fake(  # type: ignore[no-untyped-def]
    spec: str,
    backend: str,
    T: int,
    B: int,
    grads: Tensors,
    y: Tensor,
    seq: Tensors,
    planes: Tensor,
    hidden: Tensor,
    states: Tensors,
    params: Tensors,
    offsets: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_states: Tensors,
    noise: Tensors,
) -> list[Tensor]:
    decoded = ScanSpec.decode(spec)
    names, cell = decoded.params, CELLS[decoded.cell]
    S, N, P = y.shape
    gates = (S, N, params[0].shape[0])
    return [
        y.new_empty(gates),
        y.new_empty(gates if cell.split else 0),
        y.new_empty(gates if "ln_hh" in names else 0),
        y.new_empty((S, N, P) if "w_hr" in names else 0),
        *(v.new_empty(v.shape) for v in (*states, *reset_states)),
        *(
            v.new_empty(v.shape)
            for group in by_group(params, N)
            for name, v in zip(names, group, strict=True)
            if has_own_gradient(decoded, name)
        ),
    ]


def _inference(
    cell: str, input: Tensor, hx: Tensors, params: Tensors, bias: bool, layers: int, bidirectional: bool
) -> list[Tensor]:
    """A call as it is outside of graphs, with every short way that it has there."""
    input, states = input.contiguous(), tuple(hx) or None
    short = _fast.sequence(cell, input, states, params, bias, layers, 1 + bidirectional, False)
    if short is not None:
        return [short[0], *short[1]]
    with torch.no_grad():
        y, final, _ = _call.run(cell, input, states, params, bias, layers, 0.0, False, bidirectional, False)
    return [y.contiguous(), *(h.contiguous() for h in final)]


def _inference_fake(
    cell: str, input: Tensor, hx: Tensors, params: Tensors, bias: bool, layers: int, bidirectional: bool
) -> list[Tensor]:
    directions, H = 2 if bidirectional else 1, params[0].shape[0] // len(CELLS[cell].gates)
    T, B, P = *input.shape[:2], params[1].shape[1] if CELLS[cell].dense else H
    widths = (P, H)[: len(CELLS[cell].states)]
    final = [input.new_empty(layers * directions, B, width) for width in widths]
    return [input.new_empty(T, B, directions * P), *final]


class _NoGradient(torch.autograd.Function):
    """What an op gives, with a backward that says why there is none."""

    @staticmethod
    def forward(ctx: Any, below: Callable[[], Tensors], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "rnnkern's ops have no gradient of their own, and torch.export makes programs of ops, for inference: to "
            "train an exported program, export rnnkern.restore(model)"
        )


def _for_autograd(op: torch._ops.OpOverload, run: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """The op's kernel where autograd is: torch's own for ops without a derivative would only warn, and give none."""
    lists = [i for i, argument in enumerate(op._schema.arguments) if isinstance(argument.type, torch.ListType)]

    def below(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            if (keys & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _DEVICES:
                return run(*arguments)  # torch would only take the arguments apart and come back
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Tensors:
        for i in lists:
            if arguments[i] is None:  # what AOTInductor packages gives for an empty list
                arguments = (*arguments[:i], [], *arguments[i + 1 :])
        if torch.is_grad_enabled():
            tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
            if any(t.requires_grad for t in tensors):
                return list(_NoGradient.apply(partial(below, keys, arguments), *tensors))
        return below(keys, arguments)

    return kernel


_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_LIBRARY = torch.library.Library("rnnkern", "DEF")
for _name, _schema, _run, _fake in (
    ("scan_forward", _FORWARD, _scan_forward, _scan_forward_fake),
    ("layer_forward", _LAYER, _layer_forward, _layer_forward_fake),
    ("scan_backward", _BACKWARD, _scan_backward, _scan_backward_fake),
    ("inference", _INFERENCE, _inference, _inference_fake),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # any device: the reference is torch operations
    torch.library.register_fake(f"rnnkern::{_name}", _fake, lib=_LIBRARY)
    _op = getattr(torch.ops.rnnkern, _name).default
    _LIBRARY.impl(_name, _for_autograd(_op, _run), "Autograd", with_keyset=True)

scan_forward = torch.ops.rnnkern.scan_forward.default
layer_forward = torch.ops.rnnkern.layer_forward.default
scan_backward = torch.ops.rnnkern.scan_backward.default
inference = torch.ops.rnnkern.inference.default
