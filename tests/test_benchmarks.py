"""What the benchmarks make of their measurements; nothing is timed here."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import CPU, SUITES, Case, Shape, suite
from benchmarks.clocks import DeviceClock
from benchmarks.floors import FLOORS, verdict
from benchmarks.machine import Rates
from benchmarks.measure import Prepared, Wrong, check
from benchmarks.memory import allocated_peak, worth_measuring
from benchmarks.peers import PEERS, has
from benchmarks.problem import Problem, Unavailable
from benchmarks.report import BEGIN, END, compare, headline, insert, markdown, table
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
    for text in (markdown(rows, "r.csv"), headline(rows, "r.csv")):
        assert "**0.90**" in text and "| 1.50 |" in text and "Some CPU" in text and "2026-01-01" in text
    assert any("0.90x" in line for line in table(rows))
    kinds = {"precision": "tf32", "capture": "graph", "case": "T9-B3-H8-resets", "layout": "resets"}
    split = markdown(written(tmp_path / "g.csv", row(1.1, 1, 1.2), row(1.2, 1, 1.3, **kinds)), "g.csv")
    assert "tf32, graph against torch.nn" in split and "anew in 3 %" in split and split.count("| 1.20 |") == 1
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


@pytest.mark.parametrize("mode", ["training", "penalty"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_wrong_result_has_no_number(cell: str, mode: str) -> None:
    case = Case(cell, SMALL.shape, mode, "fp32")
    prepared = Prepared.of(case, torch.get_num_threads())
    good = prepared.mine.results()
    check(case, good, good, prepared.truth)
    for name in good:
        broken = good | {name: good[name] * 1.001}
        with pytest.raises(Wrong, match=f"{name} is off by"):
            check(case, broken, good, prepared.truth)
    with pytest.raises(Wrong, match="y is off by nan"):
        check(case, good | {"y": good["y"] * float("nan")}, good, prepared.truth)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_case_with_resets_is_the_loop_that_starts_anew(cell: str) -> None:
    """torch.nn over packed segments, which is the truth of such a case, against steps of torch.nn's cell."""
    case = Case(cell, Shape(40, 3, 4, layout="resets"), "training", "fp32")
    reset = case.shape.resets()
    assert reset.any() and not reset.all()
    prepared = Prepared.of(case, torch.get_num_threads())  # rnnkern agrees
    problem = prepared.problem
    step = getattr(torch.nn, f"{cell.upper()}Cell")(4, 4).double()
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in problem.weights.items()})
    states = [torch.zeros(3, 4, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)]
    steps = []
    for x, anew in zip(problem.x.double(), reset, strict=True):
        states = [state.masked_fill(anew[:, None], 0.0) for state in states]
        found = step(x, tuple(states) if cell == "lstm" else states[0])
        states = list(found) if cell == "lstm" else [found]
        steps.append(states[0])
    torch.testing.assert_close(torch.stack(steps), prepared.truth["y"])
    for name, state in zip(("h", "c"), states, strict=False):
        torch.testing.assert_close(state[None], prepared.truth[name])


@pytest.mark.parametrize("layout", ["resets", "lengths", "states", "recompute"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_an_option_is_measured_beside_the_call_without(layout: str, mode: str) -> None:
    case = Case("lstm", Shape(12, 3, 4, layout=layout), mode, "fp32")
    prepared = Prepared.of(case, torch.get_num_threads())  # rnnkern agrees with torch.nn
    plain = prepared.peer("rnnkern-plain")
    rows = case.shape.rows // 3
    assert plain.results()["y"].shape == (rows, 3, 4) and (layout == "lengths") == (rows < 12)
    assert has("rnnkern-plain", case) and not has("rnnkern-plain", Case("lstm", Shape(12, 3, 4), mode, "fp32"))


@pytest.mark.parametrize("peer", ["torchrl", "flashrnn", "haste"])
def test_peers_for_gpus_say_why_they_cannot(peer: str) -> None:
    missing = {"torchrl": "torchrl", "flashrnn": "flashrnn", "haste": "haste_pytorch"}[peer]
    if importlib.util.find_spec(missing) is None:
        with pytest.raises(Unavailable, match=f"{missing} is not installed"):
            PEERS[peer](Problem.of(replace(SMALL, precision="tf32")), 1)
    for changed, reason in (
        ({"dtype": "fp64"}, "has no dtype fp64"),
        ({"shape": Shape(5, 3, 8, directions=2)}, "has one direction only"),
        ({"shape": Shape(5, 3, 8, layout="packed")}, "has no layout packed"),
    ):
        with pytest.raises(Unavailable, match=reason):
            PEERS[peer](replace(Problem.of(SMALL), case=replace(SMALL, **changed)), 1)


def test_the_last_cache_is_overwritten_right_before_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock for GPUs asks of torch.cuda, in order."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 6.0  # ms

    class Flush:
        def zero_(self) -> None:
            asked.append("flush")

    properties = type("Properties", (), {"L2_cache_size": 100})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: Flush() if size == 400 else None)
    clock = DeviceClock()
    clock.ready(lambda: asked.append("call"))
    assert asked[:2] == ["call", "wait"] and asked[-4:] == ["wait", "wait", "flush", "wait"]
    asked.clear()
    assert clock.seconds(lambda: asked.append("call"), 3) == pytest.approx(0.002)
    assert asked == ["record", "call", "call", "call", "record", "wait"]


def test_peak_memory_on_a_gpu_is_of_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held, peak = [100], [0]

    def step() -> None:
        peak[0] = max(peak[0], held[0] + 40)

    def reset() -> None:
        peak[0] = held[0]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert allocated_peak(step) == 40
    on_gpu = replace(SMALL, device="cuda")
    assert worth_measuring(on_gpu) and not worth_measuring(replace(on_gpu, capture="graph"))


def test_a_persistent_kernels_floor_has_its_hand_offs() -> None:
    rates = Rates(1, {}, [], {"bf16": 1e15}, [(2**30, 4e12)], [(16, 0.5), (128, 1.0)], 400_000)

    def floor(H: int, mode: str = "inference") -> float:
        weights = {"weight_ih_l0": (4 * H, H), "weight_hh_l0": (4 * H, H), "bias_ih_l0": (4 * H,)}
        return rates.floor_us(Case("lstm", Shape(100, 1, H), mode, "bf16", "cuda"), weights)

    def without(H: int, mode: str = "inference") -> float:
        kept = rates.gpu_handoff[:]
        rates.gpu_handoff.clear()
        try:
            return floor(H, mode)
        finally:
            rates.gpu_handoff.extend(kept)

    assert floor(128) == without(128)  # one SM holds 131 kB
    assert floor(512) == pytest.approx(without(512) + 100 * 0.5)  # six hold 2.1 MB
    assert floor(1024, "training") == pytest.approx(without(1024, "training") + 2 * 100 * 1.0)
    assert "0.5 (16 programs), 1 (128 programs)" in rates.describe()
