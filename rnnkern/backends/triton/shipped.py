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
from rnnkern.backends.triton.slots import NAMES, advance, write_table
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
) -> Iterator[Shipped]:
    """Each kernel once, however many scans launch it; of the table's entries all, whatever else is asked for."""
    seen = set()
    for name, one in launches(target, cells, dtypes, sizes, batches):
        key = (one.kernel, *one.compiled_constants().items(), *one.signature().items(), *one.options.items())
        if key not in seen:
            seen.add(key)
            yield Shipped(f"{name} {one.name}", one.kernel, one.signature(), one.compiled_constants(), one.options)
    words = ("i64",) * len(NAMES)
    yield Shipped("write_table", write_table, {"table": "*i64", "words": words, "COUNT": "constexpr"},  # type: ignore[dict-item]
                  {"COUNT": len(NAMES)}, {})  # fmt: skip
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


def _of_one(target: Target, cell: str, dtype: torch.dtype, H: int, B: int, kind: str) -> Iterator[tuple[str, Launch]]:
    title = f"{cell} {str(dtype).removeprefix('torch.')} H{H} B{B} {kind}"
    for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
        for save in ("all", "none") if kind != "rich" else ("all",):
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
    directions, packed rows, resets to learned states)."""
    T, G, N, P = 100, len(CELLS[cell].gates), 1 + (kind == "rich"), H // 4 if kind == "projected" else H
    wide = accumulation_dtype(dtype)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states = (new(N, B, P), *(new(N, B, H, dtype=wide) for _ in CELLS[cell].states[1:]))
    names = ("w_hh", "b_hh", *(("w_hr",) if kind == "projected" else ()))
    params = (new(*CELLS[cell].recurrent_shape(H, P)), new(G * H), *((new(P, H),) if kind == "projected" else ()))
    scan = ScanSpec(cell, (False, True)[:N], names, save=save, precision=precision)
    inputs = ScanInputs(scan, T, B, new(T * B, N, G * H), states, (params,) * N)
    if kind == "rich":
        inputs.offsets, inputs.lengths = new(T, dtype=torch.int64), new(B, dtype=torch.int64)
        inputs.reset, inputs.reset_states = new(T * B, N, dtype=torch.bool), states
    return inputs
