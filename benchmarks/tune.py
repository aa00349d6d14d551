"""The tables behind the choice on a GPU, measured: ``python -m benchmarks.tune search | ratios``.

``search`` finds the driver and tiles with which a scan runs fastest on this GPU, for one kind of scan after the other,
most telling first, and writes them into a table as they come; scans that the table has are left out, so that a later
run goes on. ``ratios`` makes of results of the gpu suite what says whether our kernels or torch's are taken. Both print
what they did; the tables are shipped by copying them over table.json and measured.json in rnnkern/backends/triton.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES, GPU
from benchmarks.clocks import clock_for
from benchmarks.results import Row, append, newest, read
from rnnkern.backends.base import ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.backends.reference import BACKEND as REFERENCE
from rnnkern.backends.triton import BACKEND, config, trial
from rnnkern.backends.triton.config import DRIVERS, PASSES, VARIABLE, Config, Question, Target, target_of
from rnnkern.cells import CELLS

STEPS = {"check": 24, "time": 256}  # of the scans that results are compared of, and that are timed
BEHIND = 1.5  # drivers whose first time is further behind the best are not tuned
BETTER = 0.99  # what a change must make of a time to count
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")


# ---- search ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an entry of the table is for."""

    cell: str
    precision: str
    H: int
    B: int
    direction: str

    def __str__(self) -> str:
        return f"{self.cell} {self.precision} H={self.H} B={self.B} {self.direction}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.precision, torch.float32)

    @property
    def rounding(self) -> str:
        """ScanSpec's word for it."""
        return "tf32" if self.precision == "tf32" else "ieee"

    def question(self, target: Target) -> Question:
        gates, H = len(CELLS[self.cell].gates), self.H
        exact = config.precision(self.rounding, self.dtype, target) == "tf32x3"
        return Question(self.cell, gates, self.dtype, self.direction, self.B, H, H, 1, False, target, exact)

    def inputs(self, T: int, device: torch.device) -> ScanInputs:
        """A plain scan of one direction."""
        dtype, G = self.dtype, len(CELLS[self.cell].gates)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        states = [normal(1, self.B, self.H)]
        states += [normal(1, self.B, self.H, dtype=accumulation_dtype(dtype)) for _ in CELLS[self.cell].states[1:]]
        group = (normal(G * self.H, self.H, scale=self.H**-0.5), normal(G * self.H, scale=0.1))
        spec = ScanSpec(self.cell, (False,), ("w_hh", "b_hh"), precision=self.rounding)
        natural = trial.natural(CELLS[self.cell], tuple(states))
        return ScanInputs(spec, T, self.B, normal(T * self.B, 1, G * self.H), natural, (group,))


def kinds(cells: Iterable[str], precisions: Iterable[str]) -> Iterator[Kind]:
    """Of the widths and batches of the gpu suite, in its order."""
    sizes = dict.fromkeys((shape.H, shape.B) for shape in GPU)
    for (H, B), precision, cell, direction in product(sizes, precisions, cells, PASSES):
        yield Kind(cell, precision, H, B, direction)


class Subject:
    """A kind of scan, ready to be run in any configuration, and what must come out of it."""

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind, self.clock = kind, clock_for(device.type)
        small = kind.inputs(STEPS["check"], device)
        saved = REFERENCE.forward(small)
        # All go back from what was saved in this dtype: relu's derivative jumps where rounding moves a unit past 0.
        self.small = self._pass(small, saved)
        self.yardstick = self._found(self._pass(small, saved, REFERENCE)())
        exact = (trial.moved(one, dtype=torch.float64) for one in (small, saved))
        self.truth = self._found(self._pass(*exact, REFERENCE)())
        self.inputs = small
        long = kind.inputs(STEPS["time"], device)
        self.long = self._pass(long, BACKEND.forward(long) if kind.direction == "backward" else None)

    def _pass(self, inputs: ScanInputs, saved: ScanOutputs | None, backend: Any = BACKEND) -> Callable[[], Any]:
        if self.kind.direction == "forward":
            return lambda: backend.forward(inputs)
        return lambda: trial.backward(backend, inputs, saved)  # type: ignore[arg-type]

    def _found(self, result: Any) -> trial.Results:
        return trial.of_forward(result) if self.kind.direction == "forward" else trial.of_backward(result)

    def seconds(self, found: Config) -> float:
        """Of a step.

        Raises:
            ArithmeticError: the result is wrong. What else is raised comes from a compiler or a launch.
        """
        with configured(found):
            trial.within(self._found(self.small()), self.yardstick, self.truth, self.inputs)
            self.clock.ready(self.long)
            single = self.clock.seconds(self.long, 1)
            calls = max(1, round(0.005 / single))
            return min(self.clock.seconds(self.long, calls) for _ in range(3)) / STEPS["time"]


@contextmanager
def configured(found: Config) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ",".join(f"{name}={value}" for name, value in asdict(found).items())
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def neighbours(q: Question, found: Config) -> Iterator[Config]:
    """Those that differ in one number, by a step up or down."""
    for field in fields(Config)[1:]:
        value = getattr(found, field.name)
        for other in (value + 1, value - 1) if field.name == "stages" else (2 * value, value // 2):
            try:
                near = replace(found, **{field.name: other})
            except ValueError:
                continue
            too_narrow = near.driver == "batch_parallel" and near.block_h < q.H
            if not too_narrow and not config.misfit(q, near):
                yield near


Report = Callable[[Config, float | None, str], None]


def search(q: Question, seconds: Callable[[Config], float], report: Report, until: float) -> Config | None:
    """The fastest configuration found: from each driver's by the size model downhill, one number at a time.

    Args:
        q: what it is for.
        seconds: measures one; whatever it raises, the configuration is out.
        report: is told of every one that was tried.
        until: time.monotonic() after which no other is tried.
    """
    times: dict[Config, float] = {}

    def measured(one: Config) -> float:
        if one not in times and time.monotonic() < until:
            try:
                times[one] = seconds(one)
            except Exception as error:  # a compiler's, a launch's, or a wrong result: another may do
                times[one] = float("inf")
                report(one, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            else:
                report(one, times[one], "")
        return times.get(one, float("inf"))

    starts = [config.model(q, driver) for driver in DRIVERS]
    starts = sorted((one for one in starts if not config.misfit(q, one)), key=measured)
    for here in starts:
        if measured(here) > BEHIND * measured(starts[0]):
            break
        better = True
        while better:
            better = False
            for near in neighbours(q, here):
                if measured(near) < BETTER * measured(here):
                    here, better = near, True
                    break
    best = min(times, key=lambda one: times[one], default=None)
    return best if best is not None and times[best] < float("inf") else None


def place(kind: Kind, q: Question) -> dict[str, Any]:
    """What an entry is looked up by."""
    found = {"target": q.target.name, "processors": q.target.processors, "cell": kind.cell, "exact": q.exact}
    kept = {"dtype": str(q.dtype).removeprefix("torch."), "direction": kind.direction, "H": kind.H, "B": kind.B}
    return {name: (found | kept)[name] for name in config.KEY}


def search_all(out: Path, wanted: Iterable[Kind], device: torch.device, seconds: float, each: float) -> None:
    """Adds to the table `out` and, beside it, to a list of everything that was tried, for `seconds` in all."""
    until, entries = time.monotonic() + seconds, json.loads(out.read_text())["entries"] if out.exists() else []
    config.read_table(entries)  # a malformed one is better found before an hour of measuring
    done = [{name: one[name] for name in config.KEY} for one in entries]
    for kind in wanted:
        if time.monotonic() >= until:
            break
        q = kind.question(target_of(device))
        if place(kind, q) in done:
            continue
        tried: list[Row] = []

        def report(one: Config, took: float | None, why: str, kind: Kind = kind, tried: list[Row] = tried) -> None:
            us = "" if took is None else f"{1e6 * took:.4g}"
            tried.append(asdict(kind) | asdict(one) | {"us_per_step": us, "note": why})

        try:
            found = search(q, Subject(kind, device).seconds, report, min(until, time.monotonic() + each))
        except torch.OutOfMemoryError as error:
            print(f"{kind}: {error}", flush=True)
            continue
        for row in tried:
            append(out.with_suffix(".csv"), row, list(row))
        fastest = {row["driver"]: row["us_per_step"] for row in sorted(tried, key=slowest_first) if row["us_per_step"]}
        print(f"{kind}: {found or 'nothing works'}; us a step: {fastest}", flush=True)
        if found is not None:
            entries.append(place(kind, q) | {"config": asdict(found)})
            write(out, {"entries": entries})


def slowest_first(row: Row) -> float:
    return -float(row["us_per_step"] or "inf")


def write(path: Path, table: dict[str, list[dict[str, Any]]]) -> None:
    """One line an entry, so that a change of one is a change of one line; whole or not at all."""
    ((name, entries),) = table.items()
    lines = ",\n".join(json.dumps(one) for one in entries)
    partial = path.with_suffix(".part")
    partial.write_text(f'{{"{name}": [\n{lines}\n]}}\n')
    partial.replace(path)


# ---- ratios ----------------------------------------------------------------------------------------------------------


def ratios(results: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of measured.json: our Triton kernels, taken by name, against torch.nn, as eager calls."""
    found = []
    for row in newest(list(results)):
        if row["backend"] != "triton" or row["peer"] != "torch.nn" or row["capture"]:
            continue
        if row["layout"] not in ("dense", "packed") or not row["gpu"]:
            continue
        precision = row["dtype"] if row["dtype"] != "fp32" else "tf32" if row["precision"] == "tf32" else "fp32"
        found.append(
            {
                "device": row["gpu"].split(" (")[0],
                "cell": "rnn_tanh" if row["cell"] == "rnn" else row["cell"],
                "precision": precision,
                "mode": row["mode"],
                "stacked": row["layers"] > 1 or row["directions"] > 1,
                "packed": row["layout"] == "packed",
                "T": row["T"],
                "B": row["B"],
                "H": row["H"],
                "ratio": row["ratio"],
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    find = commands.add_parser("search", help="the fastest driver and tiles on this GPU; adds to the table OUT")
    find.add_argument("--out", type=Path, required=True, help="a table as table.json is; OUT with .csv: all times")
    find.add_argument("--seconds", type=float, default=540, help="for all of it")
    find.add_argument("--each", type=float, default=30, help="seconds for one kind of scan")
    find.add_argument(
        "--cell",
        nargs="*",
        choices=[name for name in CELLS if CELLS[name].dense],
        default=["lstm", "gru", "rnn_tanh", "rnn_relu"],
    )
    find.add_argument("--precision", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    make = commands.add_parser("ratios", help="measured.json out of results of the gpu suite")
    make.add_argument("results", type=Path, nargs="+", help="files that the suite wrote with --backend triton")
    make.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.command == "ratios":
        rows = ratios(row for path in args.results for row in read(path))
        write(args.out, {"rows": rows})
        print(f"{len(rows)} rows")
        return 0 if rows else 1
    if not torch.cuda.is_available():
        print("search needs a GPU that torch can use", file=sys.stderr)
        return 2
    with torch.no_grad():
        search_all(args.out, kinds(args.cell, args.precision), torch.device("cuda"), args.seconds, args.each)
    return 0


if __name__ == "__main__":
    sys.exit(main())
