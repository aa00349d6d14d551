"""What automatic choice takes on a CUDA device: by measurement, else by the size model. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rnnkern import _cuda, dispatch
from rnnkern._cuda import Call, Device, cudnn_algorithm, verdict

H200 = Device("NVIDIA H200", 132, (9, 0))
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "call, algorithm",
    [
        (Call("lstm", 1024, 16, 768, FP16), "PERSIST_STATIC"),
        (Call("lstm", 1024, 16, 768, FP16, I=100), "STANDARD"),
        (Call("lstm", 1024, 16, 768, BF16), "STANDARD"),
        (Call("lstm", 1024, 12, 768, FP16), "STANDARD"),
        (Call("lstm", 1024, 136, 768, FP16), "STANDARD"),
        (Call("lstm", 1024, 16, 768, FP16, layers=2), "STANDARD"),
        (Call("gru", 1024, 16, 768, FP16), "STANDARD"),
        (Call("rnn_tanh", 64, 96, 768, FP16), "PERSIST_STATIC"),
        (Call("rnn_tanh", 64, 96, 1024, FP16), "STANDARD"),
        (Call("lstm", 64, 16, 192, FP32, gradient=False), "PERSIST_STATIC_SMALL_H"),
        (Call("lstm", 64, 16, 192, FP32), "STANDARD"),
        (Call("gru", 64, 16, 128, BF16, layers=3), "PERSIST_STATIC_SMALL_H"),
        (Call("rnn_relu", 64, 16, 384, BF16, gradient=False), "PERSIST_STATIC_SMALL_H"),
        (Call("lstm", 64, 16, 64, FP32, packed=True), "STANDARD"),
        (Call("lstm", 64, 16, 64, FP64), "STANDARD"),
        (Call("lstm", 64, 16, 64, FP32, projected=True), "STANDARD"),
    ],
    ids=str,
)
def test_algorithm_that_torch_picks(call: Call, algorithm: str) -> None:
    assert cudnn_algorithm(call, H200) == algorithm


def test_persistent_kernel_needs_a_large_device() -> None:
    assert cudnn_algorithm(Call("lstm", 64, 16, 512, FP16), Device("small", 46, (8, 6))) == "STANDARD"


@pytest.mark.parametrize("gradient", [False, True])
def test_model_takes_triton_where_cudnn_is_far_from_its_limit(gradient: bool) -> None:
    for cell, dtype, H in (("lstm", BF16, 512), ("gru", FP16, 256), ("gru", BF16, 1024)):
        found = verdict(Call(cell, 512, 64, H, dtype, gradient=gradient), H200)
        assert found.take == "triton" and "per_step" in found.why and "not measured" in found.why
    for call in (Call("lstm", 512, 16, 768, FP16, gradient=gradient), Call("lstm", 512, 16, 128, BF16)):
        assert verdict(call, H200).take == "torch"


def test_model_takes_torch_for_a_short_call() -> None:
    takes = [verdict(Call("gru", T, 64, 512, BF16), H200).take for T in (1, 4, 16, 64, 128, 4096)]
    assert takes[0] == "torch" and takes[-1] == "triton"
    assert takes == sorted(takes, key=["torch", "triton"].index)


def test_model_takes_torch_where_only_the_product_counts() -> None:
    assert verdict(Call("lstm", 64, 4096, 2048, BF16), H200).take == "torch"


@pytest.mark.parametrize(
    "device, word",
    [(Device("AMD Instinct MI300X", 304, (9, 4), hip=True), "AMD"), (Device("Tesla V100", 80, (7, 0)), "7.0")],
    ids=["AMD", "V100"],
)
def test_devices_without_kernels_of_ours(device: Device, word: str) -> None:
    found = verdict(Call("gru", 512, 64, 512, FP16), device)
    assert found.take == "torch" and word in found.why


def row(**changes: object) -> dict[str, object]:
    plain = {"device": H200.name, "cell": "gru", "precision": "bf16", "mode": "training", "stacked": False}
    return {**plain, "packed": False, "T": 512, "B": 64, "H": 512, "ratio": 0.9, **changes}


def test_measurements_come_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "measured.json"
    table.write_text(json.dumps({"rows": [row(), row(H=1024, ratio=1.6), row(mode="inference", ratio=3.0)]}))
    monkeypatch.setattr(_cuda, "MEASURED", table)
    monkeypatch.setattr(_cuda, "_rows", _cuda._rows.__wrapped__)
    monkeypatch.setattr(_cuda, "_verdict", _cuda._verdict.__wrapped__)
    call = Call("gru", 512, 64, 512, BF16)
    assert verdict(call, H200) == ("torch", "measured at T=512 B=64 H=512: 0.90 of cuDNN's speed")
    assert verdict(call._replace(H=900), H200).take == "triton"  # 1024 is nearer
    assert verdict(call._replace(B=100, gradient=False), H200).why.startswith("measured")
    far = (call._replace(B=200), call._replace(dtype=FP16), call._replace(layers=2), call._replace(packed=True))
    for other in far:
        assert "not measured" in verdict(other, H200).why
    assert "not measured" in verdict(call, H200._replace(name="NVIDIA H100")).why


def test_shipped_table_is_whole() -> None:
    for entry in json.loads(_cuda.MEASURED.read_text())["rows"]:
        assert entry.keys() == row().keys() and entry["ratio"] > 0


def test_transforms_never_meet_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.func, forward mode or torch.compile neither torch's kernels nor a trial on the device would do."""
    asked: list[Call] = []
    monkeypatch.setattr(_cuda, "device_of", lambda _: H200)
    monkeypatch.setattr(_cuda, "verdict", lambda call, _: asked.append(call) or _cuda.Verdict("torch", ""))
    choice = (torch.device("cuda", 0), BF16, "gru", 64, False, 512, dispatch.Sizes(512, 512))

    def wants(x: torch.Tensor) -> torch.Tensor:
        assert dispatch.wants_torch(*choice)  # functional.py goes on to the layers by itself
        return x

    torch.func.vmap(wants)(torch.ones(3))
    with torch.autograd.forward_ad.dual_level():
        wants(torch.ones(3))
    assert not asked
    wants(torch.ones(3))
    assert [call.H for call in asked] == [512]
