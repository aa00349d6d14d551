"""The programs under examples/ do what they say: pip install '.[clients,demo]'."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stacks import D, draw, flat, gradients
from tolerance import check, check_grad

import rnnkern

FOLDER = Path(__file__).resolve().parents[1] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def example(name: str) -> ModuleType:
    """By its path: other distributions install packages that are called "examples"."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ppo() -> ModuleType:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    return example("recurrent_ppo")


@pytest.mark.parametrize("starts", ["none", "some", "first"])
def test_one_call_is_the_loop(ppo: ModuleType, starts: str) -> None:
    sequences, steps = 3, 7
    lstm = torch.nn.LSTM(4, 6, dtype=D)
    features, states = draw(sequences * steps, 4), (draw(1, sequences, 6), draw(1, sequences, 6))
    begins = torch.zeros(sequences, steps, dtype=D)
    if starts == "some":
        begins[0, 3] = begins[2, 0] = begins[2, 6] = 1
    elif starts == "first":
        begins[:, 0] = 1
    wrt: list[Any] = [features, *states, *lstm.parameters()]
    theirs = flat(ppo.RecurrentActorCriticPolicy._process_sequence(features, states, begins.flatten(), lstm))
    expected = gradients(theirs, wrt)
    rnnkern.accelerate(lstm)
    ours = flat(ppo.OneCallPolicy._process_sequence(features, states, begins.flatten(), lstm))
    check(ours, theirs, theirs, starts)
    check_grad(gradients(ours, wrt), expected, expected, starts)


def test_same_losses(ppo: ModuleType) -> None:
    theirs, ours = ppo.race(2, progress=False, hidden=16, n_steps=32, n_epochs=2)
    assert isinstance(ours.model.policy.lstm_actor, rnnkern.LSTM)
    assert type(theirs.model.policy.lstm_actor) is torch.nn.LSTM
    assert theirs.rewards == ours.rewards
    for a, b in zip(theirs.losses, ours.losses, strict=True):
        # Adam divides small gradients by themselves, and with them their rounding.
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5) and len(a) == 4
    assert theirs.losses[0] != theirs.losses[1]


def test_one_command(ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    threads, picture = torch.get_num_threads(), tmp_path / "new" / "curves.png"
    try:
        curves = ppo.main(["--small", "--out", str(picture)])
    finally:
        torch.set_num_threads(threads)
    assert [len(curve.rewards) for curve in curves] == [2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "times as fast" in said and str(picture) in said
