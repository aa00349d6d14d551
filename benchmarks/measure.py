"""How one case is measured: checked first, then timed in interleaved rounds; no number from a wrong kernel."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import EPS, Case
from benchmarks.clocks import clock_for
from benchmarks.peers import PEERS, backend_of, captured, ours, torch_algorithm, torch_nn
from benchmarks.problem import Problem, Side, Unavailable, module_side

# A peer that is no module of torch may approximate its activations; further off than this it computes something else.
FOREIGN = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}


class Wrong(Exception):
    """rnnkern's result is not what the fp64 truth allows; the text says where and by how much."""


@dataclass
class Protocol:
    """How long and how often; the defaults are those of committed results."""

    rounds: int = 25
    least_rounds: int = 7
    seconds: float = 0.7  # of timed calls against one peer; the rounds become fewer, but not less than `least_rounds`
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
    found = side.results()
    if missing := truth.keys() - found.keys():
        raise Unavailable(f"does not give {', '.join(sorted(missing))}")
    for name, exact in truth.items():
        value = found[name]
        error = _error(value.reshape(exact.shape), exact) / exact.abs().max().item()
        if not error <= FOREIGN["tf32" if case.precision == "tf32" else case.dtype]:
            raise Unavailable(f"its {name} is off by {error:.2g} of the largest value")


@contextlib.contextmanager
def mode(case: Case) -> Iterator[None]:
    """Inference as a user runs it; training with gradients on; products of fp32 as the case says."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    try:
        with torch.inference_mode() if case.mode == "inference" else contextlib.nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@dataclass
class Prepared:
    """rnnkern's side of a case, found right."""

    case: Case
    threads: int
    problem: Problem
    mine: Side
    truth: dict[str, Tensor]
    backend: str
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, threads: int) -> Prepared:
        """Raises `Wrong` if rnnkern's result is."""
        problem = Problem.of(case)
        mine = ours(problem)
        truth = module_side("fp64", torch.nn, problem, torch.float64).results()
        check(case, mine.results(), torch_nn(problem, threads).results(), truth)
        backend = backend_of(mine)
        weights = {name: tuple(value.shape) for name, value in problem.weights.items()}
        return cls(case, threads, problem, captured(mine, case), truth, backend, weights)

    def peer(self, name: str) -> Side:
        """Raises `Unavailable` with the reason where it cannot run here."""
        side = PEERS[name](self.problem, self.threads)
        if side.module is None:
            check_foreign(self.case, side, self.truth)
        if name == "torch.nn":
            side.algorithm = torch_algorithm(side.call)
            if self.case.shape.layout == "resets":
                side.algorithm += " over packed segments"
        return captured(side, self.case)


class Duel:
    """Rounds of A B, each side on an idle machine and after calls that are not timed; the ratio is a round's own.

    A round is `peer_round` and then `own_round`.
    """

    def __init__(self, mine: Side, peer: Side, device: str, protocol: Protocol) -> None:
        self.mine, self.peer, self.clock = mine, peer, clock_for(device)
        self.counts, whole = {}, 0.0
        for side in (mine, peer):
            self.clock.ready(side.call)
            single = min(self.clock.seconds(side.call, 1) for _ in range(3))
            self.counts[side.name] = max(1, round(protocol.batch / single))
            whole += single * self.counts[side.name]
        self.rounds = min(protocol.rounds, max(protocol.least_rounds, round(protocol.seconds / whole)))
        self.own: list[float] = []
        self.theirs: list[float] = []

    def peer_round(self) -> None:
        self.theirs.append(self._timed(self.peer))
        self.clock.ready(self.mine.call)

    def own_round(self) -> None:
        self.own.append(self.clock.seconds(self.mine.call, self.counts[self.mine.name]))

    def _timed(self, side: Side) -> float:
        self.clock.ready(side.call)
        return self.clock.seconds(side.call, self.counts[side.name])

    def run(self, benchmark: Any) -> Timing:
        """Under pytest-benchmark, whose own figures are those of a whole round of ours."""
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(self.own_round, setup=self.peer_round, rounds=self.rounds)
        finally:
            gc.enable()
        return self.timing()

    def timing(self) -> Timing:
        ratios = [theirs / own for own, theirs in zip(self.own, self.theirs, strict=True)]
        p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
        own, theirs = (1e6 * statistics.median(values) for values in (self.own, self.theirs))
        return Timing(
            self.peer.name, self.peer.algorithm, own, theirs, statistics.median(ratios), p20, p80, len(ratios)
        )
