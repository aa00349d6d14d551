"""generate keeps what it has packed of a network's weights; what it writes is that of a call which packs them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from isas import NATIVE
from torch import nn

import rnnkern
from rnnkern import _generate_native, generate

pytestmark = pytest.mark.skipif(not NATIVE, reason="no extension")
V, I, H = 30, 6, 17


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with rnnkern.use_backend("cpp"):
        yield


def made(embedding: Any, width: int = I, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.LSTM, nn.Linear]:
    found = (embedding, nn.LSTM(width, H, 2), nn.Linear(H, V))
    for part in found:
        if part is not None:
            part.to(dtype)
            for p in part.parameters():
                p.data.mul_(3)
    return found


def packed(model: Any) -> Any:
    return _generate_native._LAST[model[1]].engine


@pytest.mark.parametrize("tokens", [2, 40], ids=["embedded", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_change_without_trace_is_seen(tokens: int, dtype: torch.dtype) -> None:
    model, prompt = made(nn.Embedding(V, I), dtype=dtype), torch.randint(V, (3, 1))
    before = generate(model, prompt, tokens).tokens
    engine = packed(model)
    assert torch.equal(generate(model, prompt, tokens).tokens, before) and packed(model) is engine
    for part in model:
        for name, p in part.named_parameters():
            p.data.view(-1)[-1] += 50  # no version counter counts this
            found, wanted = (generate(one, prompt, tokens).tokens for one in (model, copy.deepcopy(model)))
            assert torch.equal(found, wanted), name
            assert packed(model) is not engine, name
            engine = packed(model)


def test_a_table_is_not_the_modules_own() -> None:
    model, prompt = made(nn.Embedding(V, I)), torch.randint(V, (3, 1))
    before = generate(model, prompt, 2).tokens
    old = model[0].weight.data
    model[0].weight.data = old.clone()
    old.fill_(9)
    assert torch.equal(generate(model, prompt, 2).tokens, before)


@pytest.mark.parametrize("embedding", [None, nn.Linear(V, I)], ids=["one-hot", "linear"])
def test_every_call_begins_anew(embedding: Any) -> None:
    model, prompt = made(embedding, V if embedding is None else I), torch.randint(V, (3, 1))
    state = tuple(torch.randn(2, 3, H) for _ in range(2))
    first, given = (generate(model, prompt, 20, state=s).tokens for s in (None, state))
    engine = packed(model)
    for s, wanted in ((None, first), (state, given), (None, first)):
        assert torch.equal(generate(model, prompt, 20, state=s).tokens, wanted)
    assert packed(model) is engine
    assert torch.equal(generate(model, prompt[:2], 20).tokens, first[:2]) and packed(model) is not engine


def test_from_several_threads() -> None:
    model = made(nn.Embedding(V, I))
    prompts = [torch.randint(V, (3, 1)) for _ in range(24)]
    wanted = [generate(copy.deepcopy(model), prompt, 50).tokens for prompt in prompts]

    def one(prompt: torch.Tensor) -> torch.Tensor:
        return generate(model, prompt, 50).tokens

    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(one, prompts), wanted, strict=True):
            assert torch.equal(found, expected)


def test_nothing_is_kept_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_generate_native, "KEPT", 1000)
    model = made(nn.Embedding(V, I))
    generate(model, torch.randint(V, (3, 1)), 5)
    assert model[1] not in _generate_native._LAST
