"""Every kernel that the Triton backend ships fits the GPUs it is for: compiled here, without one (compile_guard.py).

RNNKERN_OLD_TRITON names a folder with another Triton in it, the oldest that is supported: then that one is tested too.
Of kernels that differ in sizes alone one is compiled; `python tests/compile_guard.py` compiles more, for half an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton")

import triton
import triton.language as tl
from compile_guard import TARGETS, examine

from rnnkern.backends.triton import slots

GUARD = Path(__file__).parent / "compile_guard.py"
OLD = os.environ.get("RNNKERN_OLD_TRITON")


def jobs() -> Iterator[Any]:
    for version in ("installed", "oldest"):
        marks = []
        if version == "oldest" and OLD is None:
            marks = [pytest.mark.skip("RNNKERN_OLD_TRITON names no folder with Triton 3.6.0 (.ci/run makes one)")]
        for target in TARGETS:
            yield pytest.param(version, target, marks=marks, id=f"{version}-{target}")


@pytest.mark.minutes
@pytest.mark.parametrize("version, target", jobs())
@pytest.mark.timeout(3600)
def test_what_is_shipped_fits(version: str, target: str) -> None:
    extent = "sizes" if version == "installed" else "drivers"
    command = [sys.executable, str(GUARD), target, "--extent", extent, "--processes", "1"]
    paths = [str(GUARD.parent.parent)] if version == "installed" else [str(OLD), str(GUARD.parent.parent)]
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "RNNKERN_TRITON_CONFIG")}
    env |= {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, text=True, stdout=PIPE, stderr=STDOUT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
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


def test_kernels_of_another_table_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton keeps on disk is found by this key; it would read words that lie elsewhere now."""

    def key() -> str:
        slots.pointer.hash = None
        return slots.pointer.cache_key

    before = key()
    monkeypatch.setattr(slots, "_ORDER", tl.constexpr(slots.NAMES[::-1]))
    assert key() != before
    monkeypatch.undo()
    assert key() == before


def test_the_guard_sees_what_does_not_compile() -> None:
    found = examine("products", products, TYPES, {"N": 2, "ROWS": 16, "WIDTH": 24}, {}, "sm_90")
    assert any("power of 2" in fault for fault in found.faults), str(found)
