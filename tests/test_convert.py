"""accelerate and restore: which modules change class, and that nothing else about a model changes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, flat
from tolerance import check
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rnnkern
from rnnkern.convert import PAIRS, left


class Tagger(nn.Module):
    """Recurrent modules where models keep them: attribute, list, dict, sequential, shared, nested, with a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.more = nn.ModuleList([nn.GRU(10, 4), nn.RNN(4, 3, nonlinearity="relu")])
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(3, 3), "gru": nn.GRUCell(3, 3), "rnn": nn.RNNCell(3, 3)})
        self.again = self.more[0]
        self.head = nn.Sequential(nn.Linear(3, 2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.first(self.embed(tokens))[0].transpose(0, 1)
        y = self.more[1](self.again(y)[0])[0]
        h = self.cells["lstm"](y[0])[0] + self.cells["gru"](y[1]) + self.cells["rnn"](y[2])
        return self.head(h)


class Own(nn.LSTM):
    """A user's class: what its forward relies on is not ours to know."""


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_a_nested_model_gives_the_same_and_comes_back() -> None:
    model = Tagger().double()
    before = copy.deepcopy(model)
    tokens = torch.randint(0, 11, (3, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = list(model.parameters())
    assert rnnkern.accelerate(model) is model
    assert isinstance(model.first, rnnkern.LSTM) and type(model.more[0]) is rnnkern.GRU
    assert model.more[1].mode == "RNN_RELU" and model.again is model.more[0]
    assert {type(c) for c in model.cells.values()} == {rnnkern.LSTMCell, rnnkern.GRUCell, rnnkern.RNNCell}
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(before.state_dict())
    for m in (before, model):
        loss = m(tokens).square().sum()
        loss.backward()
    expected = [p.grad for p in before.parameters()]
    check([p.grad for p in model.parameters()], expected, expected, "gradients")
    optimizer.step()
    assert not torch.equal(model.first.weight_hh_l0, before.first.weight_hh_l0)
    assert rnnkern.restore(model) is model
    assert types(model) == types(before)
    torch.optim.SGD(before.parameters(), lr=0.1).step()
    check([model(tokens)], [before(tokens)], [before(tokens)], "after a step and back")


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_a_module_by_itself(kind: str) -> None:
    options = {**KINDS, **CELLS}[kind]
    module = getattr(nn, kind.split()[0])(3, 5, **options)
    rnnkern.accelerate(rnnkern.accelerate(module))
    assert type(module) is getattr(rnnkern, kind.split()[0])
    rnnkern.restore(rnnkern.restore(module))
    assert type(module) is getattr(nn, kind.split()[0])


def test_hooks_and_modes_stay() -> None:
    module, seen = nn.GRU(3, 4).eval(), []
    module.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.weight_hh_l0.requires_grad_(False)
    rnnkern.accelerate(module)(torch.zeros(2, 1, 3))
    assert seen == ["before", rnnkern.GRU] and not module.training and not module.weight_hh_l0.requires_grad


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_modules_still_train(kind: str, when: str) -> None:
    """weight_norm of a recurrent weight: the properties move, the originals get the gradients, both ways and copied."""
    options = {**KINDS, **CELLS}[kind]
    name = kind.split()[0]
    theirs = getattr(nn, name)(3, 5, **options).double()
    ours = copy.deepcopy(theirs)
    hh = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    parametrizations.weight_norm(theirs, hh)
    if when == "after":
        rnnkern.accelerate(ours)
    parametrizations.weight_norm(ours, hh)
    if when == "before":
        rnnkern.accelerate(ours)
    assert isinstance(ours, getattr(rnnkern, name)) and type(ours).__name__ == f"Parametrized{name}"
    assert parametrize.type_before_parametrizations(ours) is getattr(rnnkern, name)
    x = torch.randn(4, 3, dtype=torch.float64)
    h = torch.randn(4, 5, dtype=torch.float64) if "Cell" in kind else None
    hx = (h, h) if kind == "LSTMCell" else h

    def compare(a: Any, b: Any, what: str) -> None:
        for m in (a, b):
            m.zero_grad()
            sum(o.square().sum() for o in flat(m(x, hx))).backward()
        expected = [p.grad for p in b.parameters()]
        assert all(g.any() for g in expected)
        check([p.grad for p in a.parameters()], expected, expected, what)

    compare(ours, theirs, "accelerated")
    for m in (ours, theirs):
        with torch.no_grad():
            for p in m.parameters():
                p -= 0.1 * p.grad
    compare(ours, theirs, "after a step")
    compare(copy.deepcopy(ours), theirs, "a copy")
    rnnkern.restore(ours)
    assert type(ours).__mro__[1] is getattr(nn, name)
    compare(ours, theirs, "restored")
    parametrize.remove_parametrizations(rnnkern.accelerate(ours), hh)
    assert type(ours) is getattr(rnnkern, name)
    again = rnnkern.restore(ours)
    assert type(again) is getattr(nn, name) and isinstance(getattr(again, hh), nn.Parameter)


def test_one_parametrized_module_does_not_touch_another() -> None:
    model = nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 4), nn.GRU(3, 4)])
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    parametrizations.weight_norm(model[1], "weight_ih_l0")
    rnnkern.accelerate(model)
    assert len({type(m) for m in model}) == 3
    assert not hasattr(type(model[0]), "weight_ih_l0") and not hasattr(type(model[1]), "weight_hh_l0")


def test_everything_else_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    patched = nn.GRU(3, 4)
    patched.forward = lambda x: x
    derived = Own(3, 4)
    parametrizations.weight_norm(derived, "weight_hh_l0")
    model = nn.ModuleDict(
        {"own": Own(3, 4), "patched": patched, "derived": derived, "plain": nn.GRU(3, 4), "linear": nn.Linear(2, 2)}
    )
    with caplog.at_level(logging.WARNING, "rnnkern"):
        rnnkern.accelerate(model)
    assert type(model["plain"]) is rnnkern.GRU
    assert type(model["own"]) is Own and type(model["patched"]) is nn.GRU and isinstance(model["derived"], Own)
    assert set(left(model)) == {"own", "patched", "derived"}
    text = caplog.text
    assert "own left as it is" in text and "not exactly one of torch.nn's classes" in text
    assert "patched left as it is: it has a forward of its own" in text
    assert "plain" not in text and "linear" not in text
    with caplog.at_level(logging.WARNING, "rnnkern"):
        rnnkern.accelerate(Own(3, 4))
    assert "the model itself left as it is" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_scripted_modules_are_left() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}, torch.qint8)
    kind = type(quantized[0])
    assert kind is not nn.LSTM
    assert list(left(rnnkern.accelerate(quantized))) == ["0"] and type(quantized[0]) is kind
    quantized(torch.zeros(2, 1, 3))
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 4)))
    assert left(rnnkern.accelerate(scripted)) == {"0": "a TorchScript LSTM"}
    scripted(torch.zeros(2, 1, 3))


def test_restore_refuses_what_torch_lacks_and_changes_nothing() -> None:
    class Derived(rnnkern.LSTM):
        pass

    model = nn.ModuleDict({"plain": rnnkern.GRU(3, 4), "derived": Derived(3, 4)})
    with pytest.raises(ValueError, match="restore: .*derived: .*Derived is a subclass of rnnkern.LSTM"):
        rnnkern.restore(model)
    assert type(model["plain"]) is rnnkern.GRU
    with pytest.raises(ValueError, match="the model itself"):
        rnnkern.restore(Derived(3, 4))


def test_pairs_are_all_of_torch() -> None:
    """Every concrete recurrent class that torch.nn exports has its twin here."""
    bases = (nn.RNNBase, nn.RNNCellBase)
    theirs = {v for v in vars(nn).values() if isinstance(v, type) and issubclass(v, bases) and v not in bases}
    assert theirs == {a for a, _ in PAIRS}
    assert all(issubclass(b, a) and b.__name__ == a.__name__ for a, b in PAIRS)
