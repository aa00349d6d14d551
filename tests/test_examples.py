"""The programs under examples/ do what they say: pip install '.[clients,demo]'."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
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


# The sequence models: each runs small, says its numbers and draws; what it is made of is held to what it says.

SEQUENCES = {
    "capitals": ("statsmodels", {"counting", "one direction", "both directions"}),
    "dates": ("babel", {"exact", "dateutil"}),
    "digits": ("sklearn", {"lstm", "logistic regression"}),
    "language_model": (None, {"lstm", "counting", "xz"}),
    "memory": (None, {"adding", "copying"}),
    "sunspots": ("statsmodels", {"gru", "AR(9)", "seasonal naive"}),
    "voice": ("sklearn", {"gru", "loudness", "microseconds"}),
    "write_digits": ("sklearn", {"bits", "histogram", "legible"}),
}


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example by its name; they import their helpers as scripts do."""

    def load(name: str) -> ModuleType:
        if SEQUENCES[name][0] is not None:
            pytest.importorskip(SEQUENCES[name][0], reason=f"{SEQUENCES[name][0]} is not installed")
        monkeypatch.syspath_prepend(str(FOLDER))
        return example(name)

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SEQUENCES)
def test_small(name: str, sequence: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    module, picture = sequence(name), tmp_path / "new" / "picture.png"
    if name == "language_model":
        module.ORDERS, module.HIDDEN = 2, 48
    if name == "capitals":
        module.PACKAGES = module.PACKAGES[-1:]  # a third of the text
    found = module.main(["--steps", "3", "--out", str(picture)])
    assert set(found) == SEQUENCES[name][1]
    assert all(v == v for value in found.values() for v in (value.values() if isinstance(value, dict) else [value]))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main(["--steps", "0"])


def test_dates_of_the_test_are_not_trained_on(sequence: Any) -> None:
    dates = sequence("dates")
    train, test = ({iso for _, iso in dates.draw(500, 0, test)} for test in (False, True))
    assert not train & test
    assert dates.written(0, "en_US", "full") == ("Monday, January 1, 1900", "1900-01-01")
    assert dates.by_rules("January 1, 1900") == "1900-01-01" and not dates.by_rules("1. Januar")


def test_capitals_taken_out_and_put_back(sequence: Any) -> None:
    capitals = sequence("capitals")
    text = "The lists, as Python has them. A tuple: it's fixed."
    words, tags = capitals.words_of(text + " ")
    assert words == ["the", "lists", "as", "python", "has", "them", "a", "tuple", "it's", "fixed"]
    assert capitals.written(words, tags) == text
    assert capitals.f1(tags, tags) == 1.0 and capitals.f1([(False, 0)] * len(tags), tags) == 0.0
    assert capitals.by_counting(words, tags, words) == tags


def test_counting_knows_what_repeats(sequence: Any) -> None:
    """Of a text that repeats three characters, hardly a bit is left once two are seen; of noise, all bits are."""
    module = sequence("language_model")
    text = module.Text("abc", "abc", torch.arange(900) % 3, torch.arange(90) % 3)
    assert module.counted(text, 1) == pytest.approx(np.log2(3), abs=0.01) and module.counted(text, 3) < 0.01
    noise = module.Text("noise", "abcd", torch.randint(4, (9000,)), torch.randint(4, (900,)))
    assert module.counted(noise, 2) == pytest.approx(2, abs=0.05)


def test_memory_answers(sequence: Any) -> None:
    """The two problems are what they say."""
    memory = sequence("memory")
    x, total = memory.adding()
    assert torch.equal(x[..., 1].sum(0), torch.full((memory.BATCH,), 2.0))
    check((x[..., 0] * x[..., 1]).sum(0), total, total)
    x, first = memory.copying()
    assert torch.equal(x[0].argmax(-1), first) and not x[1:, :, : memory.KINDS].any()


def test_sunspot_baselines(sequence: Any) -> None:
    """The autoregression's first forecast is statsmodels' own, interval and all."""
    sunspots = sequence("sunspots")
    series = 150 + 40 * np.sin(2 * np.pi * np.arange(309) / 11) + np.random.default_rng(0).normal(0, 5, 309)
    found = sunspots.autoregressive(series)[0]
    end = sunspots.TRAINED
    theirs = sunspots.AutoReg(series[:end], lags=9).fit().get_prediction(end, end + sunspots.AHEAD - 1)
    low, high = theirs.conf_int(alpha=0.2).T
    for got, wanted in zip(found.T.numpy(), (low, theirs.predicted_mean, high), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert sunspots.seasonal(series).shape == sunspots.autoregressive(series).shape


def test_a_written_row_depends_on_what_is_above_and_left(sequence: Any) -> None:
    """No pixel's distribution sees the pixel itself, or one that is written later."""
    write = sequence("write_digits")
    model, images = write.Writer(16, 8).eval(), torch.randint(17, (1, 8, 8))
    other = images.clone()
    other[0, 3, 4] = (other[0, 3, 4] + 5) % 17
    with torch.no_grad():
        a, b = (model(torch.tensor([7]), x).flatten(1, 2) for x in (images, other))
    changed = (a != b).any(-1)[0]
    assert not changed[: 3 * 8 + 5].any() and changed[3 * 8 + 5] and changed[4 * 8 :].any()


def test_voice_features_are_causal(sequence: Any) -> None:
    voice = sequence("voice")
    sound, spoken = voice.recording(np.random.default_rng(0), 100)
    assert 0 < spoken.mean() < 1
    later = sound.copy()
    later[50 * voice.FRAME :] = 0
    assert np.array_equal(voice.features(sound)[:50], voice.features(later)[:50])


def test_padding_and_greedy_decoding(sequence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence("memory")
    common = sys.modules["common"]
    rows, lengths = common.pad([[1, 2, 3], [4]], 9)
    assert rows.tolist() == [[1, 4], [2, 9], [3, 9]] and lengths.tolist() == [3, 1]
    from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

    model = Seq2Seq(Encoder(10, 4, 5), Decoder(6, 4, 5))
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0, 0]))
    written, weights = common.greedy(model, rows, lengths, begin=0, end=5, most=4)
    assert written.tolist() == [[3, 3]] * 4 and weights is None
    assert common.greedy(model, rows, lengths, begin=0, end=3, most=4)[0].tolist() == [[3, 3]]
