"""How one case is measured: checked first, then timed in interleaved rounds; no number from a wrong kernel."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import EPS, Case
from benchmarks.peers import PEERS, backend_of, ours, torch_algorithm, torch_nn
from benchmarks.problem import Problem, Side, Unavailable, module_side

# An engine that runs ONNX may approximate its activations; further off than this it computes something else.
FOREIGN = {"fp32": 1e-3, "bf16": 5e-2}
SLICE = 0.002  # s
WARM = 0.015  # s; a pool that slept may start out on one core: several slices of the scheduler until it is spread


class Wrong(Exception):
    """rnnkern's result is not what the fp64 truth allows; the text says where and by how much."""


@dataclass
class Protocol:
    """How long and how often; the defaults are those of committed results."""

    rounds: int = 25
    least_rounds: int = 7
    seconds: float = 3.0  # for all rounds of a case and peer; the rounds end early, but not before `least_rounds`
    batch: float = 0.005  # s; a side's share of a round is as many calls as fill this


@dataclass
class Timing:
    peer: str
    algorithm: str
    time_us: float
    peer_time_us: float
    ratio: float  # the peer's time over ours
    p20: float
    p80: float
    rounds: int


@dataclass
class Measured:
    backend: str = ""
    timings: list[Timing] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def check(case: Case, mine: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Against fp64 truth: at most four times torch's own error at this dtype, plus eight eps of the largest value."""
    if mine.keys() != truth.keys():
        raise Wrong(f"{case}: results {sorted(mine)} where torch has {sorted(truth)}")
    for name, exact in truth.items():
        if mine[name].shape != exact.shape:
            raise Wrong(f"{case}: {name} has shape {tuple(mine[name].shape)}, torch {tuple(exact.shape)}")
        error = _error(mine[name], exact)
        allowed = 4 * _error(torchs[name], exact) + 8 * EPS[case.dtype] * exact.abs().max().item()
        if not error <= allowed:  # also true of NaN
            raise Wrong(f"{case}: {name} is off by {error:.3g}, allowed are {allowed:.3g}")


def check_foreign(case: Case, side: Side, truth: dict[str, Tensor]) -> None:
    """A peer whose numbers are others than torch's is no peer."""
    for name, value in side.results().items():
        exact = truth[name]
        error = _error(value.reshape(exact.shape), exact) / exact.abs().max().item()
        if not error <= FOREIGN[case.dtype]:
            raise Unavailable(f"its {name} is off by {error:.2g} of the largest value")


@contextlib.contextmanager
def mode(case: Case) -> Iterator[None]:
    """Inference as a user runs it; training with gradients on."""
    with torch.inference_mode() if case.mode == "inference" else contextlib.nullcontext():
        yield


def settle() -> None:
    """Waits until this process is idle, a quarter of a second at most.

    Thread pools spin on after a call, OpenMP's for milliseconds, ONNX Runtime's for fifty, and would take the cores
    from the side that comes next.
    """
    quiet, end = 0, time.perf_counter() + 0.25
    while quiet < 2 and time.perf_counter() < end:
        used = time.process_time()
        time.sleep(SLICE)
        quiet = quiet + 1 if time.process_time() - used < SLICE / 8 else 0


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def warm_up(call: Callable[[], object]) -> None:
    end = time.perf_counter() + WARM
    while time.perf_counter() < end:
        call()


def interleave(mine: Side, peer: Side, protocol: Protocol) -> Timing:
    """Rounds of A B, each side on an idle machine and after calls that are not timed; the ratio is a round's own."""
    sides, calls = (mine, peer), []
    for side in sides:
        settle()
        warm_up(side.call)
        single = min(_seconds(side.call, 1) for _ in range(3))
        calls.append(max(1, round(protocol.batch / single)))
    times: list[tuple[float, ...]] = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + protocol.seconds
        while len(times) < protocol.rounds and (len(times) < protocol.least_rounds or time.perf_counter() < end):
            pair = []
            for side, count in zip(sides, calls, strict=True):
                settle()
                warm_up(side.call)
                pair.append(_seconds(side.call, count))
            times.append(tuple(pair))
    finally:
        gc.enable()
    ratios = [theirs / own for own, theirs in times]
    p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else ratios * 2
    own, theirs = (1e6 * statistics.median(column) for column in zip(*times, strict=True))
    return Timing(peer.name, peer.algorithm, own, theirs, statistics.median(ratios), p20, p80, len(times))


def measure(case: Case, peers: list[str], threads: int, protocol: Protocol, backend: str | None = None) -> Measured:
    """The case against every peer that has it. Raises `Wrong` before anything is timed if rnnkern's result is."""
    from rnnkern import use_backend

    problem, found = Problem.of(case), Measured()
    with mode(case), use_backend(backend):
        mine = ours(problem)
        truth = module_side("fp64", torch.nn, problem, torch.float64).results()
        check(case, mine.results(), torch_nn(problem, threads).results(), truth)
        found.backend = backend_of(mine)
        found.weights = {name: tuple(value.shape) for name, value in problem.weights.items()}
        for name in peers:
            try:
                side = PEERS[name](problem, threads)
                if side is None:
                    continue
                if side.module is None:
                    check_foreign(case, side, truth)
                elif name == "torch.nn":
                    side.algorithm = torch_algorithm(side.call)
            except Unavailable as reason:
                found.skipped[name] = str(reason)
                continue
            found.timings.append(interleave(mine, side, protocol))
    return found
