"""The trial that kernels pass on a device before automatic choice takes them, here in the interpreter: it can fail."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cooperative import together
from scans import DTYPES

from rnnkern import _cuda, dispatch
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, ScanSpec
from rnnkern.backends.triton import config, drivers, trial
from rnnkern.backends.triton.cells import STEPS

SCAN = dispatch.backend("triton")
CPU = torch.device("cpu")
SLOW = ("slstm",)  # four states to read and write at every step


@pytest.fixture(autouse=True)
def _untried() -> Iterator[None]:
    trial.failure.cache_clear()
    yield
    trial.failure.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WIDTHS", (5,))


def shorten(cell: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trial, "WIDTHS", (5,) if cell in SLOW else (5, 17))
    if cell in SLOW:
        patch.setattr(trial, "STEPS", 4)


@pytest.mark.parametrize(
    "cell, dtype", [(cell, dtype) for cell in STEPS for dtype in (DTYPES[:1] if cell in SLOW else DTYPES)], ids=str
)
def test_right_kernels_pass(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype != torch.bfloat16 or cell != "gru":  # the interpreter needs ten seconds for the size that a GPU is given
        shorten(cell, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert trial.trusted(CPU, cell, dtype, "ieee")


@pytest.mark.parametrize(
    "cell, dtype", [("lstm", torch.float32), ("gru", torch.bfloat16), ("slstm", torch.float16)], ids=str
)
def test_right_kernels_with_options_pass(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(cell, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert trial.trusted(CPU, cell, dtype, "ieee", options=True)


def test_both_drivers_are_tried() -> None:
    from rnnkern.backends.triton.config import choose, target_of
    from rnnkern.backends.triton.drivers import question

    for dtype in DTYPES:
        problems = [trial.problem("lstm", dtype, "ieee", width) for width in trial.WIDTHS]
        drivers = [choose(question(p, way, target_of(CPU))).driver for p in problems for way in ("forward", "backward")]
        assert drivers == ["batch_parallel"] * 2 + ["per_step"] * 2


class Wrong:
    """The backend with one result changed."""

    def __init__(self, name: str, change: float) -> None:
        self.name, self.change = name, change

    def forward(self, inputs: ScanInputs) -> ScanOutputs:
        return self.changed(SCAN.forward(inputs))

    def backward(self, *args: object) -> ScanGrads:
        return self.changed(SCAN.backward(*args))

    def changed(self, found):  # type: ignore[no-untyped-def]
        if hasattr(found, self.name):
            value = getattr(found, self.name)
            value = value[0] if isinstance(value, tuple) else value
            value.view(-1)[7] += self.change
        return found


@pytest.mark.parametrize("name", ["y", "final", "dgx", "dgh", "dstates"])
@pytest.mark.parametrize("change", [0.05, float("nan")])
@pytest.mark.usefixtures("small")
def test_a_wrong_number_anywhere_fails(name: str, change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("rnnkern.backends.triton")

    monkeypatch.setattr(package, "BACKEND", Wrong(name, change))
    with pytest.warns(RuntimeWarning, match=f"failed a trial of gru in torch.float32 on cpu.*{name}"):
        assert not trial.trusted(CPU, "gru", torch.float32, "ieee")
    with warnings.catch_warnings():  # said once, remembered after
        warnings.simplefilter("error", RuntimeWarning)
        assert not trial.trusted(CPU, "gru", torch.float32, "ieee")


def test_what_does_not_compile_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("rnnkern.backends.triton")

    class Broken:
        def forward(self, inputs: ScanInputs) -> ScanOutputs:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(package, "BACKEND", Broken())
    with pytest.warns(RuntimeWarning, match="PassManager::run failed"):
        assert not trial.trusted(CPU, "lstm", torch.float16, "ieee")


def test_a_driver_that_only_the_table_takes_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    target = config.INTERPRETER
    entry = {"target": target.name, "processors": target.processors, "cell": "gru", "dtype": "bfloat16",
             "exact": False, "direction": "forward", "H": 512, "B": 16,
             "config": {"driver": "persistent", "block_b": 8, "block_h": 8, "block_k": 64, "warps": 8, "stages": 1},
             }  # fmt: skip
    monkeypatch.setattr(trial, "shipped_table", lambda: config.read_table([entry]))
    monkeypatch.setattr(trial, "WIDTHS", (5,))
    monkeypatch.setattr(trial, "WIDE", 17)
    ran = []
    for name in ("plan_forward", "plan_backward"):

        def plan(*args: object, whole: object = getattr(drivers, name)) -> object:
            ran.append(args[-1])
            return whole(*args)  # type: ignore[operator]

        monkeypatch.setattr(importlib.import_module("rnnkern.backends.triton"), name, plan)
    with together():
        for dtype in (torch.bfloat16, torch.float16):
            assert trial.trusted(CPU, "gru", dtype, "ieee")
    assert ran == [None, None, "persistent", "persistent", None, None]


def test_automatic_choice_asks_the_model_and_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would be asked for, with the trial held on the CPU in its place."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(_cuda, "device_of", lambda index: _cuda.Device("NVIDIA H200", 132, (9, 0)))
    asked = []

    def trusted(where: torch.device, *kind: object) -> bool:
        asked.append((where, *kind))
        return passes

    monkeypatch.setattr(trial, "trusted", trusted)
    sizes = dispatch.Sizes(512, 512)
    for passes in (True, False):
        took = dispatch.wants_torch(device, torch.bfloat16, "lstm", 64, False, 512, sizes)
        assert took is not passes
    assert asked == [(device, "lstm", torch.bfloat16, "ieee")] * 2
    # cuDNN's small-H kernel, a short call, an empty one, a cell: torch's without a trial.
    for T, B, H in ((512, 64, 64), (1, 64, 512), (0, 64, 512), (512, 0, 512)):
        assert dispatch.wants_torch(device, torch.bfloat16, "lstm", B, False, T, replace_sizes(sizes, H))
    assert dispatch.wants_torch(device, torch.bfloat16, "lstm_cell", 64, False, 1)
    assert len(asked) == 2


def test_options_have_a_trial_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain scans of torch's cells the call has asked already."""
    asked = []

    def trusted(*kind: object) -> bool:
        asked.append(kind)
        return False

    monkeypatch.setattr(trial, "trusted", trusted)
    monkeypatch.setattr(dispatch, "backend", lambda name: SimpleNamespace(unsupported=lambda inputs: []))
    gx = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    plain = ScanSpec("lstm", (False,), ("w_hh",))
    assert dispatch._objections("triton", SimpleNamespace(spec=plain, gx=gx)) == []  # type: ignore[arg-type]
    clipped = SimpleNamespace(spec=dataclasses.replace(plain, grad_clip=1.0), gx=gx)
    (why,) = dispatch._objections("triton", clipped)  # type: ignore[arg-type]
    assert "its lstm with options failed a trial" in why
    assert asked == [(gx.device, "lstm", torch.float32, "ieee", True)]


def replace_sizes(sizes: dispatch.Sizes, H: int) -> dispatch.Sizes:
    return sizes._replace(I=H, H=H)
