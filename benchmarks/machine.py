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
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
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
    if gpu():
        return _slug(gpu().split(" (")[0])
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family = "-".join(part for part in (_cpuinfo("cpu family"), _cpuinfo("model")) if part)
    return _slug(f"{name} {family} {cores()} cores")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def gpu() -> str:
    """The device with what tells two of one name apart, or nothing."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name} ({found.multi_processor_count} SMs, {found.total_memory / 2**30:.0f} GiB)"


def triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that was measured; "+edited" where the working tree differs from it in what runs."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + ("+edited" if git("status", "--porcelain", "--", "rnnkern", "csrc", "benchmarks/*.py") else "")


@dataclass(frozen=True)
class Rates:
    """What the machine can do: its processor with the threads in use, and its GPU where it has one."""

    threads: int
    matmul: dict[str, float]  # dtype name -> operations per second
    read: list[tuple[int, float]]  # working set in bytes, ascending -> bytes per second
    gpu_matmul: dict[str, float] = field(default_factory=dict)
    gpu_read: list[tuple[int, float]] = field(default_factory=list)
    # Programs of one kernel -> microseconds in which so many hand a step on; empty where that could not be measured.
    gpu_handoff: list[tuple[int, float]] = field(default_factory=list)
    gpu_chip: int = 0  # bytes that one SM holds: registers and shared memory

    def floor_us(self, case: Case, weights: dict[str, tuple[int, ...]]) -> float:
        """No call can be faster: the larger of operations over the matmul rate and bytes over the bandwidth. Second
        derivatives count as a training step, which is a part of them.

        Recurrent weights are streamed once a step (in training twice: once back) from the cache they fit in; input
        weights, inputs and outputs once (in training three times). On a GPU a kernel may keep recurrent weights on the
        chip, so they count once there; what one SM cannot hold is spread over several, and the time to hand each step
        on between them comes on top. `weights` maps parameter names to shapes.
        """
        on_gpu = case.device == "cuda"
        read = self.gpu_read if on_gpu else self.read
        matmul = (self.gpu_matmul if on_gpu else self.matmul)[case.dtype if case.precision == "ieee" else "tf32"]
        shape, passes = case.shape, 1 if case.mode == "inference" else 3
        size = DTYPES[case.dtype].itemsize
        operations = recurrent = streamed = 0.0
        for name, sizes in _matrices(weights):
            count = sizes[0] * sizes[1]
            operations += 2 * shape.rows * count * passes
            if name.startswith("weight_ih") or on_gpu:
                streamed += count * passes
            else:
                walks = 1 if passes == 1 else 2
                recurrent += count * size * shape.steps * walks / bandwidth(read, count * size)
        width = shape.H + shape.layers * shape.directions * shape.H
        rows = shape.rows * width * size * passes
        seconds = recurrent + streamed * size / bandwidth(read, streamed * size) + rows / bandwidth(read, rows)
        handing = self._handoffs_us(case, weights) if on_gpu else 0.0
        return 1e6 * max(operations / matmul, seconds) + handing

    def _handoffs_us(self, case: Case, weights: dict[str, tuple[int, ...]]) -> float:
        """Of one walk over time, in training two; directions walk side by side, and so may layers."""
        largest = max(rows * width for name, (rows, width) in _matrices(weights) if name.startswith("weight_hh"))
        needed = largest * DTYPES[case.dtype].itemsize / max(self.gpu_chip, 1)
        if needed <= 1 or not self.gpu_handoff or case.shape.steps == 1:
            return 0.0
        each = next((us for programs, us in self.gpu_handoff if programs >= needed), self.gpu_handoff[-1][1])
        return each * case.shape.steps * (1 if case.mode == "inference" else 2)

    def describe(self) -> str:
        """The rates in one line."""

        def rates(matmul: dict[str, float], read: list[tuple[int, float]]) -> str:
            products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in matmul.items())
            reads = ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:,.0f}" for size, rate in read)
            return f"products in GF/s: {products}; reads in GB/s by working set: {reads}"

        text = f"{self.threads} threads, {rates(self.matmul, self.read)}"
        if not self.gpu_matmul:
            return text
        handing = ", ".join(f"{us:.3g} ({programs} programs)" for programs, us in self.gpu_handoff)
        return (
            f"{text}; GPU, {rates(self.gpu_matmul, self.gpu_read)}; us to hand a step on: {handing or 'not measured'}"
        )


def _matrices(weights: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, sizes) for name, sizes in weights.items() if len(sizes) == 2]


def bandwidth(read: list[tuple[int, float]], working_set: float) -> float:
    """Bytes per second from the nearest cache that holds so much."""
    held = [rate for size, rate in read if size >= working_set]
    return max(held) if held else read[-1][1]


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
    """The best of torch.mm and of what takes its place where that is slow."""
    import torch

    from rnnkern import _products

    def job(m: int, k: int, n: int) -> Callable[[], object]:
        dtype = DTYPES[dtype_name]
        a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n, dtype=dtype)

        def run() -> None:
            torch.set_num_threads(1)  # this thread's setting
            _products.mm(a, b, out)

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


def _chip_bytes() -> int:
    """What one SM's registers and shared memory hold; not every version of torch tells, and then they count less."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    block = getattr(device, "shared_memory_per_block_optin", 0)
    return 4 * getattr(device, "regs_per_multiprocessor", 65536) + getattr(
        device, "shared_memory_per_multiprocessor", block
    )


def _handoffs() -> list[tuple[int, float]]:
    """By exchange.py, whose waits all end. What went wrong is said, and other floors are none the worse for it."""
    try:
        from benchmarks.exchange import handoffs

        return handoffs()
    except Exception as error:  # Triton's compiler and launcher fail in many ways
        print(f"the hand-off between programs was not measured: {type(error).__name__}: {error}", file=sys.stderr)
        return []


def _gpu_rates(seconds: float) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Products by dtype (fp32 without and with TF32), and reads by working set: the sum of a buffer's elements."""
    import torch

    from benchmarks.clocks import DeviceClock

    clock = DeviceClock()

    def best(run: Callable[[], object]) -> float:
        run()
        clock.settle()
        end, shortest = time.perf_counter() + seconds / 10, float("inf")
        while time.perf_counter() < end:
            shortest = min(shortest, clock.seconds(run, 10))
        return shortest

    matmul = {}
    for name in (*DTYPES, "tf32"):
        dtype, n = DTYPES.get(name, torch.float32), 8192
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        matmul[name] = 2 * n**3 / best(partial(torch.mm, a, b, out=torch.empty_like(a)))
    torch.backends.cuda.matmul.allow_tf32 = False
    read = []
    for power in range(20, 32, 2):
        data = torch.ones(2**power // 4, device="cuda")
        read.append((2**power, 2**power / best(data.sum)))
    return matmul, read


def calibrate(threads: int) -> Rates:
    """Measures in a child process; a few seconds."""
    command = [sys.executable, "-m", "benchmarks.machine", "--threads", str(threads), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the machine could not be calibrated: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if done.stderr:
        print(done.stderr, end="", file=sys.stderr)
    pairs = {name: [(size, rate) for size, rate in found[name]] for name in ("read", "gpu_read", "gpu_handoff")}
    return Rates(**(found | pairs))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each of the measurements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    matmul = {name: _matmul_rate(name, args.threads, args.seconds) for name in ("fp32", "bf16")}
    rates = Rates(args.threads, matmul, _read_rates(args.threads, args.seconds))
    if torch.cuda.is_available():
        rates = Rates(args.threads, matmul, rates.read, *_gpu_rates(args.seconds), _handoffs(), _chip_bytes())
    print(json.dumps(asdict(rates)) if args.json else f"{machine()}: {cpu()}\n{rates.describe()}")


if __name__ == "__main__":
    main()
