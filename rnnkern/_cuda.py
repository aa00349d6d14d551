"""Whether a call on a CUDA device is faster on Triton's kernels or on torch's, and why: plain Python, no Triton.

What was measured decides (`backends/triton/measured.json`, made from benchmark results); where nothing near a call was,
a size model does: time per step of each driver from operations, bytes and launches, against what is known of the cuDNN
algorithm that torch picks. The model is known to half and double, so it must favour Triton by more than that.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rnnkern.cells import CELLS

MEASURED = Path(__file__).parent / "backends" / "triton" / "measured.json"
NEAR = 2.0  # a measurement speaks for sizes within this factor of its own
MARGIN = 1.5  # by which the model must favour Triton
LONG = 128  # steps


class Device(NamedTuple):
    """What of a device the estimates read."""

    name: str
    processors: int  # SMs
    capability: tuple[int, int]
    hip: bool = False


class Call(NamedTuple):
    """What of a call the estimates read."""

    cell: str
    T: int
    B: int
    H: int
    dtype: torch.dtype
    I: int = 0  # 0: H
    layers: int = 1
    directions: int = 1
    packed: bool = False
    projected: bool = False
    gradient: bool = True
    tf32: bool = True  # whether fp32 products may be rounded to it


class Verdict(NamedTuple):
    take: str  # "triton" or "torch"; of cells that torch does not have, "triton" or "reference"
    why: str


@cache
def device_of(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.name, found.multi_processor_count, (found.major, found.minor), torch.version.hip is not None)


def verdict(call: Call, device: Device) -> Verdict:
    """What automatic choice takes for this call."""
    # In LONG steps what a call costs once is lost among them: all longer ones have one answer, found once.
    return _verdict(call._replace(T=min(call.T, LONG)), device)


@lru_cache(maxsize=4096)
def _verdict(call: Call, device: Device) -> Verdict:
    if device.hip:
        return Verdict("torch", "no kernel of ours was measured on an AMD device")
    if device.capability < (8, 0):
        return Verdict("torch", f"compute capability {device.capability[0]}.{device.capability[1]}: kernels need 8.0")
    found = measured(call, device)
    if found is not None:
        return found
    algorithm = cudnn_algorithm(call, device)
    theirs, ours = cudnn_step(call, device), {name: step(call, device) for name, step in DRIVERS.items()}
    possible = {name: time for name, time in ours.items() if time is not None}
    best = min(possible, key=lambda name: possible[name])
    why = f"not measured; estimated for a step: {best} {possible[best]:.1f} us, cuDNN's {algorithm} {theirs:.1f} us"
    faster = MARGIN * (OVERHEAD + call.T * possible[best]) < call.T * theirs
    return Verdict("triton" if faster else "torch", why)


# ---- measurements ----------------------------------------------------------------------------------------------------


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(MEASURED.read_text())["rows"])


def measured(call: Call, device: Device) -> Verdict | None:
    """By the nearest measurement on this kind of device, if there is one near enough."""
    mode = "training" if call.gradient else "inference"
    kind = (device.name, call.cell, precision(call), mode, call.layers > 1 or call.directions > 1, call.packed)
    nearest, best = None, math.log(NEAR) + 1e-9
    for row in _rows():
        if (row["device"], row["cell"], row["precision"], row["mode"], row["stacked"], row["packed"]) != kind:
            continue
        distance = max(abs(math.log(row[name] / getattr(call, name))) for name in ("H", "B"))
        if distance < best:
            nearest, best = row, distance
    if nearest is None:
        return None
    ratio = nearest["ratio"]
    why = f"measured at T={nearest['T']} B={nearest['B']} H={nearest['H']}: {ratio:.2f} of cuDNN's speed"
    return Verdict("triton" if ratio > 1 else "torch", why)


def precision(call: Call) -> str:
    words = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return words.get(call.dtype, "tf32" if call.tf32 else "fp32")


# ---- the size model: microseconds for a step -------------------------------------------------------------------------

CLOCK = 1755.0  # cycles a microsecond
LAUNCH = 1.3  # of a kernel in a CUDA graph
OVERHEAD = 100.0  # of a call of ours beyond torch's: launches from Python, before the graphs begin
L2 = 38.0  # bytes a cycle that each SM reads from the second cache
# Multiply-adds a cycle of one SM.
RATES = {"fp16": 2048.0, "bf16": 2048.0, "tf32": 1024.0, "fp32": 128.0, "fp64": 64.0}


def cudnn_algorithm(call: Call, device: Device) -> str:
    """The one that torch asks cuDNN for, by the rule of its RNN.cpp."""
    if call.packed or call.projected or call.dtype == torch.float64:
        return "STANDARD"
    small = (256 if call.gradient else 384) if call.cell.startswith("rnn") else (128 if call.gradient else 192)
    if call.H <= small:
        return "PERSIST_STATIC_SMALL_H"
    single = call.layers == 1 and call.directions == 1
    aligned = call.H % 128 == 0 and (call.I or call.H) % 128 == 0 and call.B % 8 == 0
    if call.dtype == torch.float16 and single and aligned and call.H <= 1024 and device.processors >= 98:
        fits = call.B < 96 or call.H < 896 if call.cell.startswith("rnn") else call.B <= 128
        if call.cell != "gru" and fits:
            return "PERSIST_STATIC"
    return "STANDARD"


def cudnn_step(call: Call, device: Device) -> float:
    """The least that is plausible: published for PERSIST_STATIC (H100, H=768, B=16), a guess for the others."""
    least = {"PERSIST_STATIC": (2.0, 5.1), "PERSIST_STATIC_SMALL_H": (1.0, 2.5), "STANDARD": (5.0, 11.0)}
    step = least[cudnn_algorithm(call, device)][call.gradient]
    return max(step, (1 + call.gradient) * call.directions * _product(call, device))


def _product(call: Call, device: Device) -> float:
    """The recurrent product of one direction on the whole device at half its peak."""
    work = len(CELLS[call.cell].gates) * call.B * call.H * call.H
    return work / (0.55 * RATES[precision(call)] * device.processors * CLOCK)


def per_step(call: Call, device: Device) -> float | None:
    """A launch, weights and states from the second cache, the product, for all directions at once."""
    weights = len(CELLS[call.cell].gates) * call.H * call.H * call.dtype.itemsize * call.directions
    read = weights / (L2 * device.processors * CLOCK)
    products = _product(call, device) * call.directions * (3 if precision(call) == "fp32" else 1)
    step = LAUNCH + 700 / CLOCK + max(read, products)
    return step * (2 if call.gradient else 1) * (2 if call.projected else 1)


def batch_parallel_h(gates: int, dtype: torch.dtype, backward: bool, hip: bool = False) -> int:
    """The largest H whose weights one program of the batch-parallel driver holds."""
    most = {2: 128, 4: 64, 8: 16}.get(dtype.itemsize, 0)
    if hip:
        return most // 2  # 64 KiB of local memory
    if backward and dtype == torch.float32 and gates == 4:
        return most // 2  # more registers than there are
    return most


def batch_parallel(call: Call, device: Device) -> float | None:
    """One program for 16 rows and all of H, its weights on chip: for small H only."""
    gates, rows = len(CELLS[call.cell].gates), 16
    if call.projected or call.H > batch_parallel_h(gates, call.dtype, call.gradient, device.hip):
        return None
    waves = math.ceil(math.ceil(call.B / rows) * call.directions / device.processors)
    width = 1 << (call.H - 1).bit_length()
    products = rows * gates * width * width / (0.5 * RATES[precision(call)])
    elementwise = rows * width * 2.5 * gates / 16  # exponentials and reciprocals, 16 a cycle
    barriers = 12 * 30
    return 1.5 * waves * (products + elementwise + barriers) / CLOCK * (2.5 if call.gradient else 1)


DRIVERS = {"batch_parallel": batch_parallel, "per_step": per_step}
