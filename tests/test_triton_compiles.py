"""Every kernel that the Triton backend ships fits the GPUs it is for: compiled here, without one (compile_guard.py).

RNNKERN_OLD_TRITON names a folder with another Triton in it, the oldest that is supported: then that one is tested too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")

import triton
import triton.language as tl
from compile_guard import TARGETS, examine

GUARD = Path(__file__).parent / "compile_guard.py"
OLD = os.environ.get("RNNKERN_OLD_TRITON")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", ["installed", "oldest"])
@pytest.mark.timeout(1500)
def test_everything_shipped_fits(version: str, target: str) -> None:
    paths = [str(GUARD.parent.parent)]
    if version == "oldest":
        if OLD is None:
            pytest.skip("RNNKERN_OLD_TRITON names no folder with Triton 3.6.0 (.ci/run makes one)")
        paths.insert(0, OLD)
    # A variable of the tests in the interpreter must not reach a process that compiles.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": ":".join(paths)}
    command = [sys.executable, str(GUARD), target, *(["--brief"] if version == "oldest" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1400, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    if version == "oldest":
        assert done.stdout.splitlines()[-1].startswith("Triton 3.6.")


@triton.jit
def products(x, w, y, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """N running products of the same rows: as many accumulators as one likes."""
    row = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    square = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    left = tl.load(x + row)
    for _ in range(10):
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in tl.static_range(N):
            total += tl.exp(tl.dot(left, tl.load(w + k * WIDTH * WIDTH + square)))
        left = total.to(tl.bfloat16)
    tl.store(y + row, left)


TYPES = {"x": "*bf16", "w": "*bf16", "y": "*bf16"}


@pytest.mark.parametrize(
    "target, size, warps, fault",
    [
        *((target, (2, 16, 32), 4, "") for target in TARGETS),
        ("sm_80", (4, 128, 128), 2, "spills"),
        ("sm_90", (4, 16, 256), 4, "shared memory above"),
        ("gfx942", (2, 128, 256), 2, "spills"),
    ],
)
def test_the_guard_sees_what_does_not_fit(target: str, size: tuple[int, int, int], warps: int, fault: str) -> None:
    constants = dict(zip(("N", "ROWS", "WIDTH"), size, strict=True))
    found = examine("products", products, TYPES, constants, {"num_warps": warps}, target)
    if fault:
        assert any(fault in word for word in found.faults), str(found)
    else:
        assert not found.faults and found.registers > 0, str(found)


def test_the_guard_sees_a_kernel_that_only_traps() -> None:
    found = examine("products", products, TYPES, {"N": 8, "ROWS": 128, "WIDTH": 128}, {"num_warps": 8}, "sm_100")
    assert "the kernel traps" in found.faults, str(found)


def test_the_guard_sees_what_does_not_compile() -> None:
    found = examine("products", products, TYPES, {"N": 2, "ROWS": 16, "WIDTH": 24}, {}, "sm_90")
    assert any("power of 2" in fault for fault in found.faults), str(found)
