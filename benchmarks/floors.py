"""The speeds that rnnkern has promised to reach on a CPU with AVX-512 and two threads, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import CPU

Row = dict[str, Any]  # a row of a results file with its numbers read
BOTH = ("inference", "training")
CPU_NAMES = frozenset(shape.name for shape in CPU)


def ratio(row: Row) -> float:
    return row["ratio"]


def share(row: Row) -> float:
    """Of the machine's limit."""
    return row["floor_us"] / row["time_us"]


def memory(row: Row) -> float:
    """The peer's peak over ours."""
    return row["peer_peak_bytes"] / max(row["peak_bytes"], 1)


@dataclass(frozen=True)
class Floor:
    """A promise about the rows that `select` picks: each value and their geometric mean at least so much."""

    title: str
    select: Callable[[Row], bool]
    each: float | None = None
    mean: float | None = None
    value: Callable[[Row], float] = ratio


def _where(peer: str = "torch.nn", dtype: str = "fp32", **wanted: Any) -> Callable[[Row], bool]:
    """Rows whose columns have one of the wanted values; (low, high) bounds a number."""
    wanted |= {"peer": peer, "dtype": dtype}

    def matches(row: Row) -> bool:
        for column, value in wanted.items():
            if isinstance(value, range):
                if row[column] not in value:
                    return False
            elif row[column] not in (value if isinstance(value, tuple | frozenset) else (value,)):
                return False
        return True

    return matches


def _has(column: str, select: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: select(row) and isinstance(row[column], float)


DENSE: dict[str, Any] = {"layout": "dense", "layers": 1, "directions": 1}
SIZES: dict[str, Any] = {"H": range(128, 513), **DENSE}
SEVERAL: dict[str, Any] = {"T": range(2, 10**6), "B": range(4, 65), **SIZES}
ONE: dict[str, Any] = {"T": 100, "B": 1, **SIZES}
STEP: dict[str, Any] = {"T": 1, "B": 1, "H": 128, "mode": "inference"}
SIMPLE = ("gru", "rnn")
ONNX: dict[str, Any] = {"peer": "onnxruntime", "case": CPU_NAMES, "mode": "inference"}

FLOORS = (
    Floor("GRU, RNN, B=1, inference", _where(cell=SIMPLE, mode="inference", **ONE), 3.0, 4.0),
    Floor("GRU, RNN, B=1, training", _where(cell=SIMPLE, mode="training", **ONE), 5.0),
    *(Floor(f"GRU, RNN, B=4..64, {mode}", _where(cell=SIMPLE, mode=mode, **SEVERAL), 1.2, 1.5) for mode in BOTH),
    Floor("LSTM, B=1, inference", _where(cell="lstm", mode="inference", **ONE), 1.2, 1.8),
    Floor("LSTM, B=1, training", _where(cell="lstm", mode="training", **ONE), None, 1.5),
    *(Floor(f"LSTM, B=4..64, {mode}", _where(cell="lstm", mode=mode, **SEVERAL), 1.0, 1.1) for mode in BOTH),
    Floor("one call with T=1, LSTM", _where(cell="lstm", **STEP, **DENSE), 8.0),
    Floor("one call with T=1, GRU and RNN", _where(cell=SIMPLE, **STEP, **DENSE), 3.0),
    Floor("one call of a cell", _where(layout="cell", **STEP), 2.0),
    Floor("second derivatives, LSTM", _where(cell="lstm", mode="penalty", **DENSE), 0.91),
    Floor("packed, all cells, inference", _where(layout="packed", mode="inference"), 1.6),
    Floor("packed, all cells, training", _where(layout="packed", mode="training"), 2.5),
    Floor("resets, beside the call without", _where(layout="resets", peer="rnnkern-plain"), 1 / 1.05),
    Floor("lengths=, time per row beside a dense call", _where(layout="lengths", peer="rnnkern-plain"), 1 / 1.1),
    Floor("return_states, beside the call without", _where(layout="states", peer="rnnkern-plain"), 1 / 1.05),
    Floor("memory=recompute, time", _where(layout="recompute", peer="torch.nn"), 1 / 1.5),
    Floor(
        "memory=recompute, torch's peak memory over ours",
        _has("peak_bytes", _where(layout="recompute", peer="torch.nn")),
        4.0,
        value=memory,
    ),
    *(Floor(f"bf16 against torch's bf16, {mode}", _where(dtype="bf16", mode=mode), 1.0) for mode in BOTH),
    *(
        Floor(
            f"bf16 against our fp32, H of 256 or more, {mode}",
            _where(peer="rnnkern-fp32", dtype="bf16", mode=mode, H=range(256, 10**6)),
            1.0,
        )
        for mode in BOTH
    ),
    Floor("ONNX Runtime, T>1", _where(T=range(2, 10**6), **ONNX), 0.95),
    Floor("ONNX Runtime, T=1", _where(T=1, **ONNX), 0.85),
    Floor("ONNX Runtime, all", _where(**ONNX), None, 1.2),
    *(
        Floor(
            f"share of the fp32 limit, B>=16 and H>=256, {mode}",
            _has(
                "floor_us",
                _where(mode=mode, T=range(2, 10**6), B=range(16, 10**6), H=range(256, 10**6), layout="dense"),
            ),
            0.85,
            value=share,
        )
        for mode in BOTH
    ),
    Floor(
        "peak memory of a training step, torch's over ours",
        _has("peak_bytes", lambda row: row["peer"] == "torch.nn" and row["mode"] == "training"),
        1.0,
        value=memory,
    ),
)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))


def verdict(floor: Floor, rows: list[Row]) -> str:
    """One line: what was promised, what was reached, and whether that suffices."""
    picked = [(floor.value(row), row) for row in rows if floor.select(row)]
    if not picked:
        return f"----   {floor.title}: not measured"
    parts, good = [], True
    if floor.each is not None:
        least, row = min(picked, key=lambda pair: pair[0])
        below = sum(value < floor.each for value, _ in picked)
        good &= not below
        where = f"{row['cell']} {row['case']} {row['mode']} {row['dtype']}"
        parts.append(f"each {floor.each:.2f}, least {least:.2f} ({where}), {below} of {len(picked)} below")
    if floor.mean is not None:
        mean = geometric_mean(value for value, _ in picked)
        good &= mean >= floor.mean
        parts.append(f"geometric mean {floor.mean:.2f}, reached {mean:.2f} over {len(picked)}")
    return f"{'PASS' if good else 'short'}{'' if not good else ' '}  {floor.title}: {'; '.join(parts)}"
