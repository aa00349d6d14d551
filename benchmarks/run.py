"""Measure rnnkern against its peers: ``python -m benchmarks.run --suite table cpu --memory``.

Rows are appended to benchmarks/results/<machine>.csv as they come. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.cases import DTYPES, MODES, SUITES, Case, cells, suite
from benchmarks.measure import Measured, Protocol, Timing, Wrong, measure
from benchmarks.memory import peak_bytes, worth_measuring
from benchmarks.peers import PEERS

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "date, commit, machine, cpu, gpu, torch, triton, threads, case, cell, mode, dtype, T, B, I, H, layers, directions, "
    "precision, capture, layout, peer, peer_algorithm, backend, time_us, peer_time_us, ratio, ratio_p20, ratio_p80, "
    "floor_us, peak_bytes, peer_peak_bytes"
).split(", ")


def rows(case: Case, found: Measured, floor_us: float | None, peaks: dict[str, int], constants: dict) -> list[dict]:
    """One row for each peer; columns that do not apply on a CPU stay empty."""
    shape = case.shape
    common = constants | {
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
        "precision": "ieee",
        "layout": shape.layout,
        "backend": found.backend,
        "floor_us": "" if floor_us is None else f"{floor_us:.5g}",
    }
    return [
        common
        | {
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
        for timing in found.timings
    ]


def append(path: Path, new: list[dict]) -> None:
    """Adds rows to a results file, which gets its heading when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(new)


def line(timing: Timing, floor_us: float | None) -> str:
    share = "" if floor_us is None else f", floor {floor_us:,.1f} us ({floor_us / timing.time_us:.0%} reached)"
    label = f"{timing.peer} ({timing.algorithm})" if timing.algorithm else timing.peer
    return (
        f"  {timing.ratio:6.2f}x [{timing.p20:.2f}, {timing.p80:.2f}] {label}: {timing.time_us:,.1f} us against "
        f"{timing.peer_time_us:,.1f}, {timing.rounds} rounds{share}"
    )


def arguments() -> argparse.Namespace:
    protocol = Protocol()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=["quick"])
    parser.add_argument("--cell", nargs="+", choices=cells(), default=list(cells()))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--peer", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only shapes of these names, as T100-B16-H256")
    parser.add_argument("--backend", help="a backend of rnnkern by name; default: its own choice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=protocol.rounds)
    parser.add_argument("--seconds", type=float, default=protocol.seconds, help="for all rounds against one peer")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of training steps")
    parser.add_argument("--no-floors", action="store_true", help="do not calibrate the machine first")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{machine.machine()}.csv", help="file to append to")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    chosen = [
        case
        for case in suite(args.suite)
        if case.cell in args.cell and case.mode in args.mode and case.dtype in args.dtype
        if not args.case or case.shape.name in args.case
    ]
    constants = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "cpu": machine.cpu(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    say(f"{constants['cpu']}, torch {torch.__version__}, commit {constants['commit']}, {len(chosen)} cases")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > machine.cores() / 2:
        say(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}): what follows are no results to keep")
    rates = None if args.no_floors else machine.calibrate(args.threads)
    if rates is not None:
        say(machine.describe(rates))
    protocol = Protocol(args.rounds, min(args.rounds, Protocol.least_rounds), args.seconds)
    wrong, ratios, missing = [], dict[str, list[float]](), dict[str, str]()
    for number, case in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {case}")
        try:
            found = measure(case, args.peer, args.threads, protocol, args.backend)
        except Wrong as error:
            say(f"  NO NUMBER: {error}")
            wrong.append(str(error))
            continue
        floor_us = rates.floor_us(case, found.weights) if rates is not None else None
        for timing in found.timings:
            say(line(timing, floor_us))
            ratios.setdefault(f"{timing.peer} {case.mode} {case.dtype}", []).append(timing.ratio)
        for peer, reason in found.skipped.items():
            missing[peer] = reason
            say(f"  skipped {peer}: {reason}")
        peaks = {}
        if args.memory and worth_measuring(case) and "torch.nn" in args.peer:
            peaks = {name: peak_bytes(case, name, args.threads, args.backend) for name in ("rnnkern", "torch.nn")}
            say(f"  peak memory {peaks['rnnkern'] / 2**20:,.1f} MiB against {peaks['torch.nn'] / 2**20:,.1f}")
        append(args.results, rows(case, found, floor_us, peaks, constants))

    for group, values in ratios.items():
        mean = math.exp(math.fsum(map(math.log, values)) / len(values))
        say(f"{group}: {mean:.2f}x geometric mean of {len(values)}, least {min(values):.2f}x")
    for peer, reason in missing.items():
        say(f"skipped {peer}: {reason}")
    for reason in wrong:
        say(f"NO NUMBER: {reason}")
    say(f"rows in {args.results}")
    return 1 if wrong else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
