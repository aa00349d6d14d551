"""rnnkern.init: the values of the papers, for networks, cells and whole models of either library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import init


@pytest.mark.parametrize("library", [nn, rnnkern])
def test_forget_bias(library: Any) -> None:
    lstm = library.LSTM(3, 4, 2, bidirectional=True)
    before = {name: value.clone() for name, value in lstm.state_dict().items()}
    assert init.forget_bias_(lstm, 1.5) is lstm
    for name, value in lstm.state_dict().items():
        wanted = before[name].clone()
        if "bias" in name:
            wanted[4:8] = 1.5 if "bias_ih" in name else 0.0
        assert torch.equal(value, wanted), name


def test_chrono() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([rnnkern.LSTM(3, 4000), nn.GRUCell(3, 4000)])
    init.chrono_(model, 100.0)
    i, f, _, _ = (model[0].bias_ih_l0 + model[0].bias_hh_l0).chunk(4)
    _, z, _ = (model[1].bias_ih + model[1].bias_hh).chunk(3)
    assert torch.equal(i, -f)
    for bias in (f, z):
        times = bias.exp()
        assert 1 <= times.min() < 1.5 and 98.5 < times.max() <= 99.001
        assert abs(times.mean() - 50) < 2


def test_chrono_remembers_as_long_as_it_says() -> None:
    """With no input and no recurrence a unit keeps f = u / (1 + u) a step: 1/e of it after about u + 1/2 steps."""
    cell = init.chrono_(nn.LSTMCell(1, 1, dtype=torch.float64), 1000.0)
    u = cell.bias_ih[1].exp().item()
    kept = cell.bias_ih[1].sigmoid().item() ** (u + 0.5)
    assert kept == pytest.approx(0.368, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, gates", [("RNN", 1), ("LSTM", 4), ("GRU", 3), ("LSTMCell", 4)])
def test_orthogonal(name: str, gates: int, dtype: torch.dtype) -> None:
    module = init.orthogonal_(getattr(rnnkern, name)(3, 8, dtype=dtype), 2.0)
    weight = module.weight_hh if name.endswith("Cell") else module.weight_hh_l0
    for gate in weight.detach().double().chunk(gates):
        assert (gate @ gate.t() - 4 * torch.eye(8)).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)


def test_orthogonal_projected() -> None:
    lstm = init.orthogonal_(rnnkern.LSTM(3, 8, proj_size=2))
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        assert (gate.t() @ gate - torch.eye(2)).abs().max() < 1e-5


def test_identity_keeps_a_state() -> None:
    rnn = init.identity_(rnnkern.RNN(1, 5, nonlinearity="relu"))
    h = torch.rand(1, 2, 5)
    assert torch.equal(rnn(torch.zeros(50, 2, 1), h)[1], h)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: init.forget_bias_(nn.GRU(2, 3)), ValueError, "GRU has no LSTM in it"),
        (lambda: init.forget_bias_(nn.LSTM(2, 3, bias=False)), ValueError, "LSTM was made with bias=False"),
        (lambda: init.chrono_(nn.Linear(2, 3), 9), ValueError, "Linear has no LSTM or GRU in it"),
        (lambda: init.chrono_(nn.LSTM(2, 3), 2), ValueError, "above 2 steps, got 2"),
        (lambda: init.chrono_(nn.LSTM(2, 3), float("inf")), ValueError, "a finite number above 2 steps, got inf"),
        (lambda: init.identity_(nn.LSTM(2, 3)), ValueError, "has no RNN"),
        (lambda: init.orthogonal_(torch.zeros(3, 3)), TypeError, "got Tensor"),
    ],
    ids=["other cell", "no bias", "nothing", "too short", "for ever", "LSTM", "tensor"],
)
def test_refusals(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("library", [nn, rnnkern])
@pytest.mark.parametrize("name", ["orthogonal_", "identity_", "forget_bias_", "chrono_"])
def test_parameters_that_are_made_of_others_are_refused(name: str, library: Any) -> None:
    """Nothing would be set, or what the parametrization does not keep; and nothing before them is changed."""
    own = {"orthogonal_": "weight_hh", "identity_": "bias_ih"}.get(name, "bias_hh")
    model = nn.ModuleList(getattr(library, "RNN" if name == "identity_" else "LSTM")(3, 4) for _ in range(2))
    nn.utils.parametrize.register_parametrization(model[1], f"{own}_l0", nn.Identity())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"{name}: {own}_l0 of .* is no parameter: it is made of others"):
        getattr(init, name)(model, **({"longest": 9.0} if name == "chrono_" else {}))
    assert all(map(torch.equal, before, model.parameters()))
