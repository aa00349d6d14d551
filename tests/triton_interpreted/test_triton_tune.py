"""What makes the tables behind the choice on a GPU, in the interpreter: that it finds, refuses, goes on and is read."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, tune
from benchmarks.tune import Kind
from rnnkern import _cuda
from rnnkern.backends.triton import config, shipped, trial
from rnnkern.backends.triton.config import Config, misfit, model, read_table

CPU = torch.device("cpu")
H200 = shipped.TARGETS["sm_90"]
BF16 = Kind("lstm", "bf16", 512, 16, "forward")


def test_most_telling_sizes_come_first() -> None:
    first, *rest = tune.kinds(["lstm", "gru"], ["bf16", "tf32"])
    assert first == Kind("lstm", "bf16", 768, 16, "forward")
    assert len({first, *rest}) == len(rest) + 1 and Kind("gru", "tf32", 2048, 16, "backward") in rest


@pytest.mark.parametrize("driver", config.DRIVERS)
@pytest.mark.parametrize("precision", tune.PRECISIONS)
def test_neighbours_differ_in_one_number_and_can_all_be_run(
    driver: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "unavailable", lambda: "")  # what is only missing in the interpreter
    q = Kind("lstm", precision, 100 if driver != "batch_parallel" else 60, 16, "forward").question(H200)
    assert q.exact == (precision == "fp32")
    here = model(q, driver)
    found = list(tune.neighbours(q, here))
    assert len(found) >= 3 or (q.exact and misfit(q, here))  # three products leave little room, or are not done
    for near in found:
        changed = [name for name in vars(near) if getattr(near, name) != getattr(here, name)]
        assert len(changed) == 1 and changed != ["driver"] and not misfit(q, near)


def taking(best: Config, also: dict[str, float] | None = None) -> Any:
    """A measurement with one valley at `best`: a tenth for every doubling away from it; `also`: factors by driver."""

    def seconds(one: Config) -> float:
        away = sum(
            abs(a.bit_length() - b.bit_length()) if name != "stages" else abs(a - b)
            for (name, a), b in zip(list(vars(one).items())[1:], list(vars(best).values())[1:], strict=True)
        )
        return (1.0 if one.driver == best.driver else (also or {}).get(one.driver, 10.0)) * (1 + 0.1 * away)

    return seconds


@pytest.mark.parametrize("driver", ["per_step", "persistent"])
def test_search_goes_down_to_the_valley(driver: str) -> None:
    q = BF16.question(H200)
    best = next(tune.neighbours(q, next(tune.neighbours(q, model(q, driver)))))
    tried: list[Config] = []
    found = tune.search(q, taking(best), lambda one, *_: tried.append(one), time.monotonic() + 60)
    assert found == best and len(tried) == len(set(tried))
    assert {one.driver for one in tried} == {"per_step", "persistent"}  # batch_parallel cannot do it
    other = "per_step" if driver == "persistent" else "persistent"
    assert sum(one.driver == other for one in tried) == 1  # too far behind to be tuned


def test_search_leaves_out_what_fails_and_ends_in_time() -> None:
    q = BF16.question(H200)
    start = model(q, "per_step")

    def seconds(one: Config) -> float:
        if one.driver != "per_step":
            raise ArithmeticError("y is wrong")
        return 1.0 if one == start else 0.5

    notes: dict[Config, str] = {}
    found = tune.search(q, seconds, lambda one, took, why: notes.update({one: why}), time.monotonic() + 60)
    assert found is not None and found != start
    assert any("ArithmeticError: y is wrong" in why for one, why in notes.items() if one.driver == "persistent")
    assert tune.search(q, seconds, lambda *_: pytest.fail("nothing may be tried"), time.monotonic()) is None


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "STEPS", {"check": 2, "time": 3})


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("direction", config.PASSES)
@pytest.mark.parametrize("cell", ["gru", "rnn_relu"])
def test_a_wrong_result_is_no_measurement(cell: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind(cell, "fp16", 7, 3, direction)
    subject = tune.Subject(kind, CPU)
    one = model(kind.question(config.INTERPRETER))
    assert subject.seconds(one) > 0
    assert subject.seconds(model(kind.question(config.INTERPRETER), "per_step")) > 0
    monkeypatch.setattr(trial, "FACTOR", -1e6)
    with pytest.raises(ArithmeticError, match="error"):
        subject.seconds(one)


@pytest.mark.usefixtures("short")
def test_a_table_grows_and_a_later_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.json"
    wanted = [Kind("gru", "fp32", 7, 3, direction) for direction in config.PASSES]
    monkeypatch.setattr(tune, "neighbours", lambda q, found: iter(()))
    tune.search_all(out, wanted[:1], CPU, 120, 60)
    first = out.read_text()
    tune.search_all(out, wanted, CPU, 120, 60)
    table = json.loads(out.read_text())["entries"]
    assert json.loads(first)["entries"] == table[:1] and [one["direction"] for one in table] == ["forward", "backward"]
    found = config.look_up(read_table(table), wanted[1].question(config.INTERPRETER))
    assert found == Config(**table[1]["config"])
    with out.with_suffix(".csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    assert {row["driver"] for row in tried} >= {"batch_parallel", "per_step"}
    assert all(bool(row["us_per_step"]) != bool(row["note"]) for row in tried)


def test_every_entry_of_the_table_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"driver": "per_step", "block_b": 16, "block_h": 32, "block_k": 128, "warps": 2, "stages": 5}
    kind = Kind("gru", "bf16", 328, 48, "backward")
    target = config.Target("cuda", 90, 114)  # another model of the same architecture
    entries = [tune.place(kind, kind.question(target)) | {"config": given}]
    monkeypatch.setattr(shipped, "shipped_table", lambda: read_table(entries))
    monkeypatch.setattr(config, "shipped_table", lambda: read_table(entries))
    found = [one for one in shipped.shipped(H200, (), ()) if one.constexprs.get("BLOCK_K") == 128]
    assert found and all(one.options["num_stages"] == 5 and one.options["num_warps"] == 2 for one in found)
    assert not [one for one in shipped.shipped(shipped.TARGETS["sm_80"], (), ()) if "BLOCK_K" in one.constexprs]


def test_ratios_of_a_results_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dict.fromkeys(results.COLUMNS, "") | {
        "date": "2026-01-01", "gpu": "NVIDIA H200 (132 SMs, 139 GiB)", "cell": "rnn", "mode": "training",
        "dtype": "fp32", "T": 512, "B": 64, "I": 512, "H": 512, "layers": 1, "directions": 1, "threads": 1,
        "precision": "ieee", "layout": "dense", "peer": "torch.nn", "backend": "triton", "ratio": 1.25,
        "case": "T512-B64-H512",
    }  # fmt: skip
    other = [
        {"date": "2026-01-02", "ratio": 1.5},  # the same case again
        {"dtype": "bf16", "layers": 2, "case": "2layers", "cell": "lstm"},
        {"capture": "graph"}, {"peer": "haste"}, {"backend": "torch"}, {"layout": "resets", "case": "resets"},
        {"gpu": "", "machine": "a processor"},
    ]  # fmt: skip
    path = tmp_path / "results.csv"
    for row in [{}, *other]:
        results.append(path, plain | row)
    assert tune.main(["ratios", str(path), "--out", str(tmp_path / "measured.json")]) == 0
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert [(row["cell"], row["precision"], row["stacked"], row["ratio"]) for row in rows] == [
        ("rnn_tanh", "fp32", False, 1.5),
        ("lstm", "bf16", True, 1.25),
    ]
    monkeypatch.setattr(_cuda, "_rows", lambda: tuple(rows))
    found = _cuda.measured(
        _cuda.Call("rnn_tanh", 512, 64, 500, torch.float32, tf32=False), _cuda.Device("NVIDIA H200", 132, (9, 0))
    )
    assert found is not None and found.take == "triton" and "1.50" in found.why
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_search_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["search", "--out", str(tmp_path / "table.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
