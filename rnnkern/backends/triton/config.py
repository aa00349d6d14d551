"""Which driver, and in what tiles: the table of measured configurations, and a size model for what it does not have.

No autotuning at run time: the same call takes the same kernels on every machine of a kind. Environment variable
RNNKERN_TRITON_CONFIG replaces single decisions, for experiments: "driver=per_step,block_b=16,block_h=32,warps=4".
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from typing import Any

import torch

from rnnkern._cuda import batch_parallel_h
from rnnkern.backends.triton.gluon_shim import unavailable
from rnnkern.backends.triton.options import NORMS, has
from rnnkern.cells import CELLS

DRIVERS = ("batch_parallel", "per_step", "persistent", "gluon")
TOGETHER = ("persistent", "gluon")  # those whose programs wait for each other
PASSES = ("forward", "backward")
VARIABLE = "RNNKERN_TRITON_CONFIG"
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB that one program may have

_LEAST = {"block_b": 4, "block_h": 16, "block_k": 16}  # rows are padded to what an instruction multiplies
# Of a thread of programs that wait for each other, by `_registers`: with more, kernels spill.
_MOST_REGISTERS = {"persistent": 176, "persistent, exact": 124, "gluon": 245}
_BOUNDS = {"block_b": (4, 64), "block_h": (8, 64), "block_k": (16, 4096)}  # least and most, of these
_TILES = (16, 32, 64)
_LARGEST = {2: 32, 4: 32, 8: 16}  # edge of a tile, by bytes of an element; larger ones spill
_SUMS = {2: 16384, 4: 1536, 8: 1024}  # sums of a program, likewise
_OPTIONED = 1024  # elements of a tile whose step has options: their values need registers too
_FIXED = 32768  # what a turn costs besides its reading, in bytes read: launching, the cell, the writes


@dataclass(frozen=True)
class Target:
    """What a choice depends on of a device."""

    kind: str  # "cuda" | "hip"
    arch: int  # 90 for compute capability 9.0; 942 for gfx942
    processors: int

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.kind == "cuda" else f"gfx{self.arch}"

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        return (_SHARED.get(self.arch, 48 if self.arch < 80 else 99) if self.kind == "cuda" else 64) * 1024


INTERPRETER = Target("cuda", 90, 132)  # any would do: it only chooses tiles


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        digits = properties.gcnArchName.partition(":")[0].removeprefix("gfx")
        return Target("hip", int(digits) if digits.isdecimal() else 0, properties.multi_processor_count)
    return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)


@dataclass(frozen=True)
class Config:
    driver: str
    block_b: int  # batch rows of a program
    block_h: int  # units of a program (batch_parallel: all of them, but with a diagonal recurrence)
    block_k: int  # width of a slice of the product (batch_parallel: all of it; TOGETHER: what is awaited at once)
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.driver not in DRIVERS:
            raise ValueError(f"driver {self.driver!r}: expected one of {', '.join(DRIVERS)}")
        for field in fields(self)[1:]:
            value, least, most = getattr(self, field.name), _LEAST.get(field.name, 1), 256
            if self.driver in TOGETHER:
                least, most = _BOUNDS.get(field.name, (1, 16))
            power = type(value) is int and value > 0 and not value & (value - 1)
            if field.name == "stages":
                power = type(value) is int
            if not power or not least <= value <= most:
                kind = "an integer" if field.name == "stages" else "a power of two"
                raise ValueError(f"{field.name}={value!r}: expected {kind} from {least} to {most}")

    def options(self, target: Target) -> dict[str, int]:
        """Triton's launch options. All registers that there are: else ptxas spills some for more programs at once."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": min(255, 2048 // self.warps)} if target.kind == "cuda" else found


@dataclass(frozen=True)
class Question:
    """What a choice is made for."""

    cell: str
    gates: int
    dtype: torch.dtype
    direction: str  # "forward" | "backward"
    B: int
    H: int
    P: int
    N: int
    project: bool
    target: Target
    exact: bool = False  # fp32 in three products of TF32
    options: int = 0  # masks and the like (options.py)
    dense: bool = True  # a recurrence with a product


def precision(asked: str, dtype: torch.dtype, target: Target) -> str:
    """How products of fp32 are made; three products in TF32 have nearly fp32's precision, at tensor cores' speed."""
    if dtype != torch.float32:
        return "ieee"
    if target.kind != "cuda" or target.arch < 80:
        return "ieee"
    return "tf32" if asked == "tf32" else "tf32x3"


def choose(question: Question, driver: str | None = None) -> Config:
    """The environment's word where there is one, else the caller's, else the table's, else the model's.

    Raises:
        ValueError: RNNKERN_TRITON_CONFIG is not understood.
    """
    asked = parse(os.environ.get(VARIABLE, ""))
    driver = asked.get("driver", driver)
    found = None if question.options else look_up(shipped_table(), question)  # measured without
    if found is None or (driver is not None and driver != found.driver):
        found = model(question, driver)
    if not asked:
        return found
    try:
        found = replace(found, **asked)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    if found.driver == "batch_parallel" and question.dense and asked.get("block_h", question.H) < question.H:
        raise ValueError(f"{VARIABLE}: block_h={found.block_h}: batch_parallel takes all of H={question.H} in one tile")
    return found


def parse(text: str) -> dict[str, Any]:
    """The words of RNNKERN_TRITON_CONFIG."""
    found: dict[str, Any] = {}
    names = [field.name for field in fields(Config)]
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, given, value = (p.strip() for p in part.partition("="))
        if not given or name not in names:
            raise ValueError(f"{VARIABLE}: got {part!r}, expected name=value with a name of {', '.join(names)}")
        if name == "driver":
            if value not in DRIVERS:
                raise ValueError(f"{VARIABLE}: driver {value!r}: expected one of {', '.join(DRIVERS)}")
            found[name] = value
            continue
        if not value.isdecimal():
            raise ValueError(f"{VARIABLE}: {name}={value!r}: expected an integer")
        found[name] = int(value)
    return found


def _states(q: Question) -> int:
    return len(CELLS[q.cell].states)


def _too_many_states(q: Question, driver: str) -> str:
    """Of a cell with more states than kernels have room for that keep them in registers; else nothing."""
    why = f"{q.cell}, a cell of {_states(q)} states ({driver} has room for two; per_step does it)"
    return why if _states(q) > 2 else ""


def fits_batch_parallel(question: Question) -> str:
    """Why the batch-parallel driver cannot do it, or nothing."""
    if why := _too_many_states(question, "batch_parallel"):
        return why
    if question.project:
        return "a projection (batch_parallel has no second product; per_step does it)"
    if has(question.options, NORMS):
        return "layer norm (batch_parallel is without; per_step does it)"
    if not question.dense:
        return ""
    backward, hip = question.direction == "backward", question.target.kind == "hip"
    most = batch_parallel_h(question.gates, question.dtype, backward, hip)
    if question.H > most:
        return f"H={question.H} (batch_parallel holds all weights in one program: up to H={most} in {question.dtype})"
    return ""


def fits_per_step(q: Question) -> str:
    """Why the per-step driver cannot do it, or nothing."""
    most = 2048 if q.dtype.itemsize < 8 else 1024
    if has(q.options, NORMS) and q.H > most:
        return f"layer norm with H={q.H} (a program holds whole rows: up to H={most} in {q.dtype})"
    return ""


def parts(width: int, most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, largest first, that hold a width with little padding."""
    found: list[int] = []
    while width > 0:
        above = power_of_two(width)
        close = above == 16 or 8 * (above - width) <= width
        size = min(most, above if close else above // 2)
        found.append(size)
        width -= size
    return tuple(found)


def handed_over(q: Question) -> int:
    """Width of the rows that persistent programs hand to each other: of h, or of all gate gradients."""
    return q.H if q.direction == "forward" else q.gates * q.H


def awaited(q: Question, config: Config) -> tuple[int, ...]:
    """Widths of the parts in which rows handed over are read, one after the other; with gluon, of a warp's slice."""
    width = handed_over(q)
    if config.driver == "persistent":
        return parts(width, config.block_k)
    least = 64 // q.dtype.itemsize  # a warp's threads read words of 8 bytes, 8 beside each other
    return parts(-(-width // (least * config.warps)) * least, max(least, config.block_k // config.warps))


def fits_together(q: Question, config: Config) -> str:
    """Why the persistent driver, or its twin in Gluon, cannot do it so, or nothing."""
    name = config.driver
    if why := _too_many_states(q, name):
        return why
    if not q.dense:
        return f"a diagonal recurrence ({name} is for products; batch_parallel does it)"
    if q.target.kind == "hip":
        return f"{q.target.name} ({name} programs hand values over by instructions of NVIDIA's)"
    if q.target.arch < 80:
        return f"{q.target.name} ({name} is for sm_80 and later)"
    if q.project:
        return f"a projection ({name} has no second product; per_step does it)"
    if q.options:
        return f"masks, zoneout, bounds and elementwise parameters ({name} has plain scans; the other drivers do them)"
    if q.dtype == torch.float64:
        return f"torch.float64 ({name} holds all weights on the chip; per_step does it)"
    if name == "gluon" and q.exact:
        return "float32 without TF32 (gluon makes one product in TF32; persistent makes three)"
    most = _MOST_REGISTERS["persistent, exact" if q.exact else name]
    if config.warps > 8 or _registers(q, config) > most or _shared(q, config) > q.target.shared:
        return f"H={q.H} in tiles of {config.block_b} rows and {config.block_h} units: more than fits one processor"
    programs = -(-q.H // config.block_h) * -(-q.B // config.block_b) * q.N
    if programs > q.target.processors:  # programs that wait for each other must all run at once
        return f"{programs} programs at once on {q.target.processors} processors ({name})"
    return ""


def misfit(q: Question, config: Config) -> str:
    """Why the driver cannot do it so, or nothing."""
    if config.driver == "batch_parallel":
        return fits_batch_parallel(q)
    if config.driver == "per_step":
        return fits_per_step(q)
    if config.driver == "gluon" and (why := unavailable()):
        return why
    return fits_together(q, config)


def suits_together(q: Question, driver: str) -> bool:
    """Whether an estimate has this driver, of those whose programs wait for each other, ahead of the others, and it can
    do it."""
    most = (32768 if q.dtype.itemsize == 2 else 16384) // (1 if q.direction == "forward" else 2)
    return q.B * q.H <= most and bool(fits_batch_parallel(q)) and not misfit(q, _sliced(q, driver))


def _columns(q: Question) -> int:
    """Sums that a unit has."""
    return q.gates if q.direction == "forward" else 1


def _on_chip(q: Question, config: Config) -> tuple[int, int]:
    """Bytes of a program's weights, and of what it awaits at once."""
    found, rows, slices = awaited(q, config), config.block_b, 1
    if config.driver == "gluon":
        rows, slices = max(8, rows), config.warps  # threads of absent rows read those that there are
    deep, widest = slices * sum(found), slices * max(found)
    return deep * config.block_h * _columns(q) * q.dtype.itemsize, widest * rows * q.dtype.itemsize


def _shared(q: Question, config: Config) -> int:
    """Bytes of a program's shared memory: the weights and what they are multiplied with, or every slice's sums."""
    if config.driver == "gluon":
        return config.warps * config.block_b * config.block_h * _columns(q) * 4
    return sum(_on_chip(q, config))


def _registers(q: Question, config: Config) -> int:
    """An estimate of a thread's: its part of the weights, and of what is awaited, before and after it is unpacked; with
    gluon, its sums. What else there is was read off compiled kernels."""
    weights, rows = _on_chip(q, config)
    found = awaited(q, config)
    if config.driver == "gluon":
        sums = _columns(q) * config.block_h * max(16, config.block_b) // 32
        other = 50 if q.direction == "forward" else 80 if q.dtype.itemsize == 2 else 112
        return 5 * len(found) + (weights + 3 * rows) // (128 * config.warps) + sums + other
    return (weights + 2 * rows) // (128 * config.warps) + 60 + 20 * len(set(found))


def _sliced(q: Question, driver: str) -> Config:
    """The tile whose program reads least a step: rows from other processors, and its weights from its own memory."""
    width = handed_over(q)

    def tile(rows: int, units: int, most: int) -> Config:
        """`most` bytes are awaited at once."""
        columns = most // (rows * q.dtype.itemsize)
        return Config(driver, rows, units, max(16, min(4096, columns, power_of_two(width))), 8, 1)

    def cost(found: Config) -> tuple[bool, int, int]:
        again = 0 if driver == "gluon" else _columns(q) * found.block_h  # weights that stay in registers are not read
        reads = width * q.dtype.itemsize * (3 * found.block_b + again)
        waits = len(awaited(q, found)) * 131072
        return bool(fits_together(q, found)), reads + waits, -found.block_b * found.block_h

    at_once = (32768, 16384, 8192) if driver == "gluon" else (32768, 16384)
    tiles = itertools.product((4, 8, 16), (8, 16, 32), at_once)
    return min((tile(*given) for given in tiles), key=cost)


def model(q: Question, driver: str | None = None) -> Config:
    """What sizes alone suggest: all of a small H in one program, else as many programs as there are processors.

    Never those of TOGETHER, which have not run on a GPU yet: RNNKERN_TRITON_CONFIG asks for them by name. Where they
    would be worth it is `suits_together`.
    """
    if driver is None:
        driver = "per_step" if fits_batch_parallel(q) else "batch_parallel"
    if driver in TOGETHER:
        return _sliced(q, driver)
    return _whole(q) if driver == "batch_parallel" else _tiled(q)


def _whole(q: Question) -> Config:
    """Few rows: products of 4 rows take as long as those of 16, what is done with them does not."""
    if not q.dense:  # a warp's rows lie in whole lines of the cache
        return Config("batch_parallel", 4, min(128 // q.dtype.itemsize, power_of_two(q.H)), 16, 1, 1)
    H = min(256, power_of_two(q.H))  # `fits_batch_parallel` says that larger ones do not fit
    if q.target.kind == "hip":
        return Config("batch_parallel", 16, H, H, 4, 1)
    rows = 4 if -(-q.B // 4) * q.N <= q.target.processors else 8
    return Config("batch_parallel", rows, H, H, 8 if H * q.dtype.itemsize >= 128 else 4, 1)


def _tiled(q: Question) -> Config:
    """The tile whose program reads least of the weights and of h, over all programs that a processor runs in turn."""
    width, deep = (q.P, q.gates * q.H) if q.direction == "backward" else (q.H, q.P)
    gates = q.gates if q.direction == "forward" else 1
    warpgroups = q.target.kind == "cuda" and q.target.arch >= 90  # their sums and operands need fewer registers
    most = 64 if warpgroups and q.dtype.itemsize == 2 else _LARGEST[q.dtype.itemsize]
    rows = [r for r in _TILES if r <= min(most, power_of_two(q.B))]
    units = [u for u in _TILES if u <= min(most, power_of_two(width))]

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        r, u = tile
        programs = -(-q.B // r) * -(-width // u) * q.N
        turns = -(-programs // q.target.processors)
        return turns * (deep * (r + gates * u) * q.dtype.itemsize + _FIXED), -r * u  # alike: fewer programs

    sums = _SUMS[q.dtype.itemsize] if warpgroups else min(_SUMS[q.dtype.itemsize], 2048)
    tiles = [(r, u) for r in rows for u in units if r * u * gates <= sums and not (q.options and r * u > _OPTIONED)]
    r, u = min(tiles, key=cost)
    depth = min({2: 64, 4: 32, 8: 16}[q.dtype.itemsize], power_of_two(deep))
    stages = 3 if q.target.kind == "cuda" else 1
    # Four slices of fp32 or fewer are unrolled, and are then too much at once for the registers of 4 warps.
    full = 8192 if _states(q) <= 2 else 4096  # bytes of sums that 4 warps hold no more, beside the states
    many = r * u * gates * q.dtype.itemsize >= full or (q.target.kind == "cuda" and deep <= 4 * depth < 256)
    return Config("per_step", r, u, depth, 8 if many else 4, stages)


def power_of_two(size: int) -> int:
    """The smallest tile that holds it."""
    return max(16, 1 << (size - 1).bit_length())


# The table. An entry holds for one kind of device and one H, and for every B up to `B`; of several the smallest does.
KEY = {
    "target": str, "processors": int, "cell": str, "dtype": str, "exact": bool, "direction": str, "H": int, "B": int,
}  # fmt: skip
Table = dict[tuple[Any, ...], list[tuple[int, Config]]]


def read_table(entries: Iterable[dict[str, Any]]) -> Table:
    """Entries as {"target": "sm_90", "processors": 132, "cell": "lstm", "dtype": "bfloat16", "exact": false,
    "direction": "forward", "H": 512, "B": 64, "config": {"driver": "per_step", "block_b": 16, ...}}.

    Raises:
        ValueError: an entry lacks a word, has one too many, or one of the wrong kind.
    """
    table: Table = {}
    for k, entry in enumerate(entries):
        where = f"entry {k}"
        if set(entry) != {*KEY, "config"}:
            raise ValueError(f"{where}: words {sorted(entry)}, expected {sorted([*KEY, 'config'])}")
        for name, kind in KEY.items():
            if type(entry[name]) is not kind:
                raise ValueError(f"{where}: {name}={entry[name]!r}, expected {kind.__name__}")
        if entry["direction"] not in PASSES:
            raise ValueError(f"{where}: direction {entry['direction']!r}: expected one of {', '.join(PASSES)}")
        try:
            config = Config(**entry["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: config: {error}") from None
        key = tuple(entry[name] for name in KEY if name != "B")
        table.setdefault(key, []).append((entry["B"], config))
    for found in table.values():
        found.sort(key=lambda pair: pair[0])
    return table


@lru_cache(maxsize=1)
def shipped_table() -> Table:
    text = resources.files(__package__).joinpath("table.json").read_text(encoding="utf-8")
    return read_table(json.loads(text)["entries"])


def look_up(table: Table, q: Question) -> Config | None:
    for most, config in table.get(_key(q.target, q.cell, q.dtype, q.exact, q.direction, q.H), ()):
        if q.B <= most and not misfit(q, config):
            return config
    return None


def _key(target: Target, cell: str, dtype: torch.dtype, *rest: Any) -> tuple[Any, ...]:
    return (target.name, target.processors, cell, str(dtype).removeprefix("torch."), *rest)


def tabled_drivers(table: Table, target: Target, cell: str, dtype: torch.dtype) -> set[str]:
    """Those of the table's, on such a device, that the size model never takes."""
    start = _key(target, cell, dtype)
    found = {config.driver for key, pairs in table.items() if key[: len(start)] == start for _, config in pairs}
    return found - {"batch_parallel", "per_step"}
