"""Kernels whose programs wait for each other, in Triton's interpreter, which runs one program after the other.

Here the programs of a cooperative launch are threads of which one runs at a time, and at each volatile load, which is
what a wait is made of, another may have its turn. The schedule is drawn from a seed and unfair on purpose: programs in
lockstep would find everything in its place even if nobody waited. What this cannot show is how a GPU orders memory
accesses.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder


class Stuck(RuntimeError):
    """A program waits for what will never come."""


class _Gone(BaseException):
    """Ends a program that is to be lost."""


class Turns:
    """Who runs: the programs of one launch, and the draw between them."""

    def __init__(self, places: list[tuple[int, int, int]], seed: int, stay: float, most: int, leave: dict[int, int]):
        self.places, self.stay, self.left, self.leave = places, stay, most, dict(leave)
        self.draw = random.Random(seed)
        self.alive = list(range(len(places)))
        self.turn = [threading.Semaphore(0) for _ in places]
        self.me = threading.local()
        self.error: BaseException | None = None

    def run(self, program: Any) -> None:
        threads = [threading.Thread(target=self._one, args=(k, program), daemon=True) for k in self.alive]
        for thread in threads:
            thread.start()
        self.turn[self.draw.choice(self.alive)].release()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _one(self, k: int, program: Any) -> None:
        self.turn[k].acquire()
        try:
            if self.error is None and self.leave.get(k) != 0:
                self.me.number = k
                interpreter_builder.set_grid_idx(*self.places[k])
                program()
        except _Gone:
            pass
        except BaseException as error:  # noqa: B036  it is raised again by the thread that launched
            self.error = self.error or error
        self.alive.remove(k)
        if self.alive:
            self.turn[self.draw.choice(self.alive)].release()

    def between(self) -> None:
        """A volatile load is about to be made by the program that runs."""
        k = self.me.number
        if k in self.leave:
            self.leave[k] -= 1
            if self.leave[k] < 0:
                raise _Gone
        self.left -= 1
        if self.left < 0:
            self.error = self.error or Stuck(f"{len(self.alive)} programs wait for each other")
        if self.error is not None:
            raise self.error
        if self.draw.random() < self.stay:
            return
        other = self.draw.choice(self.alive)
        if other != k:
            self.turn[other].release()
            self.turn[k].acquire()
            if self.error is not None:
                raise self.error
            interpreter_builder.set_grid_idx(*self.places[k])


@contextlib.contextmanager
def together(
    seed: int = 0, stay: float = 0.3, most: int = 100_000, leave: dict[int, int] | None = None
) -> Iterator[None]:
    """Cooperative launches run so inside of this; all others as ever.

    `stay` is how likely a program keeps its turn, `most` how many volatile loads a launch may have, and `leave` which
    programs are lost, and after how many volatile loads.
    """
    launch, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    now: list[Turns] = []

    def launched(self: GridExecutor, *args: Any, **named: Any) -> None:
        if not named.get("launch_cooperative_grid"):
            launch(self, *args, **named)
            return
        patch = interpreter._patch_lang
        # For a kernel and for Triton's own functions; again at every call of one, it is a third of the time.
        scopes = [patch(self.fn), patch(tl.max.fn)]
        interpreter._patch_lang = lambda fn: scopes[0]
        try:
            found = inspect.getcallargs(self.fn, *args, **{k: v for k, v in named.items() if k in self.arg_names})
            found = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in found.items()}
            x, y, z = self.grid
            interpreter_builder.set_grid_dim(x, y, z)
            places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
            now.append(Turns(places, seed, stay, most, leave or {}))
            now[-1].run(lambda: self.fn(**found))
        finally:
            if now:
                now.pop()
            interpreter._patch_lang = patch
            for scope in reversed(scopes):
                scope.restore()

    def loaded(self: InterpreterBuilder, *args: Any, **named: Any) -> Any:
        if now and args[-1] is True:  # is_volatile
            now[-1].between()
        return load(self, *args, **named)

    GridExecutor.__call__, InterpreterBuilder.create_masked_load = launched, loaded
    try:
        yield
    finally:
        GridExecutor.__call__, InterpreterBuilder.create_masked_load = launch, load
