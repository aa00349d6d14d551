"""Padded calls with a gradient to come run as packed ones: nothing is computed of padding, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import KINDS, draw, flat, gradients, pair
from tolerance import check, check_grad
from torch import Tensor

from rnnkern import _call, _fast, _packing, _weights, dispatch

T, B = 6, 4
LENGTHS = torch.tensor([3, 0, 6, 5])


def states_of(module: Any) -> Any:
    widths = [module.proj_size or 6, *([6] if module.mode == "LSTM" else [])]
    leaves = [draw(2 * module.num_layers, B, width) for width in widths]
    return leaves, tuple(leaves) if len(leaves) > 1 else leaves[0]


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("restart", ["", "zero", "one", "each"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_padded(
    kind: str, restart: str, batch_first: bool, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pair(kind, 3, 6, num_layers=2, bidirectional=True, batch_first=batch_first).ours
    x = draw(*((B, T, 3) if batch_first else (T, B, 3)))
    leaves, hx = states_of(module)
    options: dict[str, Any] = {"lengths": LENGTHS, "return_states": True}
    if restart:
        options["reset"] = torch.rand(x.shape[:2]) < 0.3
    if restart in ("one", "each"):
        learned = [h.detach()[:, : 1 if restart == "one" else B].clone().requires_grad_() for h in leaves]
        leaves = [*leaves, *learned]
        options["reset_state"] = tuple(learned) if len(learned) > 1 else learned[0]
    wrt, results = [x, *leaves, *module.parameters()], []
    for packs in (True, False):
        monkeypatch.setattr(_packing, "worth_packing", lambda *_, packs=packs: packs)
        module.memory = memory if packs else "save"
        result = module(x, hx, **options)
        last = result[2][-1]
        assert (last[0] if isinstance(last, tuple) else last) is result[0]
        outputs = flat(result)
        results.append((outputs, gradients(outputs, wrt)))
    check(results[0][0], results[1][0], results[1][0], kind)
    check_grad(results[0][1], results[1][1], results[1][1], kind)


def seen_by_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of a layer from now on."""
    rows: list[int] = []
    layer = _call.layer

    def watched(cell: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(x.shape[0])
        return layer(cell, x, *args, **kwargs)

    monkeypatch.setattr(_call, "layer", watched)
    return rows


def test_taken_where_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, module, x = seen_by_layers(monkeypatch), pair("GRU", 3, 6).ours, draw(T, B, 3)
    module(x, lengths=LENGTHS)
    with torch.no_grad():
        module(x, lengths=LENGTHS)
    module(x, lengths=[0] * B)
    torch.func.vmap(lambda v: module(v, lengths=LENGTHS)[0])(draw(2, T, B, 3))
    without_gradient = [] if _fast.available() else [T * B]  # one call of the extension, which knows no layers
    assert rows == [14, *without_gradient, T * B, T * B]


def test_padding_is_never_read() -> None:
    module = pair("LSTM", 3, 6, bidirectional=True).ours
    x = draw(T, B, 3).detach()
    past = torch.arange(T).unsqueeze(1) >= LENGTHS
    x[past] = float("nan")
    x.requires_grad_()
    y, _ = module(x, lengths=LENGTHS)
    assert not y[past].any()
    found = torch.autograd.grad(
        y, [x, *module.parameters()], torch.ones_like(y).masked_fill(past[..., None], torch.nan)
    )
    assert all(d.isfinite().all() for d in found) and not found[0][past].any()


def test_gradcheck() -> None:
    """To the second order, and mapped over gradients."""
    module = pair("GRU", 2, 3).ours

    def f(x: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        parameters = {"weight_hh_l0": w}
        return torch.func.functional_call(module, parameters, (x, h), {"lengths": torch.tensor([2, 0, 3])})

    given = draw(3, 3, 2), draw(1, 3, 3), module.weight_hh_l0.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(f, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.skipif(not _fast.available(), reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 6, 5], [6] * 4, [0, 1], [2, 2, 0, 1, 2]])
def test_the_extension_finds_and_moves_the_same_rows(
    lengths: list[int], batch_first: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = torch.tensor(lengths), []
    x = torch.randn(T * len(lengths), 3).to(dtype)
    for there in (True, False):
        monkeypatch.setattr(_fast, "available", lambda there=there: there)
        plan = _packing._planned(given, T, batch_first)
        rows, inverse = plan[-2:]
        together = _packing._moved(x, rows)
        apart = _packing._moved(together, inverse)
        found.append((*plan, together, apart))
    assert all(map(torch.equal, *found))
    mine = torch.arange(T) < given[:, None] if batch_first else torch.arange(T)[:, None] < given
    assert torch.equal(apart, x * mine.flatten()[:, None])


@pytest.mark.skipif(not _fast.available(), reason="no extension")
def test_rows_that_are_not_there_are_refused() -> None:
    from rnnkern import _cpu

    with pytest.raises(IndexError, match="row 4 of 4"):
        _cpu.move_rows(torch.zeros(4, 3), torch.tensor([1, 4]), 1)
    assert _cpu.plan_rows(torch.tensor([1, 7]), T, False) is None
    assert _cpu.move_rows(torch.zeros(4, 3), torch.tensor([1, 2], dtype=torch.int32), 1) is None


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_extension_finds_the_same_h(
    kind: str, restart: bool, lengths: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The left side of the recurrent weights' gradient, by blocks of rows in C++ and by indices."""
    module = pair(kind, 3, 6, num_layers=2, bidirectional=True).ours
    leaves, hx = states_of(module)
    options: dict[str, Any] = {"reset": torch.rand(T, B) < 0.3} if restart else {}
    if lengths is not None:
        options["lengths"] = lengths
    x, copied, made, results = draw(T, B, 3), _weights.Entering._copied, [], []

    def watched(*args: Any) -> Any:
        made.append(copied(*args))
        return made[-1]

    for way in (watched, lambda *_: None):
        monkeypatch.setattr(_weights.Entering, "_copied", way)
        results.append(gradients([module(x, hx, **options)[0]], [*leaves, *module.parameters()]))
    if dispatch.unavailable("cpp") is None and options:
        assert len(made) == 4 and all(h is not None for h in made)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
