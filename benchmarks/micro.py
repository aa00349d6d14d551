"""The constants that kernels for a GPU are designed from, measured: ``python -m benchmarks.micro --out FILE``.

First what waiting, launching and reading cost by themselves (exchange.py has the kernels): a step handed on between
programs, a tile read from the last cache, a kernel in a CUDA graph, a cooperative launch. Then, for every cell, dtype,
batch and width, the time per step of torch.nn, and the names of the kernels that ran, from which cuDNN's algorithm is
read. Rows are written as they come; what fails leaves a row that says so.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.clocks import DeviceClock
from benchmarks.peers import torch_algorithm

# us: for one step, one launch or one tile, whichever `what` speaks of
COLUMNS = ("what", "cell", "dtype", "T", "B", "H", "programs", "kib", "us", "gb_per_s", "note")
STEPS = 256
# Most telling first: sizes where cuDNN may or may not take its persistent kernel.
WIDTHS = (512, 1024, 256, 768, 128, 2048, 64)
BATCHES = (16, 64, 1, 256)
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")

Row = dict[str, Any]
Measurement = Callable[[], Iterator[Row]]


def sms() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.4g}"


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def replayed(clock: DeviceClock, call: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    clock.settle()
    return min(clock.seconds(graph.replay, 5) for _ in range(5)) / count


def handed_on() -> Iterator[Row]:
    """A step handed on between programs: by a barrier of all, or by the data itself."""
    from benchmarks import exchange

    for kib, programs, method in product((4, 32), exchange.PROGRAMS, exchange.METHODS):
        row = {"what": f"step handed on, {method}", "programs": programs, "kib": kib}
        try:
            one = exchange.Exchange(method, programs, kib, 4096)
            row["us"] = us(exchange.seconds_per_step(one, exchange.once))
        except Exception as error:  # one method that does not work is no reason not to know the others
            row["note"] = failure(error)
        yield row


def two_at_once() -> Iterator[Row]:
    """Two cooperative kernels on two streams, which share the SMs, beside one alone."""
    from benchmarks import exchange

    steps, programs = 16384, sms() // 2
    programs = 1 << (programs.bit_length() - 1)
    ones = [exchange.Exchange("data", programs, 4, steps) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in ones]

    def run(count: int) -> float:
        for one in ones[:count]:
            one.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for one, stream in list(zip(ones, streams, strict=True))[:count]:
            with torch.cuda.stream(stream):
                one.launch()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        for one in ones[:count]:
            one.check()
        return seconds

    run(2)
    for count in (1, 2):
        seconds = min(run(count) for _ in range(3)) / steps
        yield {"what": f"step handed on, {count} kernels at once", "programs": programs, "kib": 4, "us": us(seconds)}


def stress(steps: int) -> Iterator[Row]:
    """As many steps as asked for, each checked: data as its own flag must never be seen half written."""
    from benchmarks import exchange

    programs, each, done = max(p for p in exchange.PROGRAMS if p <= sms()), 65536, 0
    one, seconds = exchange.Exchange("data", programs, 4, each), 0.0
    while done < steps:
        one.reset()
        seconds += exchange.once(one.launch)
        one.check()
        done += each
    note = f"{done} steps without an error"
    yield {"what": "stress, data", "programs": programs, "kib": 4, "us": us(seconds / done), "note": note}


def tile_reads(clock: DeviceClock) -> Iterator[Row]:
    """All programs read from the last cache, one tile or one each, over and over in one launch."""
    from benchmarks.exchange import read_tiles

    programs, few, many = sms(), 512, 2048  # long enough that launching from Python is not what is timed
    tiles = torch.ones(programs * 65536, dtype=torch.int32, device="cuda")
    out = torch.zeros(programs, dtype=torch.int32, device="cuda")
    for kib, shared, volatile in product((16, 32, 64, 128, 256), (True, False), (False, True)):
        tile = 256 * kib

        def read(repeats: int, tile: int = tile, shared: bool = shared, volatile: bool = volatile) -> None:
            stride = 0 if shared else tile
            constants = {"TILE": tile, "CHUNK": 2048, "VOLATILE": volatile}
            read_tiles[(programs,)](tiles, out, repeats, stride, **constants, num_warps=8)

        read(few)
        clock.settle()
        short, long = (
            min(clock.seconds(lambda repeats=repeats: read(repeats), 3) for _ in range(5)) for repeats in (few, many)
        )
        if out.min().item() != tile * many or out.max().item() != tile * many:
            raise RuntimeError("the tiles' sum is wrong")
        seconds = (long - short) / (many - few)
        yield {
            "what": f"{'one tile' if shared else 'a tile each'} read, {'volatile' if volatile else '.cg'}",
            "programs": programs,
            "kib": kib,
            "us": us(seconds),
            "gb_per_s": f"{programs * 4 * tile / seconds / 1e9:.4g}",
        }


def launches(clock: DeviceClock) -> Iterator[Row]:
    """An empty kernel, plain and cooperative, from Python and in a CUDA graph."""
    from benchmarks.exchange import nothing

    value, programs = torch.zeros(1, dtype=torch.int32, device="cuda"), sms()

    def launch(cooperative: bool) -> None:
        nothing[(programs,)](value, num_warps=4, launch_cooperative_grid=cooperative)

    yield {"what": "element-wise kernel in a graph", "us": us(replayed(clock, lambda: value.add_(1), STEPS))}
    for cooperative in (False, True):
        kind = "cooperative " if cooperative else ""

        def call(cooperative: bool = cooperative) -> None:
            launch(cooperative)

        call()
        clock.settle()
        seconds = min(clock.seconds(call, STEPS) for _ in range(5))
        yield {"what": f"empty {kind}kernel from Python", "programs": programs, "us": us(seconds)}
        row = {"what": f"empty {kind}kernel in a graph", "programs": programs}
        try:
            row["us"] = us(replayed(clock, call, STEPS))
        except RuntimeError as error:
            row["note"] = f"cannot be captured: {str(error).splitlines()[0]}"
        yield row


def weight_steps(clock: DeviceClock) -> Iterator[Row]:
    """One launch for each step in a CUDA graph, each program reading its part of the weights from the last cache: the
    floor of kernels that keep nothing on the chip."""
    from benchmarks.exchange import read_tiles

    programs = sms()
    for kib in (16, 32, 64, 128):
        tile = 256 * kib
        tiles = torch.ones(programs * tile, dtype=torch.int32, device="cuda")
        out = torch.zeros(programs, dtype=torch.int32, device="cuda")

        def step(tile: int = tile, tiles: torch.Tensor = tiles, out: torch.Tensor = out) -> None:
            read_tiles[(programs,)](tiles, out, 1, tile, TILE=tile, CHUNK=2048, VOLATILE=False, num_warps=8)

        what = "kernel in a graph that reads weights"
        yield {"what": what, "programs": programs, "kib": kib, "us": us(replayed(clock, step, STEPS))}


def co_resident() -> Iterator[Row]:
    """As many programs as SMs: whether they all meet, and on how many SMs."""
    from benchmarks.exchange import EMPTY, POLLS, gather_ids

    programs = sms()
    for warps in (4, 8, 16):
        ids = torch.full((programs,), EMPTY, dtype=torch.int32, device="cuda")
        counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        options = {"num_warps": warps, "launch_cooperative_grid": True}
        gather_ids[(programs,)](counter, ids, PROGRAMS=programs, POLLS=POLLS, **options)
        met = ids[ids != EMPTY]
        note = f"{met.numel()} of {programs} met, on {met.unique().numel()} SMs"
        yield {"what": f"co-resident programs of {warps} warps", "programs": programs, "note": note}


def layer_steps(clock: DeviceClock, cell: str, precision: str, batch: int, width: int) -> Iterator[Row]:
    """Time per step of torch.nn's layer, forward and with backward."""
    dtype = DTYPES.get(precision, torch.float32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    module = getattr(torch.nn, cell.upper())(width, width, device="cuda", dtype=dtype)
    x = torch.randn(STEPS, batch, width, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    inputs = [x, *module.parameters()]

    def forward() -> None:
        with torch.inference_mode():
            module(x)

    def both() -> None:
        torch.autograd.grad(module(x)[0], inputs, dy)

    common = {"cell": cell, "dtype": precision, "T": STEPS, "B": batch, "H": width}
    for what, run in (("forward", forward), ("forward+backward", both)):
        run()
        algorithm = torch_algorithm(run)
        clock.settle()
        seconds = min(clock.seconds(run, 3) for _ in range(3))
        yield common | {"what": what, "us": us(seconds / STEPS), "note": algorithm}


def measurements(clock: DeviceClock, stress_steps: int) -> Iterator[tuple[str, Measurement]]:
    """By name, most telling first."""
    yield "hand-offs", handed_on
    yield "launches", lambda: launches(clock)
    yield "tile reads", lambda: tile_reads(clock)
    yield "weights each step", lambda: weight_steps(clock)
    yield "co-resident programs", co_resident
    yield "two kernels at once", two_at_once
    yield "stress", lambda: stress(stress_steps)
    for width, batch, precision, cell in product(WIDTHS, BATCHES, PRECISIONS, ("lstm", "gru", "rnn")):
        sizes = (cell, precision, batch, width)
        yield " ".join(map(str, sizes)), lambda sizes=sizes: layer_steps(clock, *sizes)


def run(todo: Iterator[tuple[str, Measurement]], keep: Callable[[Row], None], seconds: float) -> int:
    """Every measurement that begins in time; one that fails leaves a row and stops no other. How many failed."""
    end, failed = time.perf_counter() + seconds, 0
    for name, measure in todo:
        if time.perf_counter() > end:
            print(f"out of time: {name} and what comes after it were not measured", file=sys.stderr)
            break
        try:
            for row in measure():
                keep(row)
        except Exception as error:  # compilers and drivers fail in many ways; what else can be measured is wanted
            failed += 1
            keep({"what": name, "note": failure(error)})
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=120, help="no new measurement after that")
    parser.add_argument("--stress", type=int, default=1_000_000, help="steps that are handed on and checked")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use")
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()

        def keep(row: Row) -> None:
            writer.writerow(row)
            file.flush()
            print(", ".join(f"{value}" for value in row.values()), file=sys.stderr)

        failed = run(measurements(DeviceClock(), args.stress), keep, args.seconds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
