"""rnnkern.tbptt: the numbers of the whole sequence, gradients of one chunk, memory of one chunk."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from stacks import KINDS, draw, example, flat, gradients, pair
from tolerance import check, check_grad

import rnnkern


@pytest.mark.parametrize("library", ["theirs", "ours"])
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_the_whole(kind: str, layout: str, library: str) -> None:
    """Outputs and last states; and gradients are those of the chunk alone, entered with numbers."""
    module = getattr(pair(kind, 3, 6, num_layers=2, batch_first=layout == "batch_first"), library)
    x, hx, _ = example(module, layout, T=7)
    time = 1 if layout == "batch_first" else 0
    y, final = module(x, hx)
    found, before = [], hx
    for part, (output, states) in zip(x.split(3, time), rnnkern.tbptt(module, x, 3, hx), strict=True):
        alone = module(part, before)
        wrt = [x, *module.parameters()]
        outputs, expected = flat((output, states)), flat(alone)
        truth = gradients(expected, wrt)
        check_grad(gradients(outputs, wrt), truth, truth, kind)
        before = tuple(h.detach() for h in states) if isinstance(states, tuple) else states.detach()
        found.append(output)
    check([torch.cat(found, time), *flat(before)], flat((y, final)), flat((y, final)), kind)


def test_the_states_before_the_first_step_may_be_learned() -> None:
    module, h0 = rnnkern.GRU(3, 6, dtype=torch.float64), draw(1, 2, 6)
    outputs = [y for y, _ in rnnkern.tbptt(module, draw(4, 2, 3), 2, h0)]
    assert torch.autograd.grad(outputs[0].sum(), h0)[0].any()
    assert torch.autograd.grad(outputs[1].sum(), h0, allow_unused=True) == (None,)


def test_twenty_thousand_steps_train() -> None:
    """One chunk's graph is gone when the next one runs, and the loss falls."""
    torch.manual_seed(0)
    module = rnnkern.LSTM(1, 8, proj_size=1)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    wave = torch.sin(torch.arange(20_001) * 0.3).mul(0.5).view(-1, 1, 1)
    losses, graphs = [], []
    for k, (y, hx) in enumerate(rnnkern.tbptt(module, wave[:-1], 200)):
        assert sum(graph() is not None for graph in graphs) <= 1  # the last one's, which `loss` still names
        loss = (y - wave[200 * k + 1 : 200 * k + 201]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        graphs.append(weakref.ref(loss))
        assert hx[0].requires_grad
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize(
    "module, x, chunk, error, text",
    [
        (rnnkern.GRU(3, 6, bidirectional=True), torch.zeros(4, 2, 3), 2, ValueError, "bidirectional"),
        (rnnkern.GRU(3, 6), torch.zeros(4, 2, 3), 0, ValueError, "chunk of one step or more, got 0"),
        (rnnkern.GRUCell(3, 6), torch.zeros(4, 2, 3), 2, TypeError, "got GRUCell"),
        (rnnkern.GRU(3, 6), [1, 2], 2, TypeError, "got list"),
    ],
    ids=["bidirectional", "no steps", "cell", "list"],
)
def test_refusals_come_at_once(module: Any, x: Any, chunk: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rnnkern.tbptt(module, x, chunk)
