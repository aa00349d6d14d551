"""pytest's side of the benchmarks: options, the machine's calibration, the results file and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, results
from benchmarks.cases import DTYPES, MODES, SUITES, Case, cells, suite
from benchmarks.measure import Duel, Prepared, Protocol, Timing, Wrong, mode
from benchmarks.memory import allocated_peak, peak_bytes, worth_measuring
from benchmarks.peers import PEERS, has
from benchmarks.problem import Side, Unavailable
from benchmarks.report import table


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rnnkern", "rnnkern's benchmarks")
    group.addoption("--suite", choices=(*SUITES, "full"), default="quick")
    group.addoption("--cell", nargs="+", choices=cells(), default=list(cells()))
    group.addoption("--mode", nargs="+", choices=MODES, default=list(MODES))
    group.addoption("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    group.addoption("--peer", nargs="+", choices=tuple(PEERS), help="in place of the suite's")
    group.addoption("--case", nargs="+", metavar="NAME", help="only shapes of these names, as T100-B16-H256")
    group.addoption("--backend", help="a backend of rnnkern by name; default: its own choice")
    group.addoption("--threads", type=int, default=2)
    group.addoption("--seconds", type=float, default=Protocol.seconds, help="of timed calls against one peer")
    group.addoption("--no-memory", action="store_true", help="without the peak memory of training steps")
    group.addoption("--results", type=Path, help="file to append to; default: benchmarks/results/<machine>.csv")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table has our times alone; ours, at the end, has the ratios
    config.option.timeout = 0  # a compiler may take long, and a suite as long as it takes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "peer"} <= set(metafunc.fixturenames):
        return
    option = metafunc.config.option
    pairs = [
        (case, peer)
        for case, peer in suite(option.suite, option.peer)
        if has(peer, case)
        if case.cell in option.cell and case.mode in option.mode and case.dtype in option.dtype
        if not option.case or case.shape.name in option.case
    ]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{case}-{peer}".replace(" ", "-") for case, peer in pairs])


class Session:
    """One run: the machine's rates, the case in hand, and what was found."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        torch.set_num_threads(option.threads)
        self.option = option
        self.busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > machine.cores() / 2
        self.shared = results.constants(option.threads)
        self.path: Path = option.results or results.RESULTS / f"{machine.machine()}.csv"
        self.rates = machine.calibrate(option.threads)
        self.protocol = Protocol(seconds=option.seconds)
        self.rows: list[results.Row] = []
        self._case: Case | None = None
        self._prepared: Prepared | Wrong | Unavailable | None = None
        self._peaks: dict[str, int] = {}

    def prepare(self, case: Case) -> Prepared | Wrong | Unavailable:
        """The case, checked once for all its peers; or why there is none."""
        if self._case != case:
            self._case, self._prepared, self._peaks = None, None, {}  # what is raised here leaves no case behind
            try:
                self._prepared = Prepared.of(case, self.option.threads)
            except (Wrong, Unavailable) as reason:
                self._prepared = reason
            if case.device == "cpu" and self._weighs(case):
                libraries = ("rnnkern", "torch.nn")
                self._peaks = {
                    name: peak_bytes(case, name, self.option.threads, self.option.backend) for name in libraries
                }
            self._case = case
        assert self._prepared is not None
        return self._prepared

    def _weighs(self, case: Case) -> bool:
        return worth_measuring(case) and not self.option.no_memory

    def weigh(self, case: Case, *sides: Side) -> None:
        """The peak memory of sides on a GPU, where no process of their own is needed for it."""
        if case.device == "cuda" and self._weighs(case):
            for side in sides:
                if side.name not in self._peaks:
                    self._peaks[side.name] = allocated_peak(side.call)

    def keep(self, prepared: Prepared, timing: Timing) -> results.Row:
        floor = self.rates.floor_us(prepared.case, prepared.weights)
        row = results.row(self.shared, prepared, timing, floor, self._peaks)
        results.append(self.path, row)
        self.rows.append(row)
        return row


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    found = Session(request.config)
    request.config.stash[KEY] = found
    yield found


KEY = pytest.StashKey[Session]()


@pytest.fixture
def duel(session: Session, case: Case, peer: str) -> Iterator[tuple[Duel, Any]]:
    """rnnkern against the peer, ready to run, and what to call with the timing."""
    from rnnkern import use_backend

    with mode(case), use_backend(session.option.backend):
        prepared = session.prepare(case)
        if isinstance(prepared, Wrong):
            pytest.fail(f"NO NUMBER: {prepared}", pytrace=False)
        if isinstance(prepared, Unavailable):
            pytest.skip(f"rnnkern: {prepared}")
        reason = ""
        try:
            side = prepared.peer(peer)
        except Unavailable as error:
            reason = str(error)
        if reason:
            pytest.skip(f"{peer}: {reason}")
        session.weigh(case, prepared.mine, side)
        yield Duel(prepared.mine, side, case.device, session.protocol), lambda timing: session.keep(prepared, timing)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(KEY, None)
    if found is None:
        return
    say = terminalreporter.write_line
    terminalreporter.section("rnnkern against its peers")
    say(f"{found.shared['cpu']}{', ' + found.shared['gpu'] if found.shared['gpu'] else ''}, torch {torch.__version__}")
    say(found.rates.describe())
    for line in table(found.rows):
        say(line)
    if found.busy:
        say("The machine was busy when this began: these are no results to keep.", yellow=True)
    say(f"{len(found.rows)} rows in {found.path}")
