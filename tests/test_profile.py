"""Traces of torch.profiler name rnnkern's kernels, whichever way a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import dispatch

KERNELS = "reference" if dispatch.unavailable("cpp") and dispatch.unavailable("numba") else None


def events(run: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile() as trace:
        run()
    return [event.key for event in trace.key_averages() if event.key.startswith("rnnkern::")]


def inference(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: module(x))


def training(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    return lambda: module(x)[0].sum().backward()


def ways() -> dict[str, Callable[[], Any]]:
    lstm, x = rnnkern.LSTM(4, 5), torch.randn(6, 2, 4)
    two = rnnkern.GRU(4, 5, 2, bidirectional=True)
    compiled = torch.compile(
        lambda x: rnnkern.functional.lstm(x, None, list(lstm.parameters()))[0], backend="aot_eager"
    )
    return {
        "inference": inference(lstm, x),
        "a cell": inference(rnnkern.LSTMCell(4, 5), x[0]),
        "layers": inference(two, x),
        "training": training(two, x),
        "vmap": lambda: torch.func.vmap(lambda v: lstm(v)[0])(x[None]),
        "per sample": lambda: torch.func.vmap(torch.func.grad(lambda v: lstm(v)[0].sum()))(x[None]),
        "compiled": lambda: compiled(x).sum().backward(),
    }


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("backend", [None, "reference"])
def test_named_in_a_trace(way: str, backend: str | None) -> None:
    run = ways()[way]
    with rnnkern.use_backend(backend or KERNELS):
        found = events(run)
        assert not events(lambda: torch.ones(2) + 1)
    name = backend or KERNELS or ("numba" if dispatch.unavailable("cpp") else "cpp")
    expected = [f"rnnkern::{name} {cell} {what}" for cell in ("lstm", "gru") for what in ("forward", "layer_forward")]
    assert any(event in expected for event in found), found
    if way in ("training", "per sample", "compiled"):
        assert any(event.endswith(" backward") for event in found), found


def test_under_override() -> None:
    module, x = nn.LSTM(4, 5), torch.randn(6, 2, 4)
    with rnnkern.override():
        found = events(inference(module, x))
    assert found or dispatch.last() == "torch"
