"""Before automatic choice trusts kernels of this backend on a device, they show there, once, that they are right.

Triton compiles anew for every device, version and dtype, and what one combination miscompiles no test elsewhere can
see. So the first call of a kind runs small scans through both drivers, forward and backward, and compares them with the
reference in fp64. That takes the time of a few compilations. Where it fails, a warning says so and torch's own kernels
are taken. Kernels that are asked for by name are not put to the test.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends.base import ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.backends.reference import BACKEND as REFERENCE
from rnnkern.cells import CELLS

WIDTHS = (13, 144)  # one for each driver
STEPS, ROWS = 9, 5  # more steps than the shortest graph has
FACTOR, FLOOR = 4, 16  # times the reference's own error in that dtype, and times eps


def trusted(device: torch.device, cell: str, dtype: torch.dtype, precision: str) -> bool:
    """Whether the kernels gave the right numbers here. False, for the time being, while a CUDA graph is recorded."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return not failure(device, cell, dtype, precision)


@lru_cache(maxsize=256)
def failure(device: torch.device, cell: str, dtype: torch.dtype, precision: str) -> str:
    """What went wrong in the trial; empty: nothing."""
    from rnnkern.backends.triton import BACKEND

    try:
        with torch.no_grad():
            for width in WIDTHS:
                _compare(BACKEND, problem(cell, dtype, precision, width), device)
    except Exception as error:  # a compiler's, a driver's, or ours: all mean the same here
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"rnnkern's Triton kernels failed a trial of {cell} in {dtype} on {device}, so torch's kernels run: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return why
    return ""


def problem(cell: str, dtype: torch.dtype, precision: str, H: int) -> ScanInputs:
    """Two directions over rows of several lengths, on the CPU."""
    generator = torch.Generator().manual_seed(H)
    spec, T, B, N = CELLS[cell], STEPS, ROWS, 2
    G, wide = len(spec.gates), accumulation_dtype(dtype)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    states = (normal(N, B, H), *(normal(N, B, H, dtype=wide) for _ in spec.states[1:]))
    params = tuple((normal(G * H, H, scale=H**-0.5), normal(G * H, scale=0.1)) for _ in range(N))
    scan = ScanSpec(cell, (False, True), ("w_hh", "b_hh"), precision=precision)
    lengths = torch.tensor([T, 1, T - 3, T, 2])
    return ScanInputs(scan, T, B, normal(T * B, N, G * H), states, params, lengths=lengths)


def _compare(backend: Any, inputs: ScanInputs, device: torch.device) -> None:
    truth = _results(REFERENCE, _moved(inputs, dtype=torch.float64))
    yardstick = _results(REFERENCE, inputs)
    ours = _results(backend, _moved(inputs, device=device))
    eps = torch.finfo(torch.bfloat16 if inputs.spec.precision == "tf32" else inputs.gx.dtype).eps
    for (name, a), (_, b), (_, c) in zip(ours, yardstick, truth, strict=True):
        a, b = a.cpu().double(), b.double()
        bound = (FACTOR * (b - c).abs().max() + FLOOR * eps * c.abs().max()).item()
        error = (a - c).abs().max().item()
        if not error <= bound:  # NaN is no small error
            raise ArithmeticError(f"{name}, H={inputs.states[0].shape[2]}: error {error:.2e} above {bound:.2e}")


def _results(backend: Any, inputs: ScanInputs) -> list[tuple[str, Tensor]]:
    """Outputs and gradients by name; planes only count through the gradients."""
    out: ScanOutputs = backend.forward(inputs)
    dy = torch.ones_like(out.y)
    dfinal = tuple(torch.ones_like(v) for v in out.final)
    dseq = tuple(v.new_empty(0) for v in out.seq)
    grads = backend.backward(inputs, replace(out, final=()), dy, dfinal, dseq)
    found = [("y", out.y), *((f"final[{k}]", v) for k, v in enumerate(out.final)), ("dgx", grads.dgx)]
    if grads.dgh.numel():
        found.append(("dgh", grads.dgh))
    return [*found, *((f"dstates[{k}]", v) for k, v in enumerate(grads.dstates))]


def _moved(inputs: ScanInputs, device: torch.device | None = None, dtype: torch.dtype | None = None) -> ScanInputs:
    """The same numbers on another device or in another floating-point dtype."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        if isinstance(value, tuple) and not isinstance(value, ScanSpec):
            return tuple(move(v) for v in value)
        return value

    return replace(inputs, **{name: move(getattr(inputs, name)) for name in _names(inputs)})


def _names(inputs: ScanInputs) -> Iterator[str]:
    return (field.name for field in fields(inputs) if field.name != "spec")
