"""Before automatic choice trusts kernels of this backend on a device, they show there, once, that they are right.

Triton compiles anew for every device, version and dtype, and what one combination miscompiles no test elsewhere can
see. So the first call of a kind runs small scans through the drivers that it may be given, forward and backward, and
compares them with the reference in fp64. That takes the time of a few compilations. Where it fails, a warning says so
and torch's own kernels are taken. Kernels that are asked for by name are not put to the test.
"""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.backends.reference import BACKEND as REFERENCE
from rnnkern.backends.triton.config import shipped_table, tabled_drivers, target_of
from rnnkern.cells import CELLS, CellSpec

WIDTHS = (13, 144)  # one for each driver that the size model takes
WIDE = 200  # for those that only the table takes
STEPS, ROWS = 9, 5  # more steps than the shortest graph has
FACTOR, FLOOR = 4, 16  # times the reference's own error in that dtype, and times eps
Results = list[tuple[str, Tensor]]
Scan = TypeVar("Scan", ScanInputs, ScanOutputs)


def trusted(device: torch.device, cell: str, dtype: torch.dtype, precision: str, options: bool = False) -> bool:
    """Whether the kernels gave the right numbers here. False, for the time being, while a CUDA graph is recorded."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return not failure(device, cell, dtype, precision, options)


@lru_cache(maxsize=256)
def failure(device: torch.device, cell: str, dtype: torch.dtype, precision: str, options: bool) -> str:
    """What went wrong in the trial; empty: nothing."""
    from rnnkern.backends.triton import BACKEND

    try:
        with torch.no_grad():
            for width in WIDTHS:
                _compare(BACKEND, problem(cell, dtype, precision, width, options), device)
            if options:  # under layer norm a step is made of other kernels
                _compare(BACKEND, problem(cell, dtype, precision, WIDTHS[-1], options, norm=True), device)
                return ""
            for driver in sorted(tabled_drivers(shipped_table(), target_of(device), cell, dtype)):
                _compare(BACKEND, problem(cell, dtype, precision, WIDE), device, driver)
    except Exception as error:  # a compiler's, a driver's, or ours: all mean the same here
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"rnnkern's Triton kernels failed a trial of {cell} in {dtype}{' with options' if options else ''} on "
            f"{device}, so others run: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
        return why
    return ""


def problem(
    cell: str, dtype: torch.dtype, precision: str, H: int, options: bool = False, norm: bool = False
) -> ScanInputs:
    """Two directions over rows of several lengths, on the CPU; `options`: with every mask, bound and elementwise
    parameter that the cell has, those of layer norm only with `norm`."""
    generator = torch.Generator().manual_seed(H)
    spec, T, B, N = CELLS[cell], STEPS, ROWS, 2
    G, wide = len(spec.gates), accumulation_dtype(dtype)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    states = natural(spec, (normal(N, B, H), *(normal(N, B, H, dtype=wide) for _ in spec.states[1:])))
    params = tuple((normal(*spec.recurrent_shape(H, H), scale=H**-0.5), normal(G * H, scale=0.1)) for _ in range(N))
    scan = ScanSpec(cell, (False, True), ("w_hh", "b_hh"), precision=precision)
    lengths = torch.tensor([T, 1, T - 3, T, 2])
    found = ScanInputs(scan, T, B, normal(T * B, N, G * H), states, params, lengths=lengths)
    if not options:
        return found
    small = tuple(name for name in ("ln_hh", *spec.small) if norm or name not in ("ln_hh", *spec.row))
    found.params = tuple(
        (*group, *(normal(G * H if name == "ln_hh" else H) for name in small)) for group in found.params
    )
    masks = ("h", "h_step", "zoneout_h", *(("zoneout_c",) if spec.has_c else ()), *spec.masks)
    found.noise = tuple(
        torch.rand((N, B, H) if name == "h" else (T * B, N, H), generator=generator) < 0.7 for name in masks
    )
    found.spec = replace(
        scan,
        params=(*scan.params, *small),
        noise=masks,
        scales=tuple(1.0 if name.startswith("zoneout") else 1 / 0.7 for name in masks),
        # In 16 bits c is often as near to a bound as its rounding: which side it is on is then nobody's error.
        cell_clip=0.0 if not spec.has_c else 2.0 if dtype.itemsize > 2 else 64.0,
        grad_clip=2.0,
    )
    return found


def natural(spec: CellSpec, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random numbers as states: what a cell divides by, as sLSTM does by its n, is not near 0."""
    return tuple(s.abs() + 1 if name == "n" else s for name, s in zip(spec.states, states, strict=True))


def _compare(backend: Any, inputs: ScanInputs, device: torch.device, driver: str | None = None) -> None:
    truth, yardstick = _both(REFERENCE, moved(inputs, dtype=torch.float64)), _both(REFERENCE, inputs)
    within(_both(backend, moved(inputs, device=device), *filter(None, [driver])), yardstick, truth, inputs)


def within(ours: Results, yardstick: Results, truth: Results, inputs: ScanInputs) -> None:
    """
    Raises:
        ArithmeticError: one of ours is further from the truth than the yardstick allows.
    """
    eps = torch.finfo(torch.bfloat16 if inputs.spec.precision == "tf32" else inputs.gx.dtype).eps
    for (name, a), (_, b), (_, c) in zip(ours, yardstick, truth, strict=True):
        a, b = a.to(c.device).double(), b.double()
        bound = (FACTOR * (b - c).abs().max() + FLOOR * eps * c.abs().max()).item()
        error = (a - c).abs().max().item()
        if not error <= bound:  # NaN is no small error
            raise ArithmeticError(f"{name}, H={inputs.states[0].shape[2]}: error {error:.2e} above {bound:.2e}")


def _both(backend: Any, inputs: ScanInputs, *driver: str) -> Results:
    out: ScanOutputs = backend.forward(inputs, *driver)
    return [*of_forward(out), *of_backward(backward(backend, inputs, out, *driver))]


def backward(backend: Any, inputs: ScanInputs, out: ScanOutputs, *driver: str) -> ScanGrads:
    """Of the sum of all outputs."""
    dy, dfinal = torch.ones_like(out.y), tuple(torch.ones_like(v) for v in out.final)
    dseq = tuple(v.new_empty(0) for v in out.seq)
    return backend.backward(inputs, replace(out, final=()), dy, dfinal, dseq, *driver)


def of_forward(out: ScanOutputs) -> Results:
    """What counts of it, by name; planes do through the gradients."""
    return [("y", out.y), *((f"final[{k}]", v) for k, v in enumerate(out.final))]


def of_backward(grads: ScanGrads) -> Results:
    dgh = [("dgh", grads.dgh)] if grads.dgh.numel() else []
    small = [(f"dsmall[{n}][{k}]", v) for n, group in enumerate(grads.dsmall) for k, v in enumerate(group)]
    return [("dgx", grads.dgx), *dgh, *((f"dstates[{k}]", v) for k, v in enumerate(grads.dstates)), *small]


def moved(scan: Scan, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Scan:
    """The same numbers on another device or in another floating-point dtype."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value

    return replace(scan, **{field.name: move(getattr(scan, field.name)) for field in fields(scan)})
