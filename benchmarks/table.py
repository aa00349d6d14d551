"""From a results file to the README: ``python -m benchmarks.table`` writes the tables between the README's markers.

``--check`` prints instead what was promised beside what was reached; it is a report, not a test, and exits with 0.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from benchmarks.floors import BOTH, FLOORS, Row, geometric_mean, verdict
from benchmarks.machine import ROOT, machine

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
INTEGERS = ("T", "B", "I", "H", "layers", "directions", "threads")
NUMBERS = ("time_us", "peer_time_us", "ratio", "ratio_p20", "ratio_p80", "floor_us", "peak_bytes", "peer_peak_bytes")
PEERS = {  # in the order of the tables
    "torch.nn": "torch.nn",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "rnnkern-fp32": "rnnkern's own fp32",
}


def read(path: Path, run: str | None, merge: bool) -> list[Row]:
    """The rows of one run, the newest unless named; with `merge` the newest row of every case and peer."""
    with path.open(newline="") as file:
        rows = [_typed(row) for row in csv.DictReader(file)]
    if not rows:
        raise SystemExit(f"{path} has no rows")
    if merge:
        newest = {
            (row["case"], row["cell"], row["mode"], row["dtype"], row["threads"], row["peer"]): row for row in rows
        }
        return list(newest.values())
    run = run or max(row["date"] for row in rows)
    found = [row for row in rows if row["date"] == run]
    if not found:
        raise SystemExit(f"{path} has no run {run}; it has {', '.join(sorted({row['date'] for row in rows}))}")
    return found


def _typed(row: dict[str, str]) -> Row:
    whole = {column: int(row[column]) for column in INTEGERS}
    return {**row, **whole, **{column: float(row[column]) if row[column] else None for column in NUMBERS}}


def group(row: Row) -> str:
    """Cases that one geometric mean is taken over."""
    if row["T"] == 1:
        return "one step"
    if row["layout"] == "packed":
        return "packed"
    if row["layers"] * row["directions"] > 1:
        return "stacks"
    return "B = 1" if row["B"] == 1 else "B > 1"


GROUPS = ("one step", "B = 1", "B > 1", "stacks", "packed")


def _shape(row: Row) -> str:
    sizes = f"B={row['B']}, H={row['H']}"
    if row["layout"] == "cell":
        return f"a cell, {sizes}"
    if row["layout"] == "packed":
        return f"packed, lengths 1 to {row['T']}, {sizes}"
    stack = f", {row['layers']} layers" if row["layers"] > 1 else ""
    return f"T={row['T']}, {sizes}{stack}{', bidirectional' if row['directions'] == 2 else ''}"


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['ratio']:.2f}" + ("†" if row["backend"].startswith("torch") else "")
    return f"**{text}**" if round(row["ratio"], 2) < 1 else text


def section(rows: list[Row]) -> list[str]:
    """One table: a line for each shape, a column for each cell and mode, a mean for each group."""
    columns = sorted({(row["cell"], row["mode"]) for row in rows}, key=lambda pair: (pair[0], BOTH.index(pair[1])))
    found = {(row["case"], row["cell"], row["mode"]): row for row in rows}
    lines = [
        f"| | {' | '.join(f'{cell.upper()} {mode}' for cell, mode in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]

    def add(label: str, texts: list[str]) -> None:
        lines.append(f"| {label} | {' | '.join(texts)} |")

    def mean(members: list[Row], column: tuple[str, str]) -> str:
        ratios = [row["ratio"] for row in members if (row["cell"], row["mode"]) == column]
        return f"*{geometric_mean(ratios):.2f}*" if ratios else ""

    for name in GROUPS:
        members = [row for row in rows if group(row) == name]
        order = sorted(members, key=lambda row: (row["layout"], row["T"], row["B"], row["H"]))
        shapes = {row["case"]: row for row in order}
        for case, row in shapes.items():
            add(_shape(row), [_ratio(found.get((case, *column))) for column in columns])
        if len(shapes) > 1:
            add(f"*geometric mean, {name}*", [mean(members, column) for column in columns])
    return lines


def memory(rows: list[Row]) -> list[str]:
    ratios = [
        row["peak_bytes"] / row["peer_peak_bytes"] for row in rows if row["peer"] == "torch.nn" and row["peak_bytes"]
    ]
    if not ratios:
        return []
    return [
        f"Peak memory of a training step: {min(ratios):.2f} to {max(ratios):.2f} of torch.nn's, geometric mean "
        f"{geometric_mean(ratios):.2f}, over {len(ratios)} cases.",
        "",
    ]


def markdown(rows: list[Row], source: str) -> str:
    """Everything that goes between the markers."""

    def all_of(column: str) -> str:
        return ", ".join(sorted({str(row[column]) for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    parts = [
        f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} on {all_of('cpu')}, {all_of('threads')} threads, "
        f"torch {all_of('torch')}, commit {all_of('commit')}, backend {all_of('backend')}; every row with its spread "
        f"is in {source}. A number is the peer's time over rnnkern's for a whole module call from Python, the median "
        "of interleaved rounds in one process: above 1 rnnkern is faster, **bold** is where it is slower. Training is "
        "forward and backward with the gradients of the input and of every parameter; the input size equals H.",
        "",
    ]
    if any(row["backend"].startswith("torch") for row in rows):
        parts += ["† ran on torch's own kernels by automatic choice.", ""]
    parts += memory(rows)
    for peer, title in PEERS.items():
        for dtype in sorted({row["dtype"] for row in rows if row["peer"] == peer}, reverse=True):
            picked = [row for row in rows if row["peer"] == peer and row["dtype"] == dtype]
            heading = f"{dtype} against {title}"
            if peer == "torch.nn" and dtype == "fp32":
                parts += [f"**{heading}**", "", *section(picked), ""]
            else:
                parts += ["<details>", f"<summary>{heading}</summary>", "", *section(picked), "", "</details>", ""]
    return "\n".join(parts).rstrip() + "\n"


def insert(readme: Path, text: str) -> None:
    """Replaces what stands between the markers."""
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise SystemExit(f"{readme} must have the lines {BEGIN} and {END} once each, in this order")
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    default = ROOT / "benchmarks" / "results" / f"{machine()}.csv"
    parser.add_argument("--results", type=Path, default=default, help="a results file; default: this machine's")
    parser.add_argument("--run", help="the date of a run, as in its rows; default: the newest")
    parser.add_argument("--merge", action="store_true", help="the newest row of each case, from whichever run")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="print the promised floors beside what was reached")
    args = parser.parse_args()
    if not args.results.exists():
        raise SystemExit(f"{args.results} does not exist: run python -m benchmarks.run first")
    rows = read(args.results, args.run, args.merge)
    if args.check:
        for floor in FLOORS:
            print(verdict(floor, rows))
        return 0
    source = args.results.resolve()
    insert(args.readme, markdown(rows, str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
