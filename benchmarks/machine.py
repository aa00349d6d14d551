"""The machine: its name, and the matmul rate and read bandwidth that floors are computed from.

``python -m benchmarks.machine`` measures in a process of its own, so that the measuring code's thread pools are not
around while rnnkern and its peers are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.cases import DTYPES, Case

ROOT = Path(__file__).resolve().parent.parent
WORKING_SETS = tuple(2**power for power in range(16, 29, 2))  # 64 KiB .. 256 MiB: every cache level, then memory


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE)
    return found.group(1) if found else ""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """The processor with what tells two of one name apart: family and model, cores, the widest instruction set."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = _cpuinfo("flags").split()
    widest = next((flag for flag in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if flag in flags), "baseline")
    family = f"family {_cpuinfo('cpu family')} model {_cpuinfo('model')}, " if _cpuinfo("cpu family") else ""
    return f"{name} ({family}{cores()} cores, {widest})"


def machine() -> str:
    """The name of this machine's results file."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family = "-".join(part for part in (_cpuinfo("cpu family"), _cpuinfo("model")) if part)
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {family} {cores()} cores".lower()).strip("-")


def commit() -> str:
    """The commit that was measured; "+edited" where the working tree differs from it in what runs."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + ("+edited" if git("status", "--porcelain", "--", "rnnkern", "csrc", "benchmarks/*.py") else "")


@dataclass(frozen=True)
class Rates:
    """What the machine can do with the threads in use."""

    threads: int
    matmul: dict[str, float]  # dtype name -> operations per second
    read: list[tuple[int, float]]  # working set in bytes, ascending -> bytes per second

    def bandwidth(self, working_set: float) -> float:
        """Bytes per second from the nearest cache that holds so much."""
        held = [rate for size, rate in self.read if size >= working_set]
        return max(held) if held else self.read[-1][1]

    def floor_us(self, case: Case, weights: dict[str, tuple[int, ...]]) -> float:
        """No call can be faster: the larger of operations over the matmul rate and bytes over the bandwidth.

        Recurrent weights are streamed once a step (in training twice: once back) from the cache they fit in; input
        weights, inputs and outputs once (in training three times). `weights` maps parameter names to shapes.
        """
        shape, passes = case.shape, 3 if case.mode == "training" else 1
        size = DTYPES[case.dtype].itemsize
        operations = recurrent = streamed = 0.0
        for name, sizes in weights.items():
            if len(sizes) == 2:
                count = sizes[0] * sizes[1]
                operations += 2 * shape.rows * count * passes
                if name.startswith("weight_ih"):
                    streamed += count * passes
                else:
                    walks = 1 if passes == 1 else 2
                    recurrent += count * size * shape.steps * walks / self.bandwidth(count * size)
        width = shape.H + shape.layers * shape.directions * shape.H
        rows = shape.rows * width * size * passes
        seconds = recurrent + streamed * size / self.bandwidth(streamed * size) + rows / self.bandwidth(rows)
        return 1e6 * max(operations / self.matmul[case.dtype], seconds)


def _together(jobs: list[Callable[[], object]], seconds: float) -> float:
    """How often a second the jobs run, each over and over in a thread of its own: the sum of their best rates.

    No job waits for another, so that a machine which is not quite idle is still measured at its best.
    """

    def best(run: Callable[[], object]) -> float:
        run()
        shortest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            run()
            shortest = min(shortest, time.perf_counter() - start)
        return 1 / shortest

    with ThreadPoolExecutor(len(jobs)) as pool:
        return sum(pool.map(best, jobs))


def _matmul_rate(dtype_name: str, threads: int, seconds: float) -> float:
    import torch

    def job(m: int, k: int, n: int) -> Callable[[], object]:
        dtype = DTYPES[dtype_name]
        a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)

        def run() -> None:
            torch.set_num_threads(1)  # this thread's setting
            torch.mm(a, b, out=out)

        return run

    shapes = ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (1600, 256, 1024), (6400, 512, 2048))
    each = seconds / len(shapes)
    return max(2 * m * k * n * _together([job(m, k, n) for _ in range(threads)], each) for m, k, n in shapes)


def _read_rates(threads: int, seconds: float) -> list[tuple[int, float]]:
    """Each thread reads its own part of the working set over and over."""
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath=True)
    def read(part: np.ndarray, passes: int) -> np.float32:
        total = np.float32(0)
        for _ in range(passes):
            for i in range(part.size):
                total += part[i]
        return total

    rates = []
    for size in WORKING_SETS:
        parts = [np.ones(size // 4 // threads, np.float32) for _ in range(threads)]
        passes = max(1, 2**25 // size)
        often = _together([partial(read, part, passes) for part in parts], seconds / len(WORKING_SETS))
        rates.append((size, passes * parts[0].nbytes * often))
    return rates


def calibrate(threads: int) -> Rates:
    """Measures in a child process; a few seconds."""
    command = [sys.executable, "-m", "benchmarks.machine", "--threads", str(threads), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Rates(found["threads"], found["matmul"], [(size, rate) for size, rate in found["read"]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each of the three measurements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    matmul = {name: _matmul_rate(name, args.threads, args.seconds) for name in DTYPES}
    rates = Rates(args.threads, matmul, _read_rates(args.threads, args.seconds))
    print(json.dumps(asdict(rates)) if args.json else f"{machine()}: {cpu()}\n{describe(rates)}")


def describe(rates: Rates) -> str:
    """The rates in one line."""
    matmul = ", ".join(f"{name} {rate / 1e9:.0f} GF/s" for name, rate in rates.matmul.items())
    read = ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:.0f}" for size, rate in rates.read)
    return f"{rates.threads} threads; matmul {matmul}; reads in GB/s by working set: {read}"


if __name__ == "__main__":
    main()
