"""The results files: one row per case, peer and run, appended as they come."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.measure import Prepared, Timing

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "date, commit, machine, cpu, gpu, torch, triton, threads, case, cell, mode, dtype, T, B, I, H, layers, directions, "
    "precision, capture, layout, peer, peer_algorithm, backend, time_us, peer_time_us, ratio, ratio_p20, ratio_p80, "
    "floor_us, peak_bytes, peer_peak_bytes"
).split(", ")
INTEGERS = ("T", "B", "I", "H", "layers", "directions", "threads")
NUMBERS = ("time_us", "peer_time_us", "ratio", "ratio_p20", "ratio_p80", "floor_us", "peak_bytes", "peer_peak_bytes")
Row = dict[str, Any]  # a row of a results file with its numbers read


def constants(threads: int) -> Row:
    """What all rows of a run share."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "cpu": machine.cpu(),
        "gpu": machine.gpu(),
        "torch": torch.__version__,
        "triton": machine.triton(),
        "threads": threads,
    }


def row(shared: Row, prepared: Prepared, timing: Timing, floor_us: float | None, peaks: dict[str, int]) -> Row:
    case: Case = prepared.case
    shape = case.shape
    return shared | {
        "case": shape.name,
        "cell": case.cell,
        "mode": case.mode,
        "dtype": case.dtype,
        "T": shape.T,
        "B": shape.B,
        "I": shape.H,
        "H": shape.H,
        "layers": shape.layers,
        "directions": shape.directions,
        "precision": case.precision,
        "capture": case.capture,
        "layout": shape.layout,
        "backend": prepared.backend,
        "floor_us": "" if floor_us is None else f"{floor_us:.5g}",
        "peer": timing.peer,
        "peer_algorithm": timing.algorithm,
        "time_us": f"{timing.time_us:.5g}",
        "peer_time_us": f"{timing.peer_time_us:.5g}",
        "ratio": f"{timing.ratio:.4g}",
        "ratio_p20": f"{timing.p20:.4g}",
        "ratio_p80": f"{timing.p80:.4g}",
        "peak_bytes": peaks.get("rnnkern", ""),
        "peer_peak_bytes": peaks.get(timing.peer, ""),
    }


def append(path: Path, new: Row, columns: Sequence[str] = COLUMNS) -> None:
    """Adds a row to a results file, which gets its heading when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(new)


def read(path: Path) -> list[Row]:
    """All rows; numbers that are missing are None."""
    with path.open(newline="") as file:
        rows = [_typed(row) for row in csv.DictReader(file)]
    if not rows:
        raise SystemExit(f"{path} has no rows")
    return rows


def _typed(row: dict[str, str]) -> Row:
    whole = {column: int(row[column]) for column in INTEGERS}
    return {**row, **whole, **{column: float(row[column]) if row[column] else None for column in NUMBERS}}


def arithmetic(row: Row) -> str:
    """The dtype, or what products of fp32 are made of, and whether a CUDA graph was replayed: rows of one table."""
    return ("tf32" if row["precision"] == "tf32" else row["dtype"]) + (", graph" if row["capture"] == "graph" else "")


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    columns = ("machine", "threads", "case", "cell", "mode", "dtype", "precision", "capture", "peer")
    return tuple(row[column] for column in columns)


def newest(rows: list[Row]) -> list[Row]:
    """The newest row of every case and peer, from whichever run."""
    return list({key(row): row for row in sorted(rows, key=lambda row: row["date"])}.values())
