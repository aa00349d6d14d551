"""python -m rnnkern info and demo: small runs, bad input, and a demo that must fail where the trainings part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import _call, demo, dispatch, info
from rnnkern.__main__ import main
from rnnkern.cells import CELLS

WORDS = "Der Fuß fällt auf die Straße – und “kein Wort” dazu. "
SMALL = ["--hidden", "12", "--batch", "3", "--length", "8", "--steps", "12"]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 20, encoding="utf-8")
    return path


@pytest.fixture
def small(text_file: Path, tmp_path: Path) -> list[str]:
    return ["demo", *SMALL, "--text", str(text_file), "--out", str(tmp_path / "chart.png")]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rnnkern", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said to arguments that must end with argparse's exit status."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# info


def test_info_in_a_process_of_its_own():
    done = command("info")
    assert done.returncode == 0, done.stderr
    for word in (rnnkern.__version__, torch.__version__, *dispatch.backends(), *info.ENVIRONMENT, *CELLS):
        assert word in done.stdout
    for missing in filter(None, dispatch.backends().values()):
        assert missing in done.stdout


def test_info_refuses_an_unknown_instruction_set():
    if dispatch.unavailable("cpp") is not None:
        pytest.skip(f"no C++ backend: {dispatch.unavailable('cpp')}")
    done = command("info", RNNKERN_CPU_ISA="sse9")
    assert done.returncode == 2
    assert "RNNKERN_CPU_ISA=sse9" in done.stderr and "avx2" in done.stderr


@pytest.mark.parametrize("cell", CELLS)
def test_info_names_the_backend_that_a_call_takes(cell: str):
    inputs = info.plain_call(cell, T=3, B=2, H=8)
    name, why = info.chosen(inputs)
    kind, options = _call.TITLES[cell], {"nonlinearity": cell.rpartition("_")[2]} if "_" in cell else {}
    getattr(rnnkern, kind)(8, 8, **options)(torch.zeros(3, 2, 8))
    assert name == dispatch.last()
    assert why
    with rnnkern.use_backend("reference"):
        assert info.chosen(inputs) == ("reference", "asked for with use_backend")


def test_info_says_why_a_backend_was_passed_over(monkeypatch: pytest.MonkeyPatch):
    assert info.chosen(info.plain_call("lstm", dtype=torch.complex64)) == (
        "torch",
        "no scan backend has torch.complex64",
    )
    first, second, *_ = dispatch.ORDER
    monkeypatch.setattr(dispatch, "wants_torch", lambda *_, **__: False)
    monkeypatch.setattr(dispatch, "explain", lambda _: {first: ["a mask", "a clip"], second: []})
    name, why = info.chosen(info.plain_call("lstm"))
    assert name == second
    assert first in why and "a mask, a clip" in why


# demo


def test_demo_in_a_process_of_its_own(small: list[str]):
    done = command(*small)
    assert done.returncode == 0, done.stderr
    for words in (
        "Backend that ran rnnkern.LSTM: ",
        "held-out loss",
        "apart",
        "characters/s",
        "times as fast",
        "Chart",
    ):
        assert words in done.stdout
    assert "training both" in done.stderr  # the progress bar
    picture = Path(small[-1]).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize("cell", demo.CELLS)
@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_demo_agrees(cell: str, dtype: str, small: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*small, "--cell", cell, "--dtype", dtype, "--layers", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"rnnkern.{demo.CELLS[cell]}" in shown and dtype in shown


def test_demo_without_matplotlib(small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(small) == 0
    shown = capsys.readouterr().out
    assert "no chart: matplotlib is not installed" in shown and "held-out loss" in shown
    assert not Path(small[-1]).exists()


class Louder(rnnkern.LSTM):
    """Wrong from the first call."""

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output * 1.01, state


class WrongGradient(rnnkern.LSTM):
    """The right loss, and one gradient that is 1 % too large."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight_hh_l0.register_hook(lambda grad: grad * 1.01)


class LouderLater(rnnkern.LSTM):
    """Right at first, then wrong in training, as a kernel that spoils its weights' gradients now and then is."""

    calls = 0

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls > 3:
                output.register_hook(lambda grad: -grad)
        return output, state


class NotANumber(rnnkern.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return (output if torch.is_grad_enabled() else output * float("nan")), state


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Louder, "the first batch's loss is"),
        (WrongGradient, "the first gradient of rnn.weight_hh_l0 differs by 1.0e-02"),
        (LouderLater, "steps the held-out loss is"),
        (NotANumber, "the held-out loss of rnnkern.LSTM is nan"),
    ],
)
def test_demo_fails_where_the_trainings_part(
    kind: type[nn.LSTM],
    complaint: str,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(rnnkern, "LSTM", kind)
    assert main(small) == 1
    shown = capsys.readouterr().out
    assert "FAILED, torch.nn and rnnkern do not agree" in shown and complaint in shown


def test_exchanged_weights_that_do_not_give_the_same_loss():
    torch.manual_seed(0)
    models = [demo.CharacterModel(kind(6, 6), 5) for kind in (nn.LSTM, Louder)]
    theirs, ours = demo.Run("torch.nn.LSTM", models[0]), demo.Run("rnnkern.LSTM", models[1])
    held = torch.randint(5, (90,))
    ours.held.append(demo.held_out_loss(ours.model, held, 4, 8))
    with pytest.raises(demo.Parted, match="the same trained weights"):
        demo.exchanged(theirs, ours, held, 4, 8, torch.finfo(torch.float32).eps)


def test_allowed_difference_is_rounding_at_first_and_bounded_later():
    eps = torch.finfo(torch.float32).eps
    bounds = [demo.allowed(step, 2.0, eps) for step in range(0, 2000, 7)]
    assert bounds == sorted(bounds)
    assert bounds[0] < 1e-5 and bounds[-1] == 0.02
    assert demo.allowed(100, 2.0, torch.finfo(torch.float64).eps) < 1e-9


def test_held_out_loss_is_the_mean_over_every_character():
    torch.manual_seed(0)
    model = demo.CharacterModel(nn.LSTM(6, 6), 5).double()
    held = torch.randint(5, (41,))
    logits, _ = model(held[:-1, None])
    expected = nn.functional.cross_entropy(logits[:, 0], held[1:]).item()
    assert demo.held_out_loss(model, held, batch=1, length=7) == pytest.approx(expected, rel=1e-12)


# Text


def test_text_of_python_itself():
    text = demo.read_text(None, 64, torch.device("cpu"))
    assert len(text.train) > 300_000 and len(text.alphabet) > 90
    assert not text.alphabet.isascii()
    assert len(text.held) == int((len(text.train) + len(text.held)) * demo.HELD_OUT)
    assert text.decode(text.prompt().tolist()).strip()


def test_text_comes_back_and_batches_repeat(text_file: Path):
    text = demo.read_text(str(text_file), 8, torch.device("cpu"))
    assert text.decode(torch.cat([text.train, text.held]).tolist()) == WORDS * 20
    first, again = (list(text.batches(4, 3, 8, seed=5)) for _ in range(2))
    for (x, target), (x2, target2) in zip(first, again, strict=True):
        assert x.shape == (8, 3)
        assert torch.equal(x, x2) and torch.equal(target, target2)
        assert torch.equal(x[1:], target[:-1])
    assert not torch.equal(first[0][0], next(text.batches(1, 3, 8, seed=6))[0])


def test_text_without_pydoc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "--text" in refusal(["demo", "--out", str(tmp_path / "a.png")], capsys)


def test_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"abc\xff\xfe" * 1000)
    out = ["--out", str(tmp_path / "a.png")]
    assert "No such file" in refusal(["demo", "--text", str(tmp_path / "none"), *out], capsys)
    assert "has 9 characters; with --length 64 at least 1300" in refusal(["demo", "--text", str(short), *out], capsys)
    assert "is not UTF-8: invalid start byte at byte 3" in refusal(["demo", "--text", str(binary), *out], capsys)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--cell", "mamba"], "invalid choice: 'mamba'"),
        (["--steps", "0"], "at least 1, got '0'"),
        (["--hidden", "-3"], "at least 1, got '-3'"),
        (["--batch", "many"], "at least 1, got 'many'"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--out", "chart.jpg"], "ends in .png"),
        (["--out", "no/such/folder/chart.png"], "there is no folder"),
    ],
)
def test_bad_options(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert complaint in refusal(["demo", *arguments], capsys)


def test_no_command(capsys: pytest.CaptureFixture[str]):
    assert "required: command" in refusal([], capsys)
