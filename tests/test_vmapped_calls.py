"""vmap over the inputs of whole calls, which is one call over more batch rows, against a loop over the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import KINDS, flat, gradients, pair
from tolerance import check, check_grad
from torch import Tensor
from torch.func import grad, vmap

import rnnkern
from rnnkern import _fold, functional

D = torch.float64
LAYOUTS = {"unbatched": (), "batched": (2,), "batch_first": (2,)}


def drawn(kind: str, layout: str, n: int = 3) -> tuple[Any, Tensor, Any]:
    """A module of two layers and directions, n inputs stacked at 0, and n initial states stacked at 1."""
    module = pair(kind, 3, 5, 2, bidirectional=True, batch_first=layout == "batch_first").ours
    batch = LAYOUTS[layout]
    sizes = (*batch, 4) if layout == "batch_first" else (4, *batch)
    h = [torch.randn(4, n, *batch, w, dtype=D, requires_grad=True) for w in (module.proj_size or 5, 5)]
    x = torch.randn(n, *sizes, 3, dtype=D, requires_grad=True)
    return module, x, tuple(h) if "LSTM" in kind else h[0]


def sample(hx: Any, i: int) -> Any:
    return tuple(h[:, i] for h in hx) if isinstance(hx, tuple) else hx[:, i]


def stacked(results: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*results, strict=True)]


@pytest.mark.parametrize("gradient", [True, False])
def test_batch_first_does_not_matter_to_samples_without_a_batch(gradient: bool) -> None:
    module, x, hx = drawn("LSTM", "unbatched")
    expected = vmap(lambda x, hx: flat(module(x, hx)), in_dims=(0, 1))(x, hx)
    module.batch_first = True
    with torch.set_grad_enabled(gradient):
        found = vmap(lambda x, hx: flat(module(x, hx)), in_dims=(0, 1))(x, hx)
        check(found, expected, expected)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("which", ["x", "hx", "both", "x alone"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind: str, layout: str, which: str, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, hx = drawn(kind, layout)
    alone = which == "x alone"
    dims = (None if which == "hx" else 0, None if which == "x" else 1)
    given = (x[0] if dims[0] is None else x, sample(hx, 0) if dims[1] is None else hx)
    pieces = [(x[0 if dims[0] is None else i], sample(hx, 0 if dims[1] is None else i)) for i in range(3)]
    monkeypatch.setattr(_fold, "beneath_vmap", None)  # where layers are mapped one by one
    with torch.set_grad_enabled(gradient):
        if alone:
            found = vmap(lambda x: flat(module(x)), in_dims=0)(x)
            expected = stacked([flat(module(v)) for v in x])
        else:
            found = vmap(lambda x, hx: flat(module(x, hx)), in_dims=dims)(*given)
            expected = stacked([flat(module(*v)) for v in pieces])
    check(found, expected, expected, f"{kind} {layout} {which}")
    if gradient:
        wrt = [x, *module.parameters(), *([] if alone else flat(hx))]
        truth = gradients(expected, wrt)
        check_grad(gradients(found, wrt), truth, truth, f"{kind} {layout} {which}, gradients")


@pytest.mark.parametrize("kind", KINDS)
def test_within_itself_and_around_gradients(kind: str) -> None:
    module, x, _ = drawn(kind, "batched")
    twice = vmap(vmap(lambda x: flat(module(x)), in_dims=1, out_dims=1), in_dims=0)(x)
    expected = stacked([flat(module(v)) for v in x])
    check(twice, expected, expected, "vmap of vmap")

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    truth = [torch.stack([grad(loss)(v) for v in x])]
    check_grad([vmap(grad(loss))(x)], truth, truth, "vmap of grad")
    check_grad([grad(lambda x: vmap(loss)(x).sum())(x)], truth, truth, "grad of vmap")


def test_errors_name_the_sizes_of_a_sample() -> None:
    module = rnnkern.LSTM(3, 5, dtype=D)
    x = torch.randn(6, 4, 2, 3, dtype=D)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\), got \[1, 7, 5\]"):
        vmap(lambda x: module(x, (torch.zeros(1, 7, 5, dtype=D),) * 2)[0])(x)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\), got \[1, 2, 4\]"):
        vmap(lambda x: module(x, (torch.zeros(1, 2, 4, dtype=D),) * 2)[0])(x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_functions_without_a_gradient(kind: str, batch_first: bool) -> None:
    """They take the short way of the modules, and give what they give with a gradient to come."""
    module = pair(kind, 3, 5, batch_first=batch_first).ours
    name = {"RNN": "rnn_tanh", "RNN relu": "rnn_relu", "GRU": "gru"}.get(kind, "lstm")
    run = getattr(functional, name)
    weights = list(module.parameters())
    x = torch.randn(4, 2, 3, dtype=D)
    expected = flat(run(x, None, weights, batch_first=batch_first))
    hx = module(x)[1]
    with torch.no_grad():
        check(flat(run(x, None, weights, batch_first=batch_first)), expected, expected, kind)
        again = flat(module(x, hx))
        check(flat(run(x, hx, weights, batch_first=batch_first)), again, again, f"{kind}, hx")
