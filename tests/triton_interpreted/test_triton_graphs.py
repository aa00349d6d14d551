"""Runs of steps as graphs, without a GPU: a recorder that keeps what it was to record and does it when replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scans import Case, compare, gradients_of, inputs_of

from rnnkern import dispatch
from rnnkern.backends.triton import graphs
from rnnkern.backends.triton.slots import NAMES, STEP, advance, word, write_table

CPU = torch.device("cpu")
START: dict[str, torch.Tensor | int] = {"step": 0}  # of a table


class Kept:
    def __init__(self, run: Callable[[], None]) -> None:
        self.replay, self.closed = run, False

    def close(self) -> None:
        self.closed = True


class Pretended:
    """Stands for a GPU: `at` is the stream that the caller is on."""

    def __init__(self) -> None:
        self.recorded: list[Kept] = []
        self.at, self.capturing = 7, False

    def may_record(self, device: torch.device) -> bool:
        return not self.capturing

    def stream(self, device: torch.device) -> int:
        return self.at

    def record(self, run: Callable[[], None]) -> Kept:
        self.recorded.append(Kept(run))
        return self.recorded[-1]


class Noted:
    """A launch that notes which step it was, of which table."""

    def __init__(self, key: Any = "kind") -> None:
        self.key, self.steps, self.tables = (key,), [], set()

    def __call__(self, table: torch.Tensor, i: int) -> None:
        self.steps.append(int(table[STEP.value]) + i)
        self.tables.add(table.data_ptr())


def run(steps: graphs.Steps, launch: Noted, count: int) -> list[int]:
    launch.steps.clear()
    steps.run((launch,), count, START, CPU)  # type: ignore[arg-type]
    return launch.steps


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 63, 64, 65, 72, 128, 200, 201])
def test_every_step_once_and_in_order(count: int) -> None:
    steps, launch = graphs.Steps(Pretended()), Noted()
    for _ in range(2):  # when graphs are recorded, and when they are there
        assert run(steps, launch, count) == list(range(count))


def test_graphs_are_recorded_once_for_all_lengths() -> None:
    recorder = Pretended()
    steps, launch = graphs.Steps(recorder), Noted()
    for count in (200, 64, 8, 300, 17):
        assert run(steps, launch, count) == list(range(count))
    assert len(recorder.recorded) == len(graphs.RUNS)
    assert len(launch.tables) == 1


def test_the_first_step_of_a_kind_is_never_recorded() -> None:
    """Its launch compiles the kernel and loads it, which cannot be recorded."""

    class First(Pretended):
        def record(self, run: Callable[[], None]) -> Kept:
            assert launch.steps
            return super().record(run)

    for count in (8, 64):
        launch = Noted()
        assert run(graphs.Steps(First()), launch, count) == list(range(count))


def test_kinds_and_streams_have_tables_of_their_own() -> None:
    recorder = Pretended()
    steps, one, other = graphs.Steps(recorder), Noted("one"), Noted("other")
    run(steps, one, 8)
    run(steps, other, 8)
    recorder.at = 8
    run(steps, one, 8)
    assert len(steps.plans) == 3
    assert len({plan.table.data_ptr() for plan in steps.plans.values()}) == 3


def test_nothing_is_recorded_while_the_caller_records() -> None:
    recorder = Pretended()
    recorder.capturing = True
    steps, launch = graphs.Steps(recorder), Noted()
    assert run(steps, launch, 100) == list(range(100))
    assert not recorder.recorded and not steps.plans


def test_the_oldest_kind_goes_first() -> None:
    recorder = Pretended()
    steps = graphs.Steps(recorder, capacity=2)
    for key in ("a", "b", "a", "c"):
        run(steps, Noted(key), 16)
    assert [key[-1] for key in steps.plans] == [("a",), ("c",)]
    assert [kept.closed for kept in recorder.recorded] == [False, True, False]


def test_threads_take_turns() -> None:
    """One kind of scan on one stream from two threads: each call's steps follow each other."""
    steps, launch, counts = graphs.Steps(Pretended()), Noted(), (70, 8, 33, 8)

    def work() -> None:
        for count in counts:
            steps.run((launch,), count, START, CPU)  # type: ignore[arg-type]

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    calls: list[list[int]] = []
    for step in launch.steps:
        if step == 0:
            calls.append([])
        assert step == len(calls[-1])
        calls[-1].append(step)
    assert sorted(map(len, calls)) == sorted(counts * 2)


@pytest.mark.parametrize("case", [
    Case("lstm", T=17, B=2, H=3, layout="packed", reset="learned"),
    Case("gru", T=66, B=2, H=3, reverse=(True,), layout="padded"),
    Case("lstm", T=9, B=2, H=3, project=True, reverse=(False,)),
    Case("slstm", T=9, B=2, H=3, reverse=(False,)),
], ids=str)  # fmt: skip
def test_scans_by_graphs_equal_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves, with their tables, however a number of steps is cut."""
    scan, recorder = dispatch.backend("triton"), Pretended()
    monkeypatch.setattr(scan, "steps", graphs.Steps(recorder))
    monkeypatch.setenv("RNNKERN_TRITON_CONFIG", "driver=per_step,block_b=16,block_h=16,block_k=16")
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    compare(scan, inputs, grads)
    assert recorder.recorded
    recorded = len(recorder.recorded)
    # Other tensors and another T of the same kind: nothing is recorded again.
    shorter = inputs_of(Case(**(vars(case) | {"T": case.T - 1, "seed": 1})))
    compare(scan, shorter, gradients_of(case, shorter))
    assert len(recorder.recorded) == recorded


def test_the_table_holds_any_word() -> None:
    table = torch.empty(len(NAMES), dtype=torch.int64)
    words = [0, 1, 16, 2**31, 2**40, 2**57 - 1, *range(len(NAMES) - 6)]
    write_table[(1,)](table, tuple(word(w) for w in words), len(NAMES))
    assert table.tolist() == words
    advance[(1,)](table, 64)
    assert table[STEP.value] == 64


def test_words_are_of_one_kind_to_the_compiler() -> None:
    """None is 1, a multiple of 16 or small: each of these would be compiled anew."""
    for value in (0, 1, 7, 16, 2**20, 2**57 - 16):
        assert word(value) % 2 and 2**32 < word(value) < 2**63
