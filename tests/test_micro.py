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
        [{"TILE": tile, "CHUNK": 2048, "VOLATILE": volatile} for tile in (4096, 65536) for volatile in (False, True)],
    ),
    "nothing": ({"out": "*i32"}, [{}]),
}


def compiled(name: str, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    """The kernel as the H100 and the H200 would run it; pointers are aligned, as torch's are, and sizes are even."""
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
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in signature},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name: str) -> None:
    signature, variants = KERNELS[name]
    for constants in variants:
        found = compiled(name, signature, constants)
        ptx = found.asm["ptx"]
        assert not re.search(r"^\s*trap;", ptx, re.MULTILINE) and found.metadata.shared < 227 * 1024
        if name == "read_tiles":
            assert re.search(r"ld\.(volatile\.)?global(\.cg)?\.v4", ptx), "reads are not 16 bytes wide"
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


def test_a_measurement_that_fails_stops_no_other() -> None:
    from benchmarks.micro import run

    def good() -> Any:
        yield {"what": "one", "us": "1"}

    def bad() -> Any:
        yield {"what": "two", "us": "2"}
        raise RuntimeError("no such kernel\nand more")

    rows: list[dict[str, Any]] = []
    assert run(iter([("good", good), ("bad", bad), ("good", good)]), rows.append, 60) == 1
    assert [row["what"] for row in rows] == ["one", "two", "bad", "one"]
    assert rows[2]["note"] == "failed: RuntimeError: no such kernel"
    assert run(iter([("good", good)]), rows.append, -1) == 0 and len(rows) == 4


def test_the_time_of_a_step_is_free_of_launching() -> None:
    from benchmarks.exchange import seconds_per_step

    class Fake:
        steps, ran = 4096, 0

        def reset(self) -> None:
            self.ran = 0

        def launch(self, steps: int) -> None:
            self.ran = steps

        def check(self, steps: int) -> None:
            assert self.ran == steps

    fake = Fake()

    def clock(call: Any) -> float:
        call()
        return 20e-6 + 0.7e-6 * fake.ran

    assert seconds_per_step(fake, clock) == pytest.approx(0.7e-6)  # type: ignore[arg-type]


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FAKE_LOG"
case "$*" in
    "-m pytest -q -m gpu tests"*) echo "3 passed" ;;
    *benchmarks.micro*) echo what >"$4"; echo "step handed on" >&2 ;;
    *--suite*) while [[ $1 != --results ]]; do shift; done; echo row >>"$2"; echo "a table"; exit 1 ;;
    *report.py*) for n in 1 2 3 4; do touch "$4/speedup-$n.png"; done ;;
    -) echo "torchrl haste" ;;
    *) ;;
esac
"""


def gpu_sh(
    tmp_path: Path, seconds: int, *options: str
) -> tuple[subprocess.CompletedProcess[str], list[str], list[str]]:
    """The script with a Python that only notes what it was asked to do."""
    python, out, log = tmp_path / "python", tmp_path / "out", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log.touch()
    environment = {**os.environ, "PYTHON": str(python), "FAKE_LOG": str(log), "GPU_SECONDS": str(seconds)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done, sorted(path.name for path in out.iterdir()), log.read_text().splitlines()


def test_the_gpu_script_does_all_and_leaves_eight_files(tmp_path: Path) -> None:
    done, files, asked = gpu_sh(tmp_path, 540)
    assert files == ["build.log", "micro.csv", "micro.log", "results.csv", "speedup-1.png", "speedup-2.png",
                     "suite.log", "tests.log"]  # fmt: skip
    assert done.returncode == 1  # the suite's: a wrong result is no success
    assert "3 passed" in done.stdout and "a table" in done.stdout and "step handed on" in done.stdout
    suites = [line for line in asked if "--suite gpu" in line]
    assert len(suites) == 2 and "--peer torch.nn" in suites[0] and "--peer torchrl haste --case" in suites[1]


def test_the_gpu_script_keeps_to_its_time_and_its_part(tmp_path: Path) -> None:
    done, files, asked = gpu_sh(tmp_path, 5)
    assert asked == ["-"] and "out of time" in done.stdout and "results.csv" not in files
    _, files, asked = gpu_sh(tmp_path, 540, "--only", "micro")
    assert "micro.csv" in files and not any("-m pytest" in line for line in asked)
    _, files, asked = gpu_sh(tmp_path, 540, "--only", "tune")
    assert "table.json" in files and any("benchmarks.tune search" in line for line in asked)
    done, _, _ = gpu_sh(tmp_path, 540, "--only", "all-of-it")
    assert done.returncode == 2
