"""What the benchmarks make of their measurements; nothing is timed here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.cases import CPU, SUITES, Case, Shape, suite
from benchmarks.floors import FLOORS, verdict
from benchmarks.measure import Prepared, Wrong, check
from benchmarks.peers import PEERS, has
from benchmarks.report import BEGIN, END, compare, insert, markdown, table
from benchmarks.results import COLUMNS, append, newest, read

SMALL = Case("lstm", Shape(5, 3, 8), "training", "fp32")


def row(ratio: float, low: float, high: float, **changed: str) -> dict[str, str]:
    """A row as it stands in a results file."""
    fixed = {
        "date": "2026-01-01", "commit": "abc", "machine": "m", "cpu": "Some CPU", "torch": "2", "threads": "2",
        "case": "T100-B16-H256", "cell": "lstm", "mode": "inference", "dtype": "fp32", "T": "100", "B": "16",
        "I": "256", "H": "256", "layers": "1", "directions": "1", "precision": "ieee", "layout": "dense",
        "peer": "torch.nn", "backend": "cpp", "time_us": "100", "peer_time_us": str(100 * ratio), "floor_us": "90",
    }  # fmt: skip
    spread = {"ratio": str(ratio), "ratio_p20": str(low), "ratio_p80": str(high)}
    return dict.fromkeys(COLUMNS, "") | fixed | spread | changed


def written(path: Path, *rows: dict[str, str]) -> list[dict]:
    for each in rows:
        append(path, each)
    return read(path)


def test_rows_survive_the_file_and_the_newest_counts(tmp_path: Path) -> None:
    rows = written(tmp_path / "r.csv", row(1.5, 1.4, 1.6), row(2.0, 1.9, 2.1, date="2026-02-01"))
    assert [r["ratio"] for r in rows] == [1.5, 2.0]
    assert rows[0]["H"] == 256 and rows[0]["peak_bytes"] is None
    assert [r["ratio"] for r in newest(rows)] == [2.0]


def test_comparison_names_what_left_the_spread(tmp_path: Path) -> None:
    old = written(
        tmp_path / "old.csv", row(1.5, 1.4, 1.6), row(3.0, 2.9, 3.1, cell="gru"), row(2, 1.9, 2.1, cell="rnn")
    )
    new = written(
        tmp_path / "new.csv", row(1.55, 1.45, 1.7), row(2.0, 1.9, 2.1, cell="gru"), row(3, 2.9, 3, cell="rnn")
    )
    lines = list(compare(old, new))
    assert lines[0].startswith("slower  1.50x  gru") or lines[0].startswith("faster  1.50x  rnn")
    assert {line.split()[0] for line in lines[:2]} == {"slower", "faster"}
    assert lines[2] == "2 of 3 ratios that both have differ by more than their spread"


def test_tables_keep_the_rows_in_which_rnnkern_is_slower(tmp_path: Path) -> None:
    rows = written(tmp_path / "r.csv", row(0.9, 0.8, 0.95), row(1.5, 1.4, 1.6, mode="training"))
    text = markdown(rows, "r.csv", True)
    assert "**0.90**" in text and "| 1.50 |" in text and "Some CPU" in text and "2026-01-01" in text
    assert any("0.90x" in line for line in table(rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    insert(readme, text)
    found = readme.read_text()
    assert found.startswith("before") and "stale" not in found and "0.90" in found


def test_promises_are_checked_against_the_rows(tmp_path: Path) -> None:
    rows = written(tmp_path / "r.csv", row(0.9, 0.8, 0.95), row(1.5, 1.4, 1.6, case="T100-B64-H256", B="64"))
    lines = [verdict(floor, rows) for floor in FLOORS]
    assert any(
        line.startswith("short") and "LSTM, B=4..64, inference" in line and "least 0.90" in line for line in lines
    )
    assert any("not measured" in line for line in lines)


def test_every_suite_has_cases_and_known_peers() -> None:
    for name, found in SUITES.items():
        pairs = suite(name)
        assert len(pairs) == len(set(pairs)) and {peer for _, peer in pairs} <= PEERS.keys()
        assert {case.device for case, _ in pairs} == {found.device}
    assert {case.shape for case, _ in suite("cpu")} == set(CPU)
    assert not has("onnxruntime", SMALL) and has("torch.nn", SMALL)
    assert {peer for _, peer in suite("quick", ["openvino"])} == {"openvino"}


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_wrong_result_has_no_number(cell: str) -> None:
    case = Case(cell, SMALL.shape, "training", "fp32")
    prepared = Prepared.of(case, torch.get_num_threads())
    good = prepared.mine.results()
    check(case, good, good, prepared.truth)
    for name in good:
        broken = good | {name: good[name] * 1.001}
        with pytest.raises(Wrong, match=f"{name} is off by"):
            check(case, broken, good, prepared.truth)
    with pytest.raises(Wrong, match="y is off by nan"):
        check(case, good | {"y": good["y"] * float("nan")}, good, prepared.truth)
