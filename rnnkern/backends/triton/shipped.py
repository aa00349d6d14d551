"""Every kernel that automatic choice can launch, for a representative set of scans and for every entry of the table:
what a compile check compiles; and those of drivers that are only asked for by name where they would suit.

Made by the code that makes launches, from tensors without memory, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from rnnkern.backends.base import ScanInputs, ScanSpec, accumulation_dtype
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import TOGETHER, Target, shipped_table, suits_together
from rnnkern.backends.triton.drivers import plan_backward, plan_forward, question
from rnnkern.backends.triton.launch import TYPES, Launch
from rnnkern.backends.triton.slots import advance, names_of, write_table
from rnnkern.cells import CELLS

SIZES = (32, 64, 128, 200, 512, 1024)
BATCHES = (16, 256)
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", 942, 304),
}


class Shipped(NamedTuple):
    """What triton.compiler.ASTSource and triton.compile take, and a name."""

    name: str
    kernel: Any
    signature: dict[str, str]  # "*bf16", "i32", "constexpr", and a tuple of these for a tuple
    constexprs: dict[str, Any]
    options: dict[str, int]


def shipped(
    target: Target,
    sizes: Iterable[int] = SIZES,
    batches: Iterable[int] = BATCHES,
    cells: Iterable[str] = tuple(STEPS),
    dtypes: Iterable[torch.dtype] = tuple(TYPES),
    options: Iterable[tuple[str, torch.dtype]] | None = None,
) -> Iterator[Shipped]:
    """Each kernel once, however many scans launch it; of the table's entries all, whatever else is asked for.

    `options` are the cells and dtypes whose scans with options are among them; None: all that were asked for.
    """
    seen = set()
    if options is None:
        options = tuple(product(cells, dtypes))
    optioned = with_options(target, options, sizes, batches)
    for name, one in (*launches(target, cells, dtypes, sizes, batches), *optioned):
        key = (one.kernel, *one.compiled_constants().items(), *one.signature().items(), *one.options.items())
        if key not in seen:
            seen.add(key)
            yield Shipped(f"{name} {one.name}", one.kernel, one.signature(), one.compiled_constants(), one.options)
    for count in sorted({len(names_of(len(CELLS[cell].states) - 1)) for cell in STEPS}):
        signature = {"table": "*i64", "words": ("i64",) * count, "COUNT": "constexpr"}
        yield Shipped("write_table", write_table, signature, {"COUNT": count}, {})  # type: ignore[arg-type]
    yield Shipped("advance", advance, {"table": "*i64", "count": "i32"}, {}, {})


def launches(
    target: Target, cells: Iterable[str], dtypes: Iterable[torch.dtype], sizes: Iterable[int], batches: Iterable[int]
) -> Iterator[tuple[str, Launch]]:
    for cell, dtype, H, B in product(cells, dtypes, sizes, batches):
        yield from _of_one(target, cell, dtype, H, B, "plain")
        if cell == "lstm" and H == 512:
            yield from _of_one(target, cell, dtype, H, B, "projected")
        if H in (64, 512):
            yield from _of_one(target, cell, dtype, H, B, "rich")
    named = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES}
    for (name, processors, cell, kind, _, _, H), found in shipped_table().items():
        if name == target.name:
            for B, _ in found:
                yield from _of_one(replace(target, processors=processors), cell, named[kind], H, B, "plain")


def with_options(
    target: Target, kinds: Iterable[tuple[str, torch.dtype]], sizes: Iterable[int], batches: Iterable[int]
) -> Iterator[tuple[str, Launch]]:
    """Scans with all options at once, for one option more is some registers more; without and under layer norm."""
    for (cell, dtype), H, B in product(kinds, sizes, batches):
        if H in (64, 512):
            yield from _of_one(target, cell, dtype, H, B, "options")
        if H == 512:
            yield from _of_one(target, cell, dtype, H, B, "norm")
        if H == 512 and cell == "lstm" and dtype == torch.bfloat16:
            yield from _of_one(target, cell, dtype, H, B, "norm projected")


def _of_one(target: Target, cell: str, dtype: torch.dtype, H: int, B: int, kind: str) -> Iterator[tuple[str, Launch]]:
    title = f"{cell} {str(dtype).removeprefix('torch.')} H{H} B{B} {kind}"
    simple = kind in ("plain", "projected")
    for precision in ("ieee", "tf32") if dtype == torch.float32 and (simple or kind == "rich") else ("ieee",):
        for save in ("all", "none") if simple else ("all",):
            inputs = _inputs(cell, dtype, H, B, kind, save, precision)
            for driver in _drivers(inputs, "forward", target, kind):
                outputs, program = plan_forward(inputs, target, driver)
                for one in program.launches:
                    yield f"{title} {precision} save={save}", one
            if save == "none":
                continue
            for driver in _drivers(inputs, "backward", target, kind):
                given = outputs.y, outputs.final, outputs.seq
                _, program = plan_backward(inputs, outputs, *given, target, driver)
                for one in program.launches:
                    yield f"{title} {precision}", one


def _drivers(inputs: ScanInputs, direction: str, target: Target, kind: str) -> list[str | None]:
    asked, dtype = question(inputs, direction, target), inputs.gx.dtype
    # A kernel in Gluon takes seconds to compile: one of those that differ in little.
    alike = dtype == torch.float16 or asked.cell == "rnn_relu" or inputs.spec.save == "none" or asked.H < 200
    named = (d for d in TOGETHER if kind == "plain" and not (d == "gluon" and alike))
    return [None, *(d for d in named if suits_together(asked, d))]


def _inputs(cell: str, dtype: torch.dtype, H: int, B: int, kind: str, save: str, precision: str) -> ScanInputs:
    """A scan as far as plans look at it: of one direction, with a projection, or with what a plain one has not (both
    directions, packed rows, resets to learned states), or as rich a one with options, or under layer norm too."""
    projected, several = kind.endswith("projected"), kind not in ("plain", "projected")
    T, G, N, P = 100, len(CELLS[cell].gates), 1 + several, H // 4 if projected else H
    wide = accumulation_dtype(dtype)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states = (new(N, B, P), *(new(N, B, H, dtype=wide) for _ in CELLS[cell].states[1:]))
    names = ("w_hh", "b_hh", *(("w_hr",) if projected else ()))
    params = (new(*CELLS[cell].recurrent_shape(H, P)), new(G * H), *((new(P, H),) if projected else ()))
    scan = ScanSpec(cell, (False, True)[:N], names, save=save, precision=precision)
    inputs = ScanInputs(scan, T, B, new(T * B, N, G * H), states, (params,) * N)
    if several:
        inputs.offsets, inputs.lengths = new(T, dtype=torch.int64), new(B, dtype=torch.int64)
        inputs.reset, inputs.reset_states = new(T * B, N, dtype=torch.bool), states
    return inputs if kind in ("plain", "projected", "rich") else _optioned(inputs, kind.startswith("norm"))


def _optioned(inputs: ScanInputs, norm: bool) -> ScanInputs:
    """With every mask, bound and elementwise parameter that there is, those of layer norm only with `norm`."""
    spec, cell, (S, N, width), B = inputs.spec, CELLS[inputs.spec.cell], inputs.gx.shape, inputs.B
    H, P, two = width // len(cell.gates), inputs.states[0].shape[2], cell.has_c
    sizes = {"h": (N, B, P), "h_step": (S, N, P), "zoneout_h": (S, N, P), "zoneout_c": (S, N, H)}
    zoned = {"zoneout_h": not cell.scaled, "zoneout_c": two}  # calls refuse zoneout of a scaled cell
    masks = [name for name in sizes if zoned.get(name, True)] + list(cell.masks)
    small = tuple(name for name in ("ln_hh", *cell.small) if norm or name not in ("ln_hh", *cell.row))
    more = tuple(inputs.gx.new_empty(width if name == "ln_hh" else H) for name in small)
    projected = float("w_hr" in spec.params)
    bounds: dict[str, Any] = {"cell_clip": 1.0 if two else 0.0, "proj_clip": projected, "grad_clip": 1.0}
    spec = replace(spec, params=(*spec.params, *small), noise=tuple(masks), scales=(1.0,) * len(masks), **bounds)
    noise = tuple(torch.empty(sizes.get(name, (S, N, H)), dtype=torch.bool, device="meta") for name in masks)
    return replace(inputs, spec=spec, params=tuple((*group, *more) for group in inputs.params), noise=noise)
