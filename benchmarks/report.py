#!/usr/bin/env python3
"""From results files to something to look at.

``python benchmarks/report.py``: the tables of docs/benchmarks.md, and the first of them in the README, between their
markers. ``--out DIR``: charts as PNG and SVG, and one HTML page that opens from disk. ``--compare OLD NEW``: what got
faster or slower beyond the spread. ``--check``: what was promised beside what was reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import MODES, RAGGED
from benchmarks.floors import FLOORS, geometric_mean, verdict
from benchmarks.machine import ROOT
from benchmarks.results import RESULTS, Row, arithmetic, key, newest, read

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PEERS = {  # in the order of the tables
    "torch.nn": "torch.nn",
    "torch.compile": "torch.nn under torch.compile",
    "compiled-loop": "torch.compile of a loop over cells",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torchrl": "TorchRL's Triton kernels",
    "flashrnn": "FlashRNN",
    "haste": "Haste",
    "rnnkern-fp32": "rnnkern's own fp32",
    "rnnkern-plain": "rnnkern's own call without the option, of as many rows",
}


def table(rows: Sequence[Row]) -> Iterable[str]:
    """A run as text: a line for each row, then a mean for each peer, mode and dtype."""
    rows = [_numbers(row) for row in rows]
    if not rows:
        return
    width = max(len(_case(row)) for row in rows)
    peers = max(len(row["peer"]) for row in rows)

    def line(case: str, peer: str, ratio: str, spread: str, ours: str, theirs: str, share: str) -> str:
        return f"{case:{width}}  {peer:{peers}}  {ratio:>7}  {spread:>13}  {ours:>11}  {theirs:>11}  {share:>5}"

    yield line("case", "peer", "ratio", "20 to 80 %", "rnnkern us", "peer us", "floor")
    for row in rows:
        spread = f"{row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}"
        share = f"{row['floor_us'] / row['time_us']:.0%}" if row["floor_us"] else ""
        times = (f"{row[column]:,.1f}" for column in ("time_us", "peer_time_us"))
        yield line(_case(row), row["peer"], f"{row['ratio']:.2f}x", spread, *times, share)
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["peer"], row["mode"], arithmetic(row)), []).append(row["ratio"])
    for (peer, mode, dtype), ratios in groups.items():
        yield (
            f"{peer}, {mode}, {dtype}: {geometric_mean(ratios):.2f}x geometric mean of {len(ratios)}, "
            f"least {min(ratios):.2f}x"
        )


def _case(row: Row) -> str:
    extras = [part for part in (row["precision"], row["capture"]) if part not in ("ieee", "")]
    return " ".join([row["cell"], row["case"], row["mode"], row["dtype"], *extras])


def _numbers(row: Row) -> Row:
    """A row as it is written has its numbers as text."""
    columns = ("time_us", "peer_time_us", "ratio", "ratio_p20", "ratio_p80", "floor_us")
    return row | {column: float(row[column]) if row[column] else None for column in columns}


def compare(old: list[Row], new: list[Row]) -> Iterable[str]:
    """Cases whose ratio has left the old spread, and the old the new one; the largest change first."""
    before = {key(row): row for row in newest(old)}
    changes, common = [], 0
    for row in newest(new):
        was = before.get(key(row))
        if was is None:
            continue
        common += 1
        if row["ratio_p20"] > was["ratio_p80"] or row["ratio_p80"] < was["ratio_p20"]:
            changes.append((row["ratio"] / was["ratio"], was, row))
    for factor, was, row in sorted(changes, key=lambda change: -abs(geometric_distance(change[0]))):
        word = "faster" if factor > 1 else "slower"
        yield (
            f"{word} {max(factor, 1 / factor):5.2f}x  {_case(row)} against {row['peer']}: "
            f"{was['ratio']:.2f} [{was['ratio_p20']:.2f}, {was['ratio_p80']:.2f}] to "
            f"{row['ratio']:.2f} [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]"
        )
    yield f"{len(changes)} of {common} ratios that both have differ by more than their spread"


def geometric_distance(factor: float) -> float:
    return factor - 1 if factor >= 1 else 1 - 1 / factor


def group(row: Row) -> str:
    """Cases that one geometric mean is taken over."""
    if row["T"] == 1:
        return "one step"
    if row["layout"] not in ("dense", "cell"):
        return row["layout"]
    if row["layers"] * row["directions"] > 1:
        return "stacks"
    return "B = 1" if row["B"] == 1 else "B > 1"


GROUPS = ("one step", "B = 1", "B > 1", "stacks", "packed", "lengths", "resets", "states", "recompute")


def _shape(row: Row) -> str:
    sizes = f"B={row['B']}, H={row['H']}"
    if row["layout"] == "cell":
        return f"a cell, {sizes}"
    if row["layout"] in RAGGED:
        return f"{'packed' if row['layout'] == 'packed' else 'padded'}, lengths 1 to {row['T']}, {sizes}"
    if row["layout"] == "resets":
        return f"T={row['T']}, {sizes}, anew in 3 % of the steps"
    if row["layout"] in ("states", "recompute"):
        return f"T={row['T']}, {sizes}, {'return_states' if row['layout'] == 'states' else 'memory=recompute'}"
    stack = f", {row['layers']} layers" if row["layers"] > 1 else ""
    return f"T={row['T']}, {sizes}{stack}{', bidirectional' if row['directions'] == 2 else ''}"


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['ratio']:.2f}" + ("†" if row["backend"].startswith("torch") else "")
    return f"**{text}**" if round(row["ratio"], 2) < 1 else text


def section(rows: list[Row]) -> list[str]:
    """One table: a line for each shape, a column for each cell and mode, a mean for each group."""
    columns = sorted({(row["cell"], row["mode"]) for row in rows}, key=lambda pair: (pair[0], MODES.index(pair[1])))
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
    saving = [row for row in rows if row["layout"] != "recompute"]
    ratios = [
        row["peak_bytes"] / row["peer_peak_bytes"] for row in saving if row["peer"] == "torch.nn" and row["peak_bytes"]
    ]
    if not ratios:
        return []
    return [
        f"Peak memory of a training step: {min(ratios):.2f} to {max(ratios):.2f} of torch.nn's, geometric mean "
        f"{geometric_mean(ratios):.2f}, over {len(ratios)} cases.",
        "",
    ]


def introduction(rows: list[Row], source: str) -> list[str]:
    """What machine it was, and how its tables are to be read."""

    def all_of(column: str) -> str:
        return ", ".join(sorted({str(row[column]) for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    parts = [
        f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} with {all_of('threads')} threads, "
        f"torch {all_of('torch')}, commit {all_of('commit')}, backend {all_of('backend')}; every row with its spread "
        f"is in {source}. A number is the peer's time over rnnkern's for a whole module call from Python, the median "
        "of interleaved rounds in one process: above 1 rnnkern is faster, **bold** is where it is slower. Training is "
        "forward and backward with the gradients of the input and of every parameter; the input size equals H.",
        "",
    ]
    if any(row["backend"].startswith("torch") for row in rows):
        parts += ["† ran on torch's own kernels by automatic choice.", ""]
    return parts + memory(rows)


def machine(rows: list[Row]) -> str:
    return ", ".join(sorted({str(row["cpu"]) for row in rows}))


def tables(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """What is shown together: a peer's rows in one arithmetic, second derivatives by themselves, with a title."""
    usual = max({row["threads"] for row in rows}, key=[row["threads"] for row in rows].count)
    for peer, title in PEERS.items():
        for second in (False, True):
            for dtype in sorted({arithmetic(row) for row in rows if row["peer"] == peer}, reverse=True):
                of_peer = [row for row in rows if row["peer"] == peer and arithmetic(row) == dtype]
                picked = [row for row in of_peer if (row["mode"] == "penalty") == second]
                threads = sorted({row["threads"] for row in picked})
                if picked:
                    words = ["Second derivatives, "] if second else []
                    words.append(f"{dtype} against {title}")
                    if threads != [usual]:
                        words.append(f", {' and '.join(map(str, threads))} thread{'s'[: threads != [1]]}")
                    yield "".join(words), picked


def markdown(rows: list[Row], source: str) -> str:
    """One machine's tables, each below a heading of its own."""
    parts = [f"## {machine(rows)}", "", *introduction(rows, source)]
    for title, picked in tables(rows):
        parts += [f"### {title}", "", *section(picked), ""]
    return "\n".join(parts).rstrip() + "\n"


def headline(rows: list[Row], source: str) -> str:
    """The one table of a machine that the README has: fp32 against torch.nn where there is one, all of its rows."""
    found = dict(tables(rows))
    title = "fp32 against torch.nn" if "fp32 against torch.nn" in found else next(iter(found))
    picked = found[title]
    parts = [f"**{machine(picked)}, {title}**", "", *introduction(picked, source), *section(picked)]
    return "\n".join(parts) + "\n"


def insert(file: Path, text: str) -> None:
    """Replaces what stands between the markers."""
    old = file.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise SystemExit(f"{file} must have the lines {BEGIN} and {END} once each, in this order")
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    file.write_text(f"{before}{BEGIN}\n\n{text}\n{after}", encoding="utf-8")


def name_of(path: Path) -> str:
    source = path.resolve()
    return str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, nargs="*", help="results files; default: all of benchmarks/results, this machine's first"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--out", type=Path, metavar="DIR", help="charts and an HTML page there, in place of the tables")
    parser.add_argument("--check", action="store_true", help="print the promised floors beside what was reached")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    args = parser.parse_args()
    if args.compare:
        old, new = args.compare
        print(*compare(read(old), read(new)), sep="\n")
        return 0
    found = {path: newest(read(path)) for path in args.results or RESULTS.glob("*.csv")}
    if not found:
        raise SystemExit(f"{RESULTS} has no results: run pytest benchmarks --suite cpu first")
    paths = args.results or sorted(found, key=lambda path: max(row["date"] for row in found[path]), reverse=True)
    rows = [row | {"source": path} for path in paths for row in found[path]]
    if args.check:
        for path in paths:
            its = [row for row in rows if row["source"] == path]
            print(f"{path.name}:", *(f"  {verdict(floor, its)}" for floor in FLOORS), sep="\n")
        return 0
    if args.out:
        from benchmarks.charts import write

        for name in write(rows, args.out):
            print(name)
        return 0
    own = {path: [row for row in rows if row["source"] == path] for path in paths}
    insert(args.readme, headline(own[paths[0]], name_of(paths[0])))
    insert(args.page, "\n".join(markdown(own[path], name_of(path)) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
