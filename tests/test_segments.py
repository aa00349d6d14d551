"""The backward by segments of time gives what the backward of the whole gives, and is taken where it should be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from layers import Call, gradients, random_call
from tolerance import check_grad

from rnnkern import GRU, LSTM, _backward, _segments, dispatch
from rnnkern.cells import CELLS

BACKENDS = [name for name in dispatch.ORDER if dispatch.unavailable(name) is None]
T = 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [(False,), (True,), (True, True)], ids=str)
@pytest.mark.parametrize("cell, P", [*((cell, None) for cell in CELLS), ("lstm", 2)])
@pytest.mark.parametrize("reset", ["", "zero", "learned"])
def test_same_gradients(
    cell: str, P: int | None, reverse: tuple[bool, ...], reset: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = with_resets(random_call(cell, T=T, P=P, reverse=reverse), reset).skip_if_refused(backend)
    truth = gradients(call.written_out(), call.tensors)
    for count in (2, 3, T):
        monkeypatch.setattr(_backward, "edges_of_backward", lambda *_, count=count: _segments.evenly(T, count))
        found = gradients(call.run(backend), call.tensors)
        check_grad(found, truth, truth, f"{count} segments")


def with_resets(call: Call, reset: str) -> Call:
    if not reset:
        return call
    begins = torch.rand(call.T * call.B, len(call.groups)) < 0.4
    restart = tuple(torch.randn_like(s).requires_grad_() for s in call.states) if reset == "learned" else ()
    return replace(call, reset=begins, reset_states=restart)


def test_only_some_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backward, "edges_of_backward", lambda *_: _segments.evenly(T, 4))
    call = random_call("gru", T=T, reverse=(False,))
    whole = gradients(call.written_out(), call.tensors)
    for k, tensor in enumerate(call.tensors):
        detached = [t.detach() for t in call.tensors]
        detached[k] = tensor.detach().clone().requires_grad_()
        (found,) = gradients(call.with_tensors(*detached).run("reference"), [detached[k]])
        check_grad(found, whole[k], whole[k], f"tensor {k}")


@pytest.mark.parametrize(
    "module, taken",
    [
        (GRU(32, 32), True),
        (GRU(32, 32, bidirectional=True), False),  # its directions walk opposite ways
        (LSTM(32, 32), False),  # dgh is dgx: nothing is written twice
        (GRU(32, 32, dtype=torch.bfloat16), False),  # what is carried would be rounded
        (GRU(1024, 32), False),  # weight gradients larger than what would be saved
    ],
    ids=["GRU", "bidirectional", "LSTM", "bf16", "wide"],
)
def test_taken_where_it_saves(module: torch.nn.RNNBase, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def watch(*args):  # type: ignore[no-untyped-def]
        chosen.append(_segments.edges_of_backward(*args))
        return chosen[-1]

    monkeypatch.setattr(_backward, "edges_of_backward", watch)
    dtype = module.weight_hh_l0.dtype
    for B, smallest in ((16, 2**10), (16, 2**30)):
        monkeypatch.setattr(_segments, "SMALLEST", smallest)
        module(torch.randn(40, B, module.input_size, dtype=dtype))[0].sum().backward()
    assert chosen == [[0, 13, 26, 40] if taken else [0, 40], [0, 40]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_are_in_the_order_of_the_walk(reverse: bool, packed: bool) -> None:
    inputs = random_call("gru", T=T, B=2, reverse=(reverse,)).inputs()
    rows = [0, 4, 8, 14]
    if packed:  # the second sequence has three steps
        inputs = replace(inputs, offsets=torch.tensor([0, 2, 4, 6, 7, 8, 9]), gx=inputs.gx[:10])
        rows = [0, 4, 6 + 1, 10]
    parts = _segments.in_order(inputs, _segments.evenly(T, 3))
    assert all((a.begin < b.begin) != reverse for a, b in pairwise(parts))
    parts.sort()
    assert [(p.begin, p.end) for p in parts] == [(0, 2), (2, 4), (4, 7)]
    assert [(p.rows.start, p.rows.stop) for p in parts] == list(pairwise(rows))


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_segments(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many rows that the backward would be cut, and too few steps for it."""
    monkeypatch.setattr(_segments, "SMALLEST", 1)
    call = random_call("mgu", T=steps, B=32, reverse=(False,))
    truth = gradients(call.written_out(), call.tensors)
    check_grad(gradients(call.run("reference"), call.tensors), truth, truth)
