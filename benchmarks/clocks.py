"""How a side's calls are timed: on the host's clock, or by events on the device's stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol as Interface

import torch

SLICE = 0.002  # s
WARM = 0.015  # s; a pool that slept may start out on one core: several slices of the scheduler until it is spread


class Clock(Interface):
    def ready(self, call: Callable[[], object]) -> None:
        """Brings the machine to the state that every round of this call starts from."""

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of one call, over so many in a row."""


class HostClock:
    """Calls that have done their work when they return."""

    def ready(self, call: Callable[[], object]) -> None:
        self.settle()
        end = time.perf_counter() + WARM
        while time.perf_counter() < end:
            call()

    def settle(self) -> None:
        """Waits until this process is idle, a quarter of a second at most.

        Thread pools spin on after a call, OpenMP's for milliseconds, ONNX Runtime's for fifty, and would take the cores
        from the side that comes next.
        """
        quiet, end = 0, time.perf_counter() + 0.25
        while quiet < 2 and time.perf_counter() < end:
            used = time.process_time()
            time.sleep(SLICE)
            quiet = quiet + 1 if time.process_time() - used < SLICE / 8 else 0

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class DeviceClock:
    """Calls that only enqueue work on the current CUDA stream. Before each round the last cache is overwritten."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def ready(self, call: Callable[[], object]) -> None:
        """Warm clocks and allocator first, the cache last: calls in between would fill it again."""
        end = time.perf_counter() + WARM
        while time.perf_counter() < end:
            call()
            torch.cuda.synchronize()  # or a slow call's queue grows to seconds of work
        self.settle()

    def settle(self) -> None:
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls


def clock_for(device: str) -> Clock:
    return DeviceClock() if device == "cuda" else HostClock()
