"""Tests that are processes of their own, started with the session and running beside the others, at low priority: most
tests keep one core busy. What is marked `beside(*command)` asks for its result by `finished`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of the tests' own process, or of somebody who tries something: these are said anew for every command.
OWN = ("TRITON_INTERPRET", "RNNKERN_TRITON_CONFIG", "PYTHONPATH", "OMP_NUM_THREADS")

Command = tuple[str, ...]  # words, of which leading ones may be NAME=VALUE for the environment


class Beside:
    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.asked: dict[Command, Future[subprocess.CompletedProcess[str]]] = {}
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.over = threading.Lock(), False

    def start(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(2)
            if command not in self.asked:
                self.asked[command] = self.pool.submit(self._run, command)

    def finished(self, command: Command) -> subprocess.CompletedProcess[str]:
        self.start([command])
        return self.asked[command].result()

    def end(self) -> None:
        """Nothing goes on after the session, however it ended."""
        with self.lock:
            self.over = True
            for process in self.running:
                process.kill()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _run(self, command: Command) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in OWN}
        words = list(command)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        with self.lock:
            if self.over:
                raise RuntimeError("the session is over")
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, preexec_fn=_patient if os.name == "posix" else None,
            )  # fmt: skip
            self.running.add(process)
        output, _ = process.communicate()
        with self.lock:
            self.running.discard(process)
        return subprocess.CompletedProcess(words, process.returncode, output)


def _patient() -> None:
    os.nice(10)


BESIDE = Beside()
