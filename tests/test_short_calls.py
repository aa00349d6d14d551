"""Calls without gradients under automatic choice: one call of the extension for a whole stack (rnnkern._fast)."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from tolerance import check

import rnnkern
from rnnkern import _cpu, _fast, dispatch

if not _fast.available():
    pytest.skip("the extension is not there, or this torch's tensors are not known to it", allow_module_level=True)

STACKS = [
    {"num_layers": layers, "bidirectional": two, "bias": bias, **({"proj_size": 4} if projected else {})}
    for layers, two, bias, projected in product((1, 2, 3), (False, True), (True, False), (False, True))
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the extension took each call that it was offered."""
    taken: list[bool] = []

    def offered(*given: Any) -> Any:
        found = _cpu.stack(*given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(_fast, "_kernel", offered)
    return taken


def flat(found: tuple[Any, Any]) -> list[torch.Tensor]:
    return [found[0], *(found[1] if isinstance(found[1], tuple) else (found[1],))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_stacks(kind: str, dtype: torch.dtype, calls: list[bool]) -> None:
    """A yardstick for 16-bit dtypes is torch's module in that dtype, as everywhere."""
    for options in STACKS:
        if "proj_size" in options and kind != "LSTM":
            continue
        theirs = getattr(torch.nn, kind)(3, 9, **options).to(dtype)
        ours = rnnkern.accelerate(copy.deepcopy(theirs))
        wide = copy.deepcopy(theirs).double()
        x = torch.randn(5, 4, 3).to(dtype)
        with torch.no_grad():
            _, hx = theirs(torch.randn(2, 4, 3).to(dtype))
            given = tuple(h.double() for h in hx) if kind == "LSTM" else hx.double()
            for mine, yardstick, truth in (
                (ours(x), theirs(x), wide(x.double())),
                (ours(x, hx), theirs(x, hx), wide(x.double(), given)),
            ):
                check(flat(mine), flat(yardstick), flat(truth), str(options))
    assert calls and all(calls) and dispatch.last() == "cpp"


@pytest.mark.parametrize("T, B, taken", [(5, 1, True), (1, 4, True), (5, 4, False)])
def test_batch_first(T: int, B: int, taken: bool, calls: list[bool]) -> None:
    """The extension takes it where both layouts are the same in memory."""
    theirs = torch.nn.LSTM(3, 9, 2, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, 3)
    with torch.no_grad():
        expected = flat(theirs(x))
        check(flat(rnnkern.accelerate(theirs)(x)), expected, expected)
    assert calls == [taken] or (not taken and not any(calls))


def test_what_is_left_to_the_general_way(calls: list[bool]) -> None:
    lstm, x = rnnkern.LSTM(3, 9, 2, dropout=0.5), torch.randn(5, 4, 3)
    with torch.no_grad():
        assert not torch.equal(lstm(x)[0], lstm(x)[0])  # dropout in training
        assert not calls
        lstm.eval()
        assert torch.equal(lstm(x)[0], lstm(x)[0]) and calls == [True, True]
        negative = torch._neg_view(x)
        check(flat(lstm(negative)), flat(lstm(-x)), flat(lstm(-x)))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(2, 4, 9\), got \[1, 4, 9\]"):
            lstm(x, (torch.zeros(1, 4, 9), torch.zeros(2, 4, 9)))
        torch.nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l1")
        before = len(calls)
        expected = flat(rnnkern.restore(copy.deepcopy(lstm))(x))
        check(flat(lstm(x)), expected, expected)
        assert calls[before:] == [False, True]  # not by its parameters, of which one is gone; by the weights


def test_functions_and_overridden_ops_take_it_too(calls: list[bool]) -> None:
    theirs, x = torch.nn.GRU(3, 9, 2, bidirectional=True), torch.randn(5, 4, 3)
    with torch.no_grad():
        expected = flat(theirs(x))
        y, h = rnnkern.functional.gru(x, None, list(theirs.parameters()), num_layers=2, bidirectional=True)
        check([y, h], expected, expected)
        with rnnkern.override():
            check(flat(theirs(x)), expected, expected)
    assert calls == [True, True]
