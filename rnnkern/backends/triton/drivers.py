"""The host's half of the drivers: from a scan to the launches that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs
from rnnkern.backends.triton import batch_parallel_kernels as whole
from rnnkern.backends.triton import per_step_backward as single_backward
from rnnkern.backends.triton import per_step_kernels as single
from rnnkern.backends.triton import persistent_kernels
from rnnkern.backends.triton.config import (
    TOGETHER,
    Config,
    Question,
    Target,
    awaited,
    choose,
    handed_over,
    power_of_two,
    precision,
)
from rnnkern.backends.triton.interpreter import INTERPRETED
from rnnkern.backends.triton.launch import Launch, launch
from rnnkern.backends.triton.lost import LOST
from rnnkern.backends.triton.options import options_of
from rnnkern.backends.triton.slots import names_of
from rnnkern.backends.triton.work import Work
from rnnkern.cells import CELLS

# May begin anywhere and have any strides: promised apart.
_STRIDED = {"gx": "GX_ALIGNED", "dy": "DY_ALIGNED"}

# Reads in vain before a partner counts as lost: about half a second, at a trip to the second-level cache each.
PATIENCE = 1 << 19


class Program(NamedTuple):
    """What a scan launches: all of `launches` once, or, with a table of `words`, for every one of `steps`."""

    launches: tuple[Launch, ...]
    steps: int = 1
    words: dict[str, Tensor | int] | None = None
    waits: bool = False  # whether programs wait for each other
    small: Callable[[], tuple[tuple[Tensor, ...], ...]] | None = None  # of a backward, when all has run: `dsmall`


def question(inputs: ScanInputs, direction: str, target: Target) -> Question:
    spec, gates = inputs.spec, len(CELLS[inputs.spec.cell].gates)
    N, width = inputs.gx.shape[1:]
    H, P = width // gates, inputs.states[0].shape[2]
    dtype, project = inputs.gx.dtype, "w_hr" in spec.params
    exact = precision(spec.precision, dtype, target) == "tf32x3"
    dense = CELLS[spec.cell].dense
    return Question(
        spec.cell, gates, dtype, direction, inputs.B, H, P, N, project, target, exact, options_of(spec), dense
    )


def plan_forward(inputs: ScanInputs, target: Target, driver: str | None = None) -> tuple[ScanOutputs, Program]:
    work = Work(inputs, target)
    out = work.outputs()
    if work.nothing:
        return out, Program(())
    asked = question(inputs, "forward", target)
    config = choose(asked, driver)
    if config.driver == "batch_parallel":
        return out, _whole(work, whole.forward_scan, config)
    if config.driver in TOGETHER:
        work.to_be_awaited(out.y)
        return out, _sliced(work, asked, config, ("y", "h0", "restart_h"))
    if work.project:
        saved = out.hidden if out.hidden.numel() else _scratch(work, work.H, work.dtype)
        work.arguments["hidden"] = saved
    if work.rows:
        work.arguments["product"] = _scratch(work, len(work.cell.gates) * work.H, work.acc)
    table = _table(work)
    if work.rows:
        launches = [_single(work, single.product_step, config, len(work.cell.gates) * work.H)]
        launches.append(_of_rows(work, single.forward_step, config))
    else:
        launches = [_single(work, single.forward_step, config, work.H)]
    if work.project:
        launches.append(_single(work, single.project_step, config, work.P))
    return out, Program(tuple(launches), inputs.T, table)


def plan_backward(
    inputs: ScanInputs,
    outputs: ScanOutputs,
    dy: Tensor,
    dfinal: tuple[Tensor, ...],
    dseq: tuple[Tensor, ...],
    target: Target,
    driver: str | None = None,
) -> tuple[ScanGrads, Program]:
    work = Work(inputs, target)
    grads = work.gradients(outputs, dy, dfinal, dseq)
    if work.nothing:
        return grads, Program((), small=work.of_small)
    asked = question(inputs, "backward", target)
    config = choose(asked, driver)
    if config.driver == "batch_parallel":
        return grads, _whole(work, whole.backward_scan, config)._replace(small=work.of_small)
    if config.driver in TOGETHER:
        work.to_be_awaited(work.arguments["dgh"])
        return grads, _sliced(work, asked, config, ("dgh",))
    if work.mixes_h:
        work.arguments["carry"] = _scratch(work, work.P, work.acc)
    if grads.dreset_states and work.acc != work.dtype:  # a sum over steps is made in the accumulation dtype
        wide = torch.zeros_like(grads.dreset_states[0], dtype=work.acc)
        grads.dreset_states = (wide, *grads.dreset_states[1:])
        work.arguments["drestart_h"] = wide
    if work.rows:
        work.arguments["dhidden"] = _scratch(work, work.H, work.acc)
    table = _table(work)
    launches = [_single(work, single_backward.backward_step, config, work.P)]
    if work.project:
        launches.append(_single(work, single_backward.backward_cell_step, config, work.H))
    if work.rows:
        launches.append(_of_rows(work, single_backward.backward_row_step, config))
    return grads, Program(tuple(launches), inputs.T + 1, table, small=work.of_small)


def _scratch(work: Work, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((work.N, work.inputs.B, width), dtype=dtype, device=work.inputs.gx.device)


def _whole(work: Work, kernel: object, config: Config) -> Program:
    constants = work.constants | {"CELL": _cell(work, kernel), "BLOCK_B": config.block_b, "BLOCK_H": config.block_h}
    grid = (-(-work.inputs.B // config.block_b), 1 if work.cell.dense else -(-work.H // config.block_h), work.N)
    return Program((launch(kernel, grid, config.options(work.target), constants, work.arguments),))


def _together(driver: str) -> Any:
    """The module with the kernels whose programs wait for each other."""
    if driver == "gluon":  # not at the top: there are Tritons without Gluon
        from rnnkern.backends.triton import gluon_kernels

        return gluon_kernels
    return persistent_kernels


def _sliced(work: Work, asked: Question, config: Config, read: tuple[str, ...]) -> Program:
    """`read` are the tensors of which programs read each other's rows."""
    device, found, of = work.inputs.gx.device, awaited(asked, config), _together(config.driver)
    kernel = of.forward_together if asked.direction == "forward" else of.backward_together
    starts = tuple(sum(found[:k]) for k in range(len(found)))
    constants = work.constants | {
        "CELL": _cell(work, kernel),
        "TILE": of.tile,
        "WEIGHTS": of.weights,
        "PRODUCTS": of.products,
        "STARTS": starts,
        "PARTS": found,
        "WORD": _word(handed_over(asked) * work.dtype.itemsize, [work.arguments[name] for name in read]),
        "RELAXED": work.target.kind == "cuda" and not INTERPRETED,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "SLICES": config.warps,
    }
    arguments = work.arguments | {"lost": LOST.flag(device), "patience": PATIENCE}
    grid = (-(-work.H // config.block_h), -(-work.inputs.B // config.block_b), work.N)
    # Refused at launch where the programs cannot all run at once.
    options = config.options(work.target) | {"launch_cooperative_grid": True}
    return Program((launch(kernel, grid, options, constants, arguments),), waits=True)


def _word(row: int, tensors: list[Tensor | None]) -> tl.dtype:
    """The widest integer that rows of `row` bytes are whole numbers of, wherever these tensors begin."""
    ends = [row, *(t.data_ptr() for t in tensors if t is not None)]
    fitting = (w for w in (tl.int64, tl.int32) if not any(end % (w.primitive_bitwidth // 8) for end in ends))
    return next(fitting, tl.int16)


def _single(work: Work, kernel: object, config: Config, width: int) -> Launch:
    tiles = {"BLOCK_B": config.block_b, "BLOCK_H": config.block_h, "BLOCK_K": config.block_k}
    grid = (-(-work.inputs.B // config.block_b), -(-width // config.block_h), work.N)
    return launch(kernel, grid, config.options(work.target), work.constants | {"CELL": _cell(work, kernel)} | tiles)


def _of_rows(work: Work, kernel: object, config: Config) -> Launch:
    """Of programs that hold whole rows."""
    width = power_of_two(work.H)
    rows = max(1, 512 // width)
    warps = max(4, width // 128)
    tiles = {"BLOCK_B": rows, "BLOCK_H": width, "BLOCK_K": 16}
    grid = (-(-work.inputs.B // rows), 1, work.N)
    options = replace(config, warps=warps, stages=1).options(work.target)
    return launch(kernel, grid, options, work.constants | {"CELL": _cell(work, kernel)} | tiles)


def _cell(work: Work, kernel: Any) -> object:
    return work.step.step if kernel.__name__.startswith("forward") else work.step.step_backward


def _table(work: Work) -> dict[str, Tensor | int]:
    """What the table shall hold, 0 for what is not there; constants that promise alignment follow from it."""
    given = ((name, work.arguments.get(name)) for name in names_of(work.rest))
    found = {name: 0 if value is None else value for name, value in given}
    work.constants["ALIGNED"] = True
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.data_ptr() % 16 == 0 or value.dtype in (torch.int32, torch.int64):
            continue
        work.constants[_STRIDED.get(name, "ALIGNED")] = False
    return found
