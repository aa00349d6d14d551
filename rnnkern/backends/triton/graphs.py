"""Many launches as few: runs of steps recorded as CUDA graphs, for any T and any tensors.

A step's kernels find their addresses and sizes in a table on the device, and their step number is the table's plus a
launch argument. So a graph of 64 or 8 steps that ends by moving the table's number on can be recorded once for a kind
of scan and replayed wherever such steps are to be done. Every plan owns a table and belongs to one stream: what one
call writes there is read before the next call on that stream writes.

Where nothing can be recorded (a caller is recording a graph of its own, or the interpreter runs), the same kernels are
launched one by one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from rnnkern.backends.triton.launch import Launch
from rnnkern.backends.triton.slots import NAMES, advance, word, write_table

RUNS = (64, 8)  # steps of one graph, longest first
CAPACITY = 64  # plans that are kept


class Recorded(Protocol):
    def replay(self) -> None: ...

    def close(self) -> None:
        """Wait until the last replay has ended; nothing may be freed before."""


class Recorder(Protocol):
    """What differs between a GPU and a test of this file."""

    def may_record(self, device: torch.device) -> bool: ...

    def stream(self, device: torch.device) -> int: ...

    def record(self, run: Callable[[], None]) -> Recorded: ...


class CudaGraph:
    def __init__(self, run: Callable[[], None]) -> None:
        self.graph, self.last = torch.cuda.CUDAGraph(), torch.cuda.Event()
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        # Not torch.cuda.graph(): it empties the allocator's cache, and these kernels allocate nothing.
        with torch.cuda.stream(side):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                self.graph.capture_end()
        here.wait_stream(side)

    def replay(self) -> None:
        self.graph.replay()
        self.last.record()

    def close(self) -> None:
        self.last.synchronize()


class Cuda:
    def may_record(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def record(self, run: Callable[[], None]) -> Recorded:
        return CudaGraph(run)


class Plan:
    """A table, and the graphs that read it."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.lock = table, threading.Lock()
        self.graphs: dict[int, Recorded] = {}

    def close(self) -> None:
        with self.lock:
            for graph in self.graphs.values():
                graph.close()
            self.graphs.clear()


class Steps:
    """Runs programs of steps, and keeps what it recorded for the latest kinds of them."""

    def __init__(self, recorder: Recorder | None = None, capacity: int = CAPACITY) -> None:
        self.recorder: Recorder = Cuda() if recorder is None else recorder
        self.capacity, self.lock = capacity, threading.Lock()
        self.plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()

    def run(
        self, launches: tuple[Launch, ...], steps: int, words: dict[str, Tensor | int], device: torch.device
    ) -> None:
        if steps < RUNS[-1] or not self.recorder.may_record(device):
            table = new_table(device)
            write(table, words)
            step_by_step(launches, table, range(steps))
            return
        plan = self.plan(launches, device)
        with plan.lock:
            write(plan.table, words)
            # Kernels are compiled and loaded at their first launch, which must not be a recorded one.
            single = steps % RUNS[-1] if plan.graphs or steps % RUNS[-1] else RUNS[-1]
            if single:
                step_by_step(launches, plan.table, range(single))
                advance[(1,)](plan.table, single)
            for size in runs(steps - single):
                if size not in plan.graphs:
                    plan.graphs[size] = self.recorder.record(lambda size=size: a_run(launches, plan.table, size))  # type: ignore[misc]
                plan.graphs[size].replay()

    def plan(self, launches: tuple[Launch, ...], device: torch.device) -> Plan:
        key = (device, self.recorder.stream(device), *(one.key for one in launches))
        dropped = None
        with self.lock:
            plan = self.plans.get(key)
            if plan is None:
                plan = self.plans[key] = Plan(new_table(device))
                if len(self.plans) > self.capacity:
                    _, dropped = self.plans.popitem(last=False)
            self.plans.move_to_end(key)
        if dropped is not None:
            dropped.close()
        return plan


def runs(steps: int) -> Iterable[int]:
    """`steps`, a multiple of the shortest run, as lengths of runs."""
    for size in RUNS:
        for _ in range(steps // size):
            yield size
        steps %= size


def a_run(launches: tuple[Launch, ...], table: Tensor, size: int) -> None:
    step_by_step(launches, table, range(size))
    advance[(1,)](table, size)


def step_by_step(launches: tuple[Launch, ...], table: Tensor, steps: Iterable[int]) -> None:
    for i in steps:
        for one in launches:
            one(table=table, i=i)


def new_table(device: torch.device) -> Tensor:
    return torch.empty(len(NAMES), dtype=torch.int64, device=device)


def write(table: Tensor, words: dict[str, Tensor | int]) -> None:
    """Sizes and addresses, in the table's order."""
    found = tuple(word(value.data_ptr() if isinstance(value, Tensor) else value) for value in words.values())
    write_table[(1,)](table, found, len(found))
