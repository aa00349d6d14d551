"""The modules on the Triton backend against torch.nn: outputs, states, and the gradients of everything."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tolerance import check, check_grad
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import dispatch
from rnnkern.backends.triton import interpreter

KINDS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "GRU": {},
    "LSTM": {},
    "LSTM projected": {"proj_size": 2},
}
I, H, T, B = 3, 5, 4, 3


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested results; of a packed sequence its data."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    return [t for v in value for t in flat(v)]


def results(module: nn.Module, x: Any, hx: Any) -> tuple[list[Tensor], list[Tensor]]:
    outputs = flat(module(x, hx))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    wrt = [*module.parameters(), *(t for t in flat([x, hx]) if t.requires_grad)]
    return outputs, list(torch.autograd.grad(outputs, wrt, weights))


def given(kind: str, dtype: torch.dtype, layers: int, both: bool) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    name = kind.partition(" ")[0]
    options = {"num_layers": layers, "bidirectional": both, **KINDS[kind]}
    ours = getattr(rnnkern, name)(I, H, **options).to(dtype)
    theirs = getattr(nn, name)(I, H, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I).to(dtype).requires_grad_()
    n, P = layers * (1 + both), KINDS[kind].get("proj_size", H)
    hx: Any = torch.randn(n, B, P).to(dtype).requires_grad_()
    if name == "LSTM":
        hx = (hx, torch.randn(n, B, H).to(dtype).requires_grad_())
    return ours, theirs, x, hx


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_()
    return tuple(wide(v) for v in value)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_modules_give_what_torch_gives(kind: str, dtype: torch.dtype, packed: bool) -> None:
    two = dtype == torch.float32
    ours, theirs, x, hx = given(kind, dtype, 2 if two else 1, two)
    exact, x_exact, hx_exact = copy.deepcopy(theirs).double(), wide(x), wide(hx)

    def sequence(v: Tensor) -> Any:
        return pack_padded_sequence(v, torch.tensor([2, 4, 1]), enforce_sorted=False) if packed else v

    with rnnkern.use_backend("triton"):
        outputs, grads = results(ours, sequence(x), hx)
        assert dispatch.last() == "triton"
    expected, expected_grads = results(theirs, sequence(x), hx)
    truth, truth_grads = results(exact, sequence(x_exact), hx_exact)
    check(outputs, expected, truth, kind)
    check_grad(grads, expected_grads, truth_grads, kind, dtype)


BEYOND: dict[str, dict[str, Any]] = {
    "RNN": {},
    "GRU": {},
    "LSTM": {},
    "RNN with options": {"zoneout": 0.2, "recurrent_dropout": 0.3, "recurrent_dropout_mode": "step"},
    "GRU with options": {"layer_norm": True, "recurrent_dropout": 0.3, "recurrent_dropout_mode": "candidate"},
    "LSTM with options": {
        "zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "layer_norm": True, "peephole": True, "cell_clip": 2.0,
        "grad_clip": 4.0,
    },
    "IndRNN": {"recurrent_dropout": 0.3},
    "SLSTM": {"recurrent_dropout": 0.3, "recurrent_dropout_mode": "candidate", "grad_clip": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", BEYOND)
def test_what_torch_does_not_have(kind: str) -> None:
    """Options, lengths, resets and all states, against the reference."""
    ours = getattr(rnnkern, kind.partition(" ")[0])(I, H, 2, bidirectional=True, **BEYOND[kind])
    x = torch.randn(T, B, I, requires_grad=True)
    lengths, reset = [4, 0, 2], torch.rand(T, B) < 0.3
    found = []
    for name, module, value in (
        ("triton", ours, x),
        ("reference", ours, x),
        ("reference", copy.deepcopy(ours).double(), wide(x)),
    ):
        torch.manual_seed(4)
        with rnnkern.use_backend(name):
            y, final, states = module(value, lengths=lengths, reset=reset, return_states=True)
            outputs = flat([y, final, states])
            grads = torch.autograd.grad([o.square().sum() for o in outputs], [value, *module.parameters()])
            found.append((outputs, list(grads)))
    check(*(outputs for outputs, _ in found), kind)  # type: ignore[arg-type]
    check_grad(*(grads for _, grads in found), kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_inference_and_cells(kind: str) -> None:
    ours, theirs, x, hx = given(kind, torch.float32, 1, False)
    step, torchs = getattr(rnnkern, f"{kind}Cell")(I, H), getattr(nn, f"{kind}Cell")(I, H)
    torchs.load_state_dict(step.state_dict())
    for mine, other, value, states in (
        (ours, theirs, x, hx),
        (step, torchs, x[0], hx[0] if kind != "LSTM" else (hx[0][0], hx[1][0])),
    ):
        with torch.no_grad(), rnnkern.use_backend("triton"):
            found = flat(mine(value, states))
            assert dispatch.last() == "triton"
        with torch.no_grad():
            expected = flat(other(value, states))
            exact = flat(copy.deepcopy(other).double()(wide(value), wide(states)))
        check(found, expected, exact, kind)


def test_bf16_is_refused_where_the_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rnnkern.backends.triton"], "has_bf16", lambda: False)
    model, x = rnnkern.GRU(I, H).bfloat16(), torch.randn(T, B, I).bfloat16()
    with rnnkern.use_backend("triton"), pytest.raises(RuntimeError, match="bfloat16: Triton's interpreter"):
        model(x)


def test_the_repair_is_seen_and_so_is_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.triton.runtime.interpreter.InterpreterBuilder
    assert interpreter.has_bf16()
    for name in ("create_dot", "cast_impl"):
        with monkeypatch.context() as patch:
            patch.setattr(builder, name, getattr(builder, name).__closure__[0].cell_contents)
            if name == "cast_impl":  # versions differ in the one that a kernel's cast goes through
                for other in ("create_fp_trunc", "create_fp_to_fp"):
                    patch.setattr(builder, other, getattr(builder, other).__closure__[0].cell_contents)
            interpreter.has_bf16.cache_clear()
            assert not interpreter.has_bf16(), name
    interpreter.has_bf16.cache_clear()
    assert interpreter.has_bf16()


def test_automatic_choice_takes_no_interpreter() -> None:
    rnnkern.GRU(I, H)(torch.randn(T, B, I))
    assert dispatch.last() not in (None, "triton")
