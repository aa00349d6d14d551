"""Calls without gradients under automatic choice: one call of the extension for a whole stack (rnnkern._fast)."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from states import natural
from tolerance import check
from torch.utils._pytree import tree_leaves, tree_map
from written_out import KINDS

import rnnkern
from rnnkern import _cpu, _fast, dispatch
from rnnkern.cells import CELLS

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_torch_does_not_have(kind: str, dtype: torch.dtype, calls: list[bool]) -> None:
    """Layers of them, and one step; the yardstick is the reference. Batch norm's products are made by torch, and of
    layers only in the general way."""
    name, given, _ = KINDS[kind]
    states = CELLS[rnnkern.__dict__[name](1, 6, **given)._cell]
    for B, bias, two in product((1, 4), (True, False), (False, True)):
        modules = [getattr(rnnkern, f"{name}Cell")(3, 12, bias=bias, **given)]
        if kind != "LiGRU":
            modules.append(getattr(rnnkern, name)(3, 12, 2, bias=bias, bidirectional=two, **given))
        for module in modules:
            module = module.to(dtype).eval()
            shape = (B,) if module is modules[0] else (4 if two else 2, B)
            x = torch.randn(*((B,) if module is modules[0] else (5, B)), 3).to(dtype)
            hx = natural(states, [torch.randn(*shape, 12).to(dtype) for _ in states.states])
            for start in (None, hx):

                def run(module: Any, dtype: torch.dtype, start: Any = start, x: torch.Tensor = x) -> list[torch.Tensor]:
                    wide = start and tuple(h.to(dtype) for h in start)
                    return tree_leaves(module(x.to(dtype), wide if wide is None or len(wide) > 1 else wide[0]))

                with torch.no_grad():
                    found = run(module, dtype)
                    assert calls.pop() and not calls
                    with rnnkern.use_backend("reference"):
                        yardstick, truth = run(module, dtype), run(copy.deepcopy(module).double(), torch.float64)
                assert all(v.dtype == dtype for v in found)
                check(found, yardstick, truth, f"{kind} {B=} {bias=} {two=}")


@pytest.mark.parametrize("T, B, taken", [(5, 1, True), (1, 4, True), (5, 4, False)])
def test_batch_first(T: int, B: int, taken: bool, calls: list[bool]) -> None:
    """The extension takes it where both layouts are the same in memory."""
    theirs = torch.nn.LSTM(3, 9, 2, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, 3)
    with torch.no_grad():
        expected = flat(theirs(x))
        check(flat(rnnkern.accelerate(theirs)(x)), expected, expected)
    assert calls == [taken] or (not taken and not any(calls))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_step_of_lstm_with_a_gradient_to_come(batch_first: bool, bias: bool) -> None:
    """A cell's operations; everything else, and what torch refuses, is a layer's."""
    theirs = torch.nn.LSTM(3, 9, bias=bias, batch_first=batch_first, dtype=torch.float64)
    ours = rnnkern.accelerate(copy.deepcopy(theirs))
    x = torch.randn((4, 1, 3) if batch_first else (1, 4, 3), dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(1, 4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for start in (None, hx):
        found, expected = flat(ours(x, start)), flat(theirs(x, start))
        assert dispatch.last() == "torch"
        check(found, expected, expected)
        wrt = (x, *(start or ()))
        grads = [
            torch.autograd.grad(sum(v.cos().sum() for v in outputs), (*wrt, *module.parameters()))
            for outputs, module in ((found, ours), (expected, theirs))
        ]
        check(list(grads[0]), list(grads[1]), list(grads[1]), "gradients")
    ours(torch.cat((x, x), int(batch_first)))
    assert dispatch.last() == "cpp"
    for bad in (tuple(h[:, :1] for h in hx), tuple(h.float() for h in hx), (hx[0], hx[1][..., :1])):
        with pytest.raises(RuntimeError) as refused:
            theirs(x, bad)
        with pytest.raises(type(refused.value)):
            ours(x, bad)


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


def segmented(kind: str, T: int, B: int, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Every keyword of a call beyond torch.nn's."""
    groups = options["num_layers"] * (1 + options["bidirectional"])
    states = [torch.randn(groups, 1 if T % 2 else B, w).to(dtype) for w in (options.get("proj_size", 9), 9)]
    return {
        "lengths": torch.randint(0, T + 1, (B,)),
        "reset": torch.rand(T, B) < 0.3,
        "reset_state": tuple(states) if kind == "LSTM" else states[0],
        "return_states": True,
    }


def every_result(module: torch.nn.Module, x: torch.Tensor, keywords: dict[str, Any], backend: str | None) -> Any:
    dtype = next(module.parameters()).dtype

    def moved(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.no_grad(), rnnkern.use_backend(backend):
        return tree_leaves(module(x.to(dtype), **tree_map(moved, keywords)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_segments(kind: str, dtype: torch.dtype, calls: list[bool]) -> None:
    """Resets, lengths and all states, in every choice of them."""
    chosen = list(product((False, True), repeat=4))
    for n, options in enumerate(STACKS):
        if "proj_size" in options and kind != "LSTM":
            continue
        T, B = (1, 4) if n % 5 == 0 else (6 + n % 2, 1 + n % 3)
        ours = getattr(rnnkern, kind)(3, 9, **options).to(dtype)
        wide = copy.deepcopy(ours).double()
        x, given = torch.randn(T, B, 3).to(dtype), segmented(kind, T, B, options, dtype)
        for take in chosen:
            keywords = {name: v for (name, v), wanted in zip(given.items(), take, strict=True) if wanted}
            if "reset_state" in keywords and "reset" not in keywords:
                continue

            found = every_result(ours, x, keywords, None)
            yardstick, truth = (every_result(module, x, keywords, "reference") for module in (ours, wide))
            check(found, yardstick, truth, f"{options} {list(keywords)}")
    assert calls and all(calls) and len(calls) > 50


def test_segments_batch_first_and_lists(calls: list[bool]) -> None:
    gru = rnnkern.GRU(3, 9, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for B, T in ((4, 1), (1, 5)):
            x, reset = torch.randn(B, T, 3), torch.rand(B, T) < 0.5
            found = gru(x, reset=reset, lengths=[T] * B)
            assert calls.pop()
            with rnnkern.use_backend("reference"):
                expected = gru(x, reset=reset, lengths=[T] * B)
            check(flat(found), flat(expected), flat(expected))


@pytest.mark.parametrize(
    "keywords, error",
    [
        (
            {"reset": torch.zeros(4, 5, dtype=torch.bool)},
            r"reset: expected one value per row .*, shape \(5, 4\)",
        ),
        ({"reset": torch.zeros(5, 4, dtype=torch.uint8)}, "reset: expected a bool mask"),
        ({"reset_state": torch.zeros(1, 4, 9)}, "reset_state: only together with reset"),
        ({"reset": torch.ones(5, 4) > 0, "reset_state": torch.zeros(1, 2, 9)}, "reset_state: expected shape"),
        ({"lengths": [5, 6, 1, 1]}, "lengths: expected values from 0 to the 5 steps"),
        ({"lengths": torch.tensor([-1, 5, 1, 1])}, "lengths: expected values from 0"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, "lengths: expected integers"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, "lengths: expected one per batch row"),
    ],
    ids=lambda v: v[:25] if isinstance(v, str) else "",
)
def test_segments_that_do_not_fit(keywords: dict[str, Any], error: str, calls: list[bool]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=error):
        rnnkern.GRU(3, 9)(torch.randn(5, 4, 3), **keywords)
    assert not any(calls)
