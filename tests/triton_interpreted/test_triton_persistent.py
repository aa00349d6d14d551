"""The persistent driver against the reference, its programs in turns that are drawn (cooperative.py)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
from cooperative import together
from scans import (
    REFERENCE,
    Case,
    agree,
    assert_same_bits,
    check_nan_and_inf,
    check_rows_past_a_length,
    compare,
    drawn,
    gradients_of,
    inputs_of,
    references,
    run,
    tensors,
)

from rnnkern import dispatch
from rnnkern.backends.base import ScanInputs, ScanOutputs
from rnnkern.backends.triton import drivers
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import VARIABLE
from rnnkern.backends.triton.lost import LOST
from rnnkern.cells import CELLS

DENSE = [cell for cell in STEPS if CELLS[cell].dense and len(CELLS[cell].states) <= 2]
SCAN = dispatch.backend("triton")
AXES: dict[str, list] = {
    "T, B, H": [(3, 3, 24), (2, 6, 33), (4, 5, 17)],
    "layout": ["dense", "packed", "padded"],
    "reverse": [(False, True), (True,), (False,)],
    "bias": [True, False],
    "save": ["all", "all", "all", "all", "states", "none"],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["", "zero", "learned"],
}
BADS = (float("nan"), float("inf"))


@pytest.fixture(autouse=True)
def _nothing_lost() -> Iterator[None]:
    LOST.flags.clear()
    yield
    LOST.flags.clear()


def driven(patch: pytest.MonkeyPatch, rows: int = 16, units: int = 8, part: int = 32, warps: int = 2) -> None:
    patch.setenv(VARIABLE, f"driver=persistent,block_b={rows},block_h={units},block_k={part},warps={warps}")


def at_random(case: Case, patch: pytest.MonkeyPatch) -> None:
    rng = random.Random(str(case))
    driven(patch, rng.choice([4, 8, 8]), rng.choice([8, 16]), rng.choice([16, 32, 64]), 8)


def small() -> list[Case]:
    cases = [case for case in drawn(3, AXES, DENSE) if case.dtype != torch.float64]
    # Rows of 8, 4 and 2 bytes times an odd number: the words that they are read by.
    cases += [Case("lstm", torch.bfloat16, T=3, B=3, H=H, reverse=(False,)) for H in (20, 18, 17)]
    return cases


@pytest.mark.parametrize("case", small(), ids=str)
def test_equals_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(case)
    at_random(case, monkeypatch)
    assert SCAN.unsupported(inputs) == []
    with together(case.seed):
        compare(SCAN, inputs, gradients_of(case, inputs))


def test_as_configured_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size model's own tiles, for sums that are made in three parts."""
    case = Case("gru", torch.bfloat16, T=2, B=3, H=100, reverse=(True,), layout="packed")
    inputs = inputs_of(case)
    monkeypatch.setenv(VARIABLE, "driver=persistent")
    with together():
        compare(SCAN, inputs, gradients_of(case, inputs))


def test_in_any_turns_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gru", T=3, B=5, H=24, layout="padded", reset="learned", reverse=(True,))
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    driven(monkeypatch, rows=4)
    kept = [t.clone() for _, t in tensors(inputs)]
    with together(seed=0):
        first = run(SCAN, inputs, grads)
    with together(seed=1):
        second = run(SCAN, inputs, grads)
    assert_same_bits(first, second, inputs)
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, tensors(inputs), strict=True))


@pytest.mark.parametrize("cell", DENSE)
def test_rows_past_a_length(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for them."""
    driven(monkeypatch, rows=4)
    with together():
        case = Case(cell, T=4, B=9, H=9, layout="padded", reset="learned")
        check_rows_past_a_length(SCAN, case, [3, 0, 4, 1, 0, 0, 0, 0, 2])


@pytest.mark.parametrize("where", ["gx", "h", "w_hh", "dy"])
@pytest.mark.parametrize("cell", DENSE)
def test_nan_and_inf_go_where_the_reference_sends_them(cell: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driven(monkeypatch)
    with together():
        case = Case(cell, T=3, B=3, H=9, layout="padded", reverse=(False,))
        check_nan_and_inf(SCAN, case, [3, 2, 3], where, BADS[len(cell + where) % 2])


def of_the_sentinels_pattern(dtype: torch.dtype) -> tuple[ScanInputs, tuple]:
    """A scan whose h and gate gradients become NaN that looks like what is not there yet."""
    case = Case("rnn_relu", dtype, T=3, B=3, H=17, reverse=(False,))
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    for t, row in ((inputs.gx, 3), (grads[0], 7)):
        t.view(integers)[row] = -1
    inputs.states[0].view(integers)[0, 2] = -1
    assert inputs.gx[3].isnan().all()
    return inputs, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_nan_that_looks_like_a_missing_value(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    driven(monkeypatch)
    monkeypatch.setattr(drivers, "PATIENCE", 2000)
    inputs, grads = of_the_sentinels_pattern(dtype)
    theirs = run(REFERENCE, inputs, grads)
    with together():
        ours = run(SCAN, inputs, grads)
    for mine, other in zip(ours, theirs, strict=True):
        for (what, a), (_, b) in zip(tensors(mine), tensors(other), strict=True):
            assert torch.equal(a.isnan(), b.isnan()), what
    LOST.check(inputs.gx.device)


def test_drivers_read_what_the_others_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gru", T=4, B=5, H=17, layout="packed", reset="zero")
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    yardstick, truth, _ = references(inputs, grads)
    with together():
        for ahead, back in (("persistent", "per_step"), ("per_step", "persistent")):
            monkeypatch.setenv(VARIABLE, f"driver={ahead}")
            outputs = SCAN.forward(inputs)
            monkeypatch.setenv(VARIABLE, f"driver={back}")
            agree([SCAN.backward(inputs, outputs, *grads)], yardstick[1:], truth[1:], inputs)


@pytest.mark.parametrize(("cell", "reset", "after"), [("lstm", "", 0), ("gru", "learned", 5), ("lstm", "zero", 3)])
def test_a_lost_partner(cell: str, reset: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was needed is NaN, what is not NaN is right, and the next call says so; after that all is as before."""
    case = Case(cell, T=3, B=6, H=17, reverse=(False,), layout="padded", reset=reset)
    inputs = dataclasses.replace(inputs_of(case), lengths=torch.tensor([3, 2, 3, 1, 3, 2]))
    grads = gradients_of(case, inputs)
    driven(monkeypatch, rows=4, part=64)
    monkeypatch.setattr(drivers, "PATIENCE", 60)
    with together():
        honest = run(SCAN, inputs, grads)
        LOST.check(inputs.gx.device)
    assert isinstance(honest[0], ScanOutputs)
    with together(leave={2: after}):  # a slice of the first four rows
        outputs = SCAN.forward(inputs)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        SCAN.forward(inputs)
    with together(leave={2: after}):
        found = SCAN.backward(inputs, honest[0], *grads)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        SCAN.backward(inputs, honest[0], *grads)
    lost, fine = slice(0, 4), slice(4, 6)
    for mine, before in ((outputs, honest[0]), (found, honest[1])):
        for (what, a), (_, b) in zip(tensors(mine), tensors(before), strict=True):
            if not a.numel():
                continue
            by_row = a.dim() == 3 and a.shape[0] == 1  # [N, B, ...], or [S, N, ...]
            a, b = (t[0] if by_row else t.view(case.T, case.B, -1).movedim(0, 1) for t in (a, b))
            right = (a == b) | a.isnan()
            assert right[lost].all() and torch.equal(a[fine].nan_to_num(), b[fine].nan_to_num()), what
            if what.startswith(("final", "dstates")):
                assert a[lost].isnan().any(1).all(), what
            elif what in ("y", "dgx"):
                assert a[0].isnan().any(1)[-1 if what == "y" else 0], what
    with together():
        assert_same_bits(honest, run(SCAN, inputs, grads), inputs)


REFUSED = {
    "torch.float64": (Case("gru", torch.float64, H=17), ""),
    "projection": (Case("lstm", H=16, project=True), ""),
    "more than fits": (Case("lstm", T=1, B=1, H=1500), ""),
    "programs at once on 132": (Case("lstm", T=1, B=100, H=64), ",block_b=4,block_h=8"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_it_cannot_do_is_refused_by_name(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tiles = REFUSED[word]
    monkeypatch.setenv(VARIABLE, f"driver=persistent{tiles}")
    reasons = SCAN.unsupported(inputs_of(case))
    assert any(word in reason and "by name" in reason for reason in reasons), reasons
