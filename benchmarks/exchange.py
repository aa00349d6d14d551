"""What programs of one kernel need to hand data to each other, and to read it: the constants of persistent kernels.

Every wait is bounded: a program that has looked ``POLLS`` times waits no more, sees what is missing, notes it and
leaves, and so then does everyone who waits for it. Launches are cooperative and never larger than the number of SMs, so
that all programs run at once or none does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import triton
import triton.language as tl

PROGRAMS = (16, 32, 64, 128)
METHODS = ("barrier", "barrier-asm", "data")
POLLS = 1_000_000  # by one program in one launch: about a second
EMPTY = -1  # what an element holds that nobody has written yet


@triton.jit
def _acquire(pointer):
    """A load that orders those after it, by every thread. Triton has it only as an atomic addition of nothing, which
    costs two barriers of the program's threads for each look."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _meet(counter, polls, METHOD: tl.constexpr, PROGRAMS: tl.constexpr, POLLS: tl.constexpr):
    """Waits until all programs have come here, or this one has looked too often: how many it saw, and its looks.

    With METHOD 1 every thread counts for itself. Where a barrier of the threads follows, no branch may rest on that.
    """
    tl.debug_barrier()  # this program's stores lie before its release
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    if METHOD == 0:
        come = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while (come < PROGRAMS) & (polls < POLLS):
            come = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls += 1
    else:
        come = _acquire(counter)
        while (come < PROGRAMS) & (polls < POLLS):
            come = _acquire(counter)
            polls += 1
    tl.debug_barrier()
    return come, polls


@triton.jit
def exchange(
    data,  # [steps + 1, PROGRAMS * WIDTH] int32, all EMPTY but the first row, which is 0
    counters,  # [steps] int32, all 0; unused where the data is the flag
    failed,  # [1] int32: how many programs gave up, or saw what they should not
    steps,
    METHOD: tl.constexpr,  # 0, 1: a barrier by atomics or with inline assembly; 2: the data is its own flag
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    POLLS: tl.constexpr,  # in all steps together
):
    """Each step, every program reads all of the row before and then writes its own part of the next: the step's number.

    This is what a persistent recurrent kernel does with h, less the arithmetic.
    """
    row: tl.constexpr = PROGRAMS * WIDTH
    mine = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    everyone = tl.arange(0, row)
    t = 0
    polls = 0
    good = 1
    while (t < steps) & (good != 0):
        source = data + t.to(tl.int64) * row + everyone
        if METHOD == 2:
            low = tl.min(tl.load(source, volatile=True), axis=0)
            while (low < 0) & (polls < POLLS):
                low = tl.min(tl.load(source, volatile=True), axis=0)
                polls += 1
        else:
            low = tl.min(tl.load(source, cache_modifier=".cg"), axis=0)
        # After a wait that was given up, some part of the row is EMPTY. The reduction tells all threads the same.
        good = (low == t).to(tl.int32)
        if good != 0:
            # The new value comes from what was read: nothing can be written ahead of it.
            tl.store(data + (t + 1).to(tl.int64) * row + mine, mine * 0 + low + 1, cache_modifier=".cg")
            if METHOD != 2:
                _, polls = _meet(counters + t, polls, METHOD, PROGRAMS, POLLS)
        t += 1
    if good == 0:
        tl.atomic_add(failed, 1)


@triton.jit
def gather_ids(
    counter,  # [1] int32, 0
    ids,  # [programs] int32: the SM each program found itself on, or EMPTY if not all programs met
    PROGRAMS: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Which SMs the programs run on, all at once."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    polls = tl.program_id(0) * 0
    come, _ = _meet(counter, polls, 1, PROGRAMS, POLLS)
    tl.store(ids + tl.program_id(0), tl.where(come >= PROGRAMS, sm, -1))


@triton.jit
def read_tiles(
    tiles,  # int32, `tile` elements for each program or for all of them
    out,  # [programs] int32
    repeats,
    stride,  # from a program's tile to the next one's; 0: all read the same
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    VOLATILE: tl.constexpr,
):
    """Each program reads a tile `repeats` times past the SM's own cache, in turns that begin at another chunk."""
    chunks: tl.constexpr = TILE // CHUNK
    program = tl.program_id(0)
    base = tiles + program.to(tl.int64) * stride
    lane = tl.arange(0, CHUNK)
    total = lane * 0
    for turn in range(repeats):
        for k in tl.static_range(chunks):
            # The place depends on the turn, or the compiler would read once for all of them.
            source = base + ((k + turn + program) % chunks) * CHUNK + lane
            if VOLATILE:
                total += tl.load(source, volatile=True)
            else:
                total += tl.load(source, cache_modifier=".cg")
    tl.store(out + program, tl.sum(total, axis=0))


@triton.jit
def nothing(out):
    """As little as a kernel can do and still be there."""
    if tl.program_id(0) < 0:
        tl.store(out, 0)


class Failed(RuntimeError):
    """An exchange that did not come to its end, or did not carry what it should have."""


class Exchange:
    """Programs that hand a row of `kib` KiB on to each other, ready to run on the current stream."""

    def __init__(self, method: str, programs: int, kib: int, steps: int, warps: int = 4) -> None:
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        if programs > sms:
            raise Failed(f"{programs} programs on {sms} SMs")
        self.method, self.programs, self.steps, self.warps = METHODS.index(method), programs, steps, warps
        self.width = max(1, 256 * kib // programs)
        self.data = torch.empty(steps + 1, programs * self.width, dtype=torch.int32, device="cuda")
        self.counters = torch.empty(steps, dtype=torch.int32, device="cuda")
        self.failed = torch.zeros(1, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        self.data.fill_(EMPTY)
        self.data[0] = 0
        self.counters.zero_()

    def launch(self, steps: int | None = None) -> None:
        """After `reset`."""
        exchange[(self.programs,)](
            self.data,
            self.counters,
            self.failed,
            self.steps if steps is None else steps,
            METHOD=self.method,
            PROGRAMS=self.programs,
            WIDTH=self.width,
            POLLS=POLLS,
            num_warps=self.warps,
            launch_cooperative_grid=True,
        )

    def check(self, steps: int | None = None) -> None:
        """Waits for the device. Raises `Failed` unless every step of every launch since the last check was right."""
        steps = self.steps if steps is None else steps
        failed, self.failed = self.failed.item(), torch.zeros_like(self.failed)
        if failed:
            raise Failed(f"{failed} of {self.programs} programs gave up, or read what was not written yet")
        if not bool((self.data[: steps + 1] == torch.arange(steps + 1, device="cuda")[:, None]).all()):
            raise Failed("what was handed on is not what was written")


def seconds_per_step(one: Exchange, clock: Callable[[Callable[[], object]], float]) -> float:
    """The slope between a short and a long run: launching and the first meeting are in both. `clock` times a call."""
    times = {}
    for steps in (one.steps // 4, one.steps):
        one.reset()
        one.launch(steps)  # compiles
        one.check(steps)
        taken = []
        for _ in range(5):
            one.reset()
            taken.append(clock(lambda steps=steps: one.launch(steps)))
            one.check(steps)
        times[steps] = min(taken)
    (few, short), (many, long) = sorted(times.items())
    return (long - short) / (many - few)


def once(call: Callable[[], object]) -> float:
    """Seconds of one call by events on the current stream, which is empty before it."""
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def handoffs(kib: int = 4, steps: int = 4096) -> list[tuple[int, float]]:
    """Programs and the least microseconds in which so many hand a step on, by whichever method is fastest here.

    A method that fails counts for nothing; if all do, the last one's reason is raised.
    """
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    found: dict[int, float] = {}
    reason: Exception | None = None
    for programs, method in product([count for count in PROGRAMS if count <= sms], METHODS):
        try:
            taken = 1e6 * seconds_per_step(Exchange(method, programs, kib, steps), once)
        except Exception as error:  # Triton's compiler and launcher fail in many ways
            reason = error
        else:
            found[programs] = min(taken, found.get(programs, taken))
    if reason is not None and not found:
        raise reason
    return sorted(found.items())
