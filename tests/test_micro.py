"""The kernels of the micro-benchmarks, as far as a machine without a GPU can tell: they compile for one, and the
interpreter runs them with a single program, which meets nobody but itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")

KERNELS: dict[str, tuple[dict[str, str], list[dict[str, Any]]]] = {
    "exchange": (
        {"data": "*i32", "counters": "*i32", "failed": "*i32", "steps": "i32"},
        [
            {"METHOD": method, "PROGRAMS": programs, "WIDTH": width, "POLLS": 1000}
            for method in (0, 1, 2)
            for programs, width in ((16, 8), (128, 64))
        ],
    ),
    "gather_ids": ({"counter": "*i32", "ids": "*i32"}, [{"PROGRAMS": 132, "POLLS": 1000}]),
    "read_tiles": (
        {"tiles": "*i32", "out": "*i32", "repeats": "i32", "stride": "i32"},
        [{"TILE": 65536, "CHUNK": 4096, "VOLATILE": volatile} for volatile in (False, True)],
    ),
    "nothing": ({"out": "*i32"}, [{}]),
}


def compiled(name: str, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    """The kernel as the H100 and the H200 would run it; pointers are aligned, as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks import exchange

    kernel = getattr(exchange, name)
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={key: "constexpr" if key in constants else signature[key] for key in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in signature if signature[key].startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name: str) -> None:
    signature, variants = KERNELS[name]
    for constants in variants:
        found = compiled(name, signature, constants)
        ptx = found.asm["ptx"]
        assert not re.search(r"^\s*trap;", ptx, re.MULTILINE) and found.metadata.shared < 227 * 1024
        if name == "exchange":
            waits = {0: "ld.global.gpu.acquire", 1: "ld.acquire.gpu.global", 2: "ld.volatile.global"}
            assert re.search(waits[constants["METHOD"]], ptx), constants
            assert constants["METHOD"] == 2 or re.search(r"release", ptx)


INTERPRETED = """
import torch
import triton
from benchmarks.exchange import EMPTY, exchange, nothing, read_tiles

def run(method, programs, steps=5, width=4):
    data = torch.full((steps + 1, programs * width), EMPTY, dtype=torch.int32)
    data[0] = 0
    counters, failed = torch.zeros(steps, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    exchange[(1,)](data, counters, failed, steps, METHOD=method, PROGRAMS=programs, WIDTH=width, POLLS=50)
    return data, failed.item()

for method in (0, 2):
    data, failed = run(method, 1)
    assert failed == 0 and (data == torch.arange(6)[:, None]).all(), (method, data)
    data, failed = run(method, 2)  # whom it waits for does not exist: it gives up after the first step
    assert failed == 1 and (data[1, :4] == 1).all() and (data[1, 4:] == EMPTY).all() and (data[2:] == EMPTY).all()

tiles, out = torch.arange(3 * 64, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
for stride in (0, 64):
    read_tiles[(3,)](tiles, out, 2, stride, TILE=64, CHUNK=16, VOLATILE=False)
    assert out.tolist() == [2 * int(tiles[p * stride : p * stride + 64].sum()) for p in range(3)], (stride, out)
nothing[(2,)](out)
print("done")
"""


def test_kernels_run_in_the_interpreter_and_waits_end() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.split() == ["done"], done.stderr[-3000:]
