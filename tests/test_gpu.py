"""The Triton backend on a GPU: ``pytest -m gpu``. Truth is fp64 on the CPU, the yardstick cuDNN's own error.

Where torch has no kernel (resets, lengths) the yardstick is the reference in the same dtype. What the interpreter can
show without a GPU is in tests/triton.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import D, flat
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# B and H of every GPU shape of the benchmark; long sequences are cut, for the CPU computes them in fp64.
SHAPES = [
    (1, 1, 512), (48, 1, 256), (24, 1, 1024), (48, 16, 128), (48, 16, 256), (32, 16, 512), (24, 16, 768),
    (16, 16, 1024), (48, 64, 128), (32, 64, 256), (16, 64, 512), (8, 64, 1024), (8, 256, 512), (4, 256, 1024),
    (4, 16, 2048), (24, 64, 200), (8, 64, 650),
]  # fmt: skip
on_cells = pytest.mark.parametrize("cell", CELLS)
on_precisions = pytest.mark.parametrize("precision", PRECISIONS)
on_drivers = pytest.mark.parametrize("driver", ["batch_parallel", "per_step"])


@contextmanager
def products(precision: str) -> Iterator[None]:
    """The switches that torch.nn obeys: whether fp32 products are rounded to TF32."""
    owners = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = precision == "tf32"
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.allow_tf32 = value


@contextmanager
def forced(driver: str) -> Iterator[None]:
    """RNNKERN_TRITON_CONFIG naming a driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKERN_TRITON_CONFIG", f"driver={driver}")
        yield


def twins(cell: str, dtype: torch.dtype, H: int, I: int | None = None, **kwargs: Any) -> tuple[Any, Any, Any]:
    """torch.nn's module and ours in `dtype` on the GPU, and ours in fp64 on the CPU, with the same rounded weights."""
    name, options = CELLS[cell]
    theirs = getattr(torch.nn, name)(I or H, H, dtype=dtype, device="cuda", **options, **kwargs)
    ours = getattr(rnnkern, name)(I or H, H, dtype=dtype, device="cuda", **options, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, copy.deepcopy(ours).cpu().double()


def step(module: Any, x: Tensor, *args: Any, backend: str | None = None, pack: Any = None, **kwargs: Any) -> Any:
    """Outputs, and the gradients of input and weights, on the CPU."""
    leaf = x.detach().requires_grad_()
    with rnnkern.use_backend(backend):
        out = flat(module(pack(leaf) if pack else leaf, *args, **kwargs)[:2])
        assert backend is None or dispatch.last() == backend
        found = gradients_on(out, [leaf, *module.parameters()])
    return [v.detach().cpu() for v in out], [v.cpu() for v in found]


def gradients_on(outputs: list[Tensor], wrt: list[Tensor]) -> list[Tensor]:
    """Of a fixed random projection, drawn on the CPU so that it is the same on every device."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, dtype=D, generator=generator).to(o.device, o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, wrt, weights))


def compare(ours: Any, yardstick: Any, truth: Any, what: str = "") -> None:
    check(ours[0], yardstick[0], truth[0], f"{what} outputs")
    check_grad(ours[1], yardstick[1], truth[1], f"{what} gradients")


@on_cells
@on_precisions
@pytest.mark.parametrize("T, B, H", SHAPES)
def test_benchmark_shapes(cell: str, precision: str, T: int, B: int, H: int) -> None:
    dtype = PRECISIONS[precision]
    theirs, ours, exact = twins(cell, dtype, H)
    x = torch.randn(T, B, H, device="cuda", dtype=dtype)
    with products(precision):
        compare(step(ours, x, backend="triton"), step(theirs, x), step(exact, x.cpu().double(), backend="reference"))


@on_cells
@on_drivers
@pytest.mark.parametrize("precision", [*PRECISIONS, "fp64"])
@pytest.mark.parametrize("T, B, H", [(5, 3, 17), (7, 33, 64), (3, 1, 33)])
def test_drivers(cell: str, driver: str, precision: str, T: int, B: int, H: int) -> None:
    dtype = PRECISIONS.get(precision, D)
    if dtype == D and driver == "batch_parallel":
        H = 16  # the most that it holds
    theirs, ours, exact = twins(cell, dtype, H, I=9, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, 9, device="cuda", dtype=dtype)
    with products(precision), forced(driver):
        compare(step(ours, x, backend="triton"), step(theirs, x), step(exact, x.cpu().double(), backend="reference"))


@on_cells
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed(cell: str, precision: str) -> None:
    dtype = PRECISIONS[precision]
    theirs, ours, exact = twins(cell, dtype, 200, bidirectional=True)
    lengths = torch.randint(1, 41, (33,))
    x = torch.randn(40, 33, 200, device="cuda", dtype=dtype)

    def pack(leaf: Tensor) -> Any:
        return pack_padded_sequence(leaf, lengths, enforce_sorted=False)

    with products(precision):
        compare(
            step(ours, x, backend="triton", pack=pack),
            step(theirs, x, pack=pack),
            step(exact, x.cpu().double(), backend="reference", pack=pack),
        )


@on_cells
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("option", ["lengths", "reset"])
def test_what_cudnn_lacks(cell: str, precision: str, option: str) -> None:
    dtype = PRECISIONS[precision]
    _, ours, exact = twins(cell, dtype, 128, bidirectional=True)
    T, B = 20, 16
    x = torch.randn(T, B, 128, device="cuda", dtype=dtype)
    given: dict[str, Tensor] = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.1}
    cpu = {option: given[option]}
    cuda = {option: given[option].cuda()}
    with products(precision):
        compare(
            step(ours, x, backend="triton", **cuda),
            step(ours, x, backend="reference", **cuda),
            step(exact, x.cpu().double(), backend="reference", **cpu),
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slstm(precision: str) -> None:
    """Four states, heads, and units that begin anew."""
    dtype = PRECISIONS[precision]
    ours = rnnkern.SLSTM(128, 256, num_heads=4, bidirectional=True, dtype=dtype, device="cuda")
    exact = copy.deepcopy(ours).cpu().double()
    x, reset = torch.randn(20, 16, 128, device="cuda", dtype=dtype), torch.rand(20, 16) < 0.1
    with products(precision):
        compare(
            step(ours, x, backend="triton", reset=reset.cuda()),
            step(ours, x, backend="reference", reset=reset.cuda()),
            step(exact, x.cpu().double(), backend="reference", reset=reset),
        )


def test_projection() -> None:
    theirs, ours, exact = twins("lstm", torch.float32, 256, proj_size=96)
    x = torch.randn(30, 16, 256, device="cuda")
    with products("fp32"):
        compare(step(ours, x, backend="triton"), step(theirs, x), step(exact, x.cpu().double(), backend="reference"))


@on_cells
@on_drivers
def test_a_hundred_runs_give_the_same_bits(cell: str, driver: str) -> None:
    _, ours, _ = twins(cell, torch.bfloat16, 64, bidirectional=True)
    x = torch.randn(70, 33, 64, device="cuda", dtype=torch.bfloat16)
    with forced(driver):
        first = step(ours, x, backend="triton")
        for _ in range(99):
            again = step(ours, x, backend="triton")
            assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))


@on_drivers
def test_any_length_through_the_same_graphs(driver: str) -> None:
    """Lengths below, at and above the sizes of the recorded graphs, tensors at ever new addresses."""
    theirs, ours, _ = twins("gru", torch.float32, 48)
    with products("fp32"), forced(driver), rnnkern.use_backend("triton"):
        for T in (1, 7, 8, 9, 63, 64, 65, 129, 200):
            x = torch.randn(T, 5, 48, device="cuda")
            ours_y, theirs_y = ours(x)[0], theirs(x)[0]
            torch.testing.assert_close(ours_y, theirs_y, rtol=1e-4, atol=1e-5)


@on_drivers
def test_two_streams_at_once(driver: str) -> None:
    _, ours, _ = twins("lstm", torch.float16, 64)
    inputs = [torch.randn(100, 16, 64, device="cuda", dtype=torch.float16) for _ in range(2)]
    with forced(driver), rnnkern.use_backend("triton"), torch.no_grad():
        alone = [ours(x)[0].clone() for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        together: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for stream, x, results in zip(streams, inputs, together, strict=True):
                with torch.cuda.stream(stream):
                    results.append(ours(x)[0])
        torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(expected, y) for y in results)


@on_cells
@on_drivers
def test_captured_in_a_graph_of_the_callers(cell: str, driver: str) -> None:
    _, ours, _ = twins(cell, torch.float16, 64)
    x = torch.randn(30, 16, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    with forced(driver), rnnkern.use_backend("triton"):

        def both() -> tuple[Tensor, ...]:
            y = ours(x)[0]
            return (y, *torch.autograd.grad(y.sum(), [x, *ours.parameters()]))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        for _ in range(3):
            with torch.no_grad():
                x.normal_()
            graph.replay()
            expected = both()
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_every_device_runs_where_its_tensors_are() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    _, ours, _ = twins("gru", torch.float32, 64)
    x = torch.randn(10, 4, 64)
    with rnnkern.use_backend("triton"):
        here = ours(x.cuda(0))[0].cpu()
        there = copy.deepcopy(ours).to("cuda:1")(x.to("cuda:1"))[0].cpu()
    assert torch.equal(here, there)


SMALL_STEP = """
import sys, torch, rnnkern
rnnkern.use_backend("triton")
for name in ("RNN", "GRU", "LSTM"):
    for B, H in ((3, 17), (5, 64)):
        m = getattr(rnnkern, name)(7, H, bidirectional=True, device="cuda", dtype=torch.float16)
        x = torch.randn(5, B, 7, device="cuda", dtype=torch.float16, requires_grad=True)
        m(x, lengths=torch.tensor([5, 0, 2, 4, 1][:B]))[0].sum().backward()
torch.cuda.synchronize()
"""


@on_drivers
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, driver: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_STEP]
    # Without the caching allocator each tensor has bounds of its own, which memcheck sees overstepped.
    environment = os.environ | {"RNNKERN_TRITON_CONFIG": f"driver={driver}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
