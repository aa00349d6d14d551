"""Peak memory of a training step above what was held before it: on a CPU the resident set of a child process, on a GPU
what torch's allocator gave out."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.cases import Case, Shape
from benchmarks.machine import ROOT

# Below this the step's own memory drowns in what the allocator and the libraries happen to hold.
SMALLEST_OUTPUT = 2**20


def worth_measuring(case: Case) -> bool:
    if case.mode != "training" or case.capture:  # a graph's memory is its own, whatever the step would need
        return False
    return case.device == "cuda" or case.dtype == "fp32" and 4 * case.shape.rows * case.shape.H >= SMALLEST_OUTPUT


def allocated_peak(step: Callable[[], object]) -> int:
    """Of a step on the GPU. Its first call, which may compile and keep things, counts for nothing."""
    import torch

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(case: Case, library: str, threads: int, backend: str | None) -> int:
    """Runs the step in a child process; `library` is "torch.nn" or "rnnkern". Raises RuntimeError with its output."""
    command = [sys.executable, "-m", "benchmarks.memory", library, json.dumps(asdict(case)), "--threads", str(threads)]
    if backend is not None:
        command += ["--backend", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"memory of {case} with {library}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("library", choices=("torch.nn", "rnnkern"))
    parser.add_argument("case", help="a case as JSON")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--backend")
    args = parser.parse_args()

    import torch

    from benchmarks.peers import ours, torch_nn
    from benchmarks.problem import Problem, Side
    from rnnkern import use_backend

    torch.set_num_threads(args.threads)
    use_backend(args.backend)
    sizes = json.loads(args.case)
    case = Case(**{**sizes, "shape": Shape(**sizes["shape"])})

    def side(of: Case) -> Side:
        problem = Problem.of(of)
        return torch_nn(problem, args.threads) if args.library == "torch.nn" else ours(problem)

    # The same step on few rows first: code, thread pools and library buffers are no part of what a step needs.
    side(replace(case, shape=replace(case.shape, T=2, B=2))).call()
    step = side(case).call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main()
