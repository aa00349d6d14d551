"""Programs that use torch's recurrent networks give on rnnkern what they give on torch: pip install '.[clients]'."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkern
from benchmarks import clients
from rnnkern import dispatch

AUTOMATIC = "torch" if dispatch.unavailable("cpp") else "cpp"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@contextlib.contextmanager
def on_rnnkern() -> Iterator[None]:
    """override(), under which rnnkern must have seen a call."""
    dispatch._choice.last = None
    with rnnkern.override(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="override:")  # what it would say of a call that it refused
        yield
    assert dispatch.last() == AUTOMATIC


def test_silero_vad_hears_the_same() -> None:
    pytest.importorskip("silero_vad", reason="silero-vad is not installed")
    model, signal = clients.silero(), clients.speech()
    expected = clients.probabilities(model, signal)
    with on_rnnkern():
        found = clients.probabilities(model, signal)
    assert expected.max() > 0.5 > 0.1 > expected.min()  # a signal that is speech in places
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_recurrent_ppo_learns_the_same() -> None:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    expected = clients.recurrent_ppo(hidden=16).learn(128)
    found = clients.recurrent_ppo(hidden=16)
    before = copy.deepcopy(found.policy.state_dict())
    rnnkern.accelerate(found.policy)
    assert isinstance(found.policy.lstm_actor, rnnkern.LSTM)
    found.learn(128)
    for (name, a), b in zip(found.policy.state_dict().items(), expected.policy.state_dict().values(), strict=True):
        # Adam divides small gradients by themselves, and with them their rounding.
        learned = (b - before[name]).abs().max()
        assert learned > 0 and (a - b).abs().max() <= 0.02 * learned, name


def test_deepar_forecasts_the_same(tmp_path: Path) -> None:
    for package in ("gluonts", "lightning"):
        pytest.importorskip(package, reason=f"{package} is not installed")

    def forecast() -> Tensor:
        import numpy

        torch.manual_seed(0)
        numpy.random.seed(0)
        forecaster = clients.Forecaster(1, tmp_path, hidden_size=16, num_batches_per_epoch=4, batch_size=8)
        predictor = forecaster.train()
        torch.manual_seed(1)
        return forecaster.samples(predictor)

    expected = forecast()
    with on_rnnkern():
        found = forecast()
    assert expected.std() > 0
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_opacus_takes_gradients_of_samples() -> None:
    """Its optimizer after its own LSTM's gradients of samples, and after those that torch.func makes of ours."""
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed")
    theirs, ours = clients.taggers(8, 16)
    x, y = torch.randn(6, 5, 8), torch.randint(3, (6,))

    def private(model: nn.Module, mode: str) -> tuple[Any, Any]:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
        made, optimizer, _ = opacus.PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), 0.5), data_loader=data, poisson_sampling=False,
            noise_multiplier=0.0, max_grad_norm=0.05, loss_reduction="sum", grad_sample_mode=mode,
        )  # fmt: skip
        return made, optimizer

    wrapped, optimizer = private(theirs, "hooks")
    clients.by_opacus(wrapped, x, y)
    expected = {name: p.grad_sample.clone() for name, p in theirs.named_parameters()}
    optimizer.step()

    found = clients.per_sample(ours, x, y)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    _, optimizer = private(ours, "no_op")
    for name, p in ours.named_parameters():
        p.grad_sample = found[name]
    optimizer.step()
    after = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p, after[name], rtol=1e-4, atol=1e-6), name


def test_opacus_hooks_take_a_module_with_one_output() -> None:
    """Its own hooks know layers of one output only: a subclass that gives no states will do."""
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed")

    class Sequences(rnnkern.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    torch.manual_seed(0)
    model = Sequences(4, 8, batch_first=True)
    x = torch.randn(3, 5, 4)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    wrapped(x).square().sum().backward()
    for k in range(3):
        y, _ = rnnkern.LSTM.forward(model, x[k : k + 1])
        alone = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        for p, gradient in zip(model.parameters(), alone, strict=True):
            assert torch.allclose(p.grad_sample[k], gradient, rtol=1e-4, atol=1e-6)
