"""What a GPU's own recurrent kernels take for a step, and the least that a step costs: ``python -m benchmarks.micro``.

For every cell, dtype, batch and width: the time per step of torch.nn, forward and forward with backward, and the names
of the kernels that ran, from which cuDNN's algorithm is read. Before them the time of an empty kernel in a CUDA graph,
the floor of any design that launches a kernel for each step. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.clocks import DeviceClock
from benchmarks.peers import torch_algorithm

COLUMNS = ("what", "cell", "dtype", "T", "B", "H", "us_per_step", "algorithm")
STEPS = 256
# Most telling first: sizes where cuDNN may or may not take its persistent kernel.
WIDTHS = (512, 1024, 256, 768, 128, 2048, 64)
BATCHES = (16, 64, 1, 256)
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")


def layer_steps(clock: DeviceClock, cell: str, precision: str, batch: int, width: int) -> list[dict[str, Any]]:
    """Time per step of torch.nn's layer, forward and with backward."""
    dtype = DTYPES.get(precision, torch.float32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    module = getattr(torch.nn, cell.upper())(width, width, device="cuda", dtype=dtype)
    x = torch.randn(STEPS, batch, width, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def forward() -> None:
        with torch.inference_mode():
            module(x)

    def both() -> None:
        module(x)[0].backward(dy)

    common = {"cell": cell, "dtype": precision, "T": STEPS, "B": batch, "H": width}
    rows = []
    for what, run in (("forward", forward), ("forward+backward", both)):
        run()
        algorithm = torch_algorithm(run)
        clock.settle()
        seconds = min(clock.seconds(run, 3) for _ in range(3))
        rows.append(common | {"what": what, "us_per_step": f"{1e6 * seconds / STEPS:.4g}", "algorithm": algorithm})
    return rows


def empty_step(clock: DeviceClock) -> dict[str, Any]:
    """An element-wise kernel on one number, many times in one graph."""
    value = torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        value.add_(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            value.add_(1)
    clock.settle()
    seconds = min(clock.seconds(graph.replay, 5) for _ in range(5))
    return {"what": "empty kernel in a graph", "T": STEPS, "us_per_step": f"{1e6 * seconds / STEPS:.4g}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=120, help="no new measurement after that")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use")
    clock, end = DeviceClock(), time.perf_counter() + args.seconds
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerow(empty_step(clock))
        for width, batch, precision, cell in product(WIDTHS, BATCHES, PRECISIONS, ("lstm", "gru", "rnn")):
            if time.perf_counter() > end:
                print("out of time: the sizes that are left were not measured", file=sys.stderr)
                break
            rows = layer_steps(clock, cell, precision, batch, width)
            writer.writerows(rows)
            file.flush()
            print(" ".join(str(value) for row in rows for value in row.values()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
