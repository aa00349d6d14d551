"""Single steps from Python, as a stream takes them: ``python -m benchmarks.stream``.

rnnkern.Stream with its weights in float32, bf16 and int8 beside torch.nn's cell and its layer with T=1, rnnkern's cell,
and ONNX Runtime. Interleaved rounds in one process on one thread; every call is timed by itself, so that the slow ones
are seen, and beside them a loop of plain arithmetic, on which it is seen what of that is the machine's. Every side is
checked first. ``--accuracy`` prints instead what bf16 and int8 cost in accuracy.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rnnkern
from benchmarks import machine
from benchmarks.cases import Case, Shape, module_name
from benchmarks.onnx_graph import onnx_model
from benchmarks.problem import Problem, Unavailable, imported
from benchmarks.results import RESULTS, append, constants

COLUMNS = (
    "date, commit, machine, cpu, torch, threads, cell, B, H, side, calls, p50_us, p99_us, p999_us, ratio, ratio_p20, "
    "ratio_p80, error"
).split(", ")
CASES = [("lstm", 1, 64), ("lstm", 1, 128), ("lstm", 1, 256), ("lstm", 1, 512), ("lstm", 1, 1024)]
CASES += [("gru", 1, 128), ("rnn", 1, 128), ("gru", 1, 512), ("rnn", 1, 512), ("lstm", 4, 128), ("lstm", 16, 128)]
FORMS = {"fp32": None, "bf16": "bf16", "int8": "int8"}
ROUNDS, ROUND_SECONDS = 30, 0.01
ARITHMETIC = "arithmetic as long as stream fp32, out="
WORST = 0.05  # of a side that rounds its weights; it would be another computation beyond that

Call = Callable[[], Any]


def sides(cell: str, B: int, H: int) -> Iterator[tuple[str, Call, Call]]:
    """Name, what is timed, and what gives h after one step from zero states."""
    problem = Problem.of(Case(cell, Shape(1, B, H, layout="cell"), "inference", "fp32"))
    problem.hx = tuple(torch.zeros_like(h) for h in problem.hx)
    x, hx = problem.x, problem.hx if cell == "lstm" else problem.hx[0]

    def made(library: Any, layer: bool) -> Any:
        module = getattr(library, module_name(cell, "dense" if layer else "cell"))(H, H)
        end = "_l0" if layer else ""
        module.load_state_dict({f"{name.removesuffix('_l0')}{end}": value for name, value in problem.weights.items()})
        return module

    module = made(torch.nn, False)
    for name, form in FORMS.items():
        stream = rnnkern.Stream(module, B, weights=form)
        into = rnnkern.Stream(module, B, weights=form, out=torch.empty(B, H))
        fresh = rnnkern.Stream(module, B, weights=form)
        yield f"stream {name}", lambda stream=stream: stream.step(x), lambda fresh=fresh: fresh.step(x)
        yield (
            f"stream {name}, out=",
            lambda into=into: into.step(x),
            lambda form=form: rnnkern.Stream(module, B, weights=form).step(x),
        )
    states = tuple(h.unsqueeze(0) for h in problem.hx)
    steps, whole = x.unsqueeze(0), states if cell == "lstm" else states[0]
    for name, library in (("torch.nn", torch.nn), ("rnnkern", rnnkern)):
        one, layer = made(library, False), made(library, True)
        yield (
            f"{name} cell",
            lambda one=one: one(x, hx),
            (lambda one=one: one(x, hx)[0]) if cell == "lstm" else (lambda one=one: one(x, hx)),
        )
        yield (
            f"{name} layer, T=1",
            lambda layer=layer: layer(steps, whole),
            lambda layer=layer: layer(steps, whole)[0][0],
        )
    yield from onnx_sides(problem)


def onnx_sides(problem: Problem) -> Iterator[tuple[str, Call, Call]]:
    """Plain, and with inputs and outputs bound to memory that is there already."""
    try:
        runtime = imported("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = runtime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    except Unavailable as reason:
        print(f"onnxruntime: {reason}", file=sys.stderr)
        return
    given = {"x": problem.x.unsqueeze(0).numpy()}
    given |= {f"{name}0": h.unsqueeze(0).numpy() for name, h in zip("hc", problem.hx, strict=False)}

    def found() -> Tensor:
        return torch.from_numpy(session.run(["h"], given)[0])[0]

    binding = session.io_binding()
    for name, value in given.items():
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(value))
    for output in session.get_outputs():
        empty = runtime.OrtValue.ortvalue_from_numpy(given[f"{output.name}0"])
        binding.bind_ortvalue_output(output.name, empty)
    yield "onnxruntime", lambda: session.run(None, given), found
    yield "onnxruntime, bound", lambda: session.run_with_iobinding(binding), found


def as_long_as(call: Call) -> Call:
    """Arithmetic that takes about as long, on next to no memory."""

    def adding(count: int) -> Call:
        numbers = (1,) * count  # what range(count) gives takes longer once it is above 256
        return lambda: sum(numbers)

    none, many, wanted = (statistics.median(durations(c, 200)) for c in (adding(0), adding(1000), call))
    return adding(max(0, round(1000 * (wanted - none) / (many - none))))


def durations(call: Call, count: int) -> list[int]:
    """Of `count` calls, in ns, after some that are not timed."""
    clock, taken = time.perf_counter_ns, []
    for _ in range(max(3, count // 10)):
        call()
    for _ in range(count):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


def measured(cell: str, B: int, H: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of a case. The ratio is that of torch.nn's cell to the side, by the medians of a round."""
    entries: list[tuple[str, Call, Call | None]] = list(sides(cell, B, H))
    firsts = {name: first for name, _, first in entries if first is not None}
    truth, errors = firsts["torch.nn cell"](), {}
    for name, first in firsts.items():
        errors[name] = ((first() - truth).abs().max() / truth.abs().max()).item()
        if not errors[name] <= WORST:
            raise RuntimeError(f"{name}: h is off by {errors[name]:.3g} of the largest value")
    timed = {name: call for name, call, _ in entries}
    entries.append((ARITHMETIC, as_long_as(timed["stream fp32, out="]), None))
    counts = {}
    for name, call, _ in entries:
        call()
        counts[name] = max(5, int(ROUND_SECONDS * 1e9 / statistics.median(durations(call, 20))))
    taken: dict[str, list[int]] = {name: [] for name, *_ in entries}
    medians: dict[str, list[float]] = {name: [] for name, *_ in entries}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call, _ in entries:
                found = durations(call, counts[name])
                taken[name] += found
                medians[name].append(statistics.median(found))
    finally:
        gc.enable()
    for name, *_ in entries:
        every = sorted(taken[name])
        p50, p99, p999 = (every[min(len(every) - 1, int(len(every) * p))] / 1e3 for p in (0.5, 0.99, 0.999))
        ratios = [a / b for a, b in zip(medians["torch.nn cell"], medians[name], strict=True)]
        p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
        yield {
            **{"cell": cell, "B": B, "H": H, "side": name, "calls": len(every)},
            **{"p50_us": f"{p50:.4g}", "p99_us": f"{p99:.4g}", "p999_us": f"{p999:.4g}"},
            **{"ratio": f"{statistics.median(ratios):.4g}", "ratio_p20": f"{p20:.4g}", "ratio_p80": f"{p80:.4g}"},
            "error": f"{errors[name]:.2g}" if name in errors else "",
        }


def trained(cell: str, H: int, steps: int) -> tuple[torch.nn.Module, float]:
    """A module that learns to repeat what it was given five steps ago, and its loss (guessing has 1)."""
    torch.manual_seed(0)
    module, head, left = getattr(torch.nn, module_name(cell, "dense"))(8, H), torch.nn.Linear(H, 8), 1.0
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 3e-3)
    for _ in range(steps):
        x = torch.randn(30, 32, 8).sign()
        loss = (head(module(x)[0])[5:] - x[:-5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = loss.item()
    return module, left


def accuracies() -> Iterator[str]:
    """The largest error of h and its relative L2 error over 1000 steps, against float64."""
    for cell, H, steps in product(("lstm", "gru", "rnn"), (128, 512), (0, 300)):
        module, loss = trained(cell, H, steps)
        what = f"{cell}, H={H}, " + (f"trained to a loss of {loss:.2g}" if steps else "initial weights")
        x = torch.randn(1000, 1, 8).sign()
        with torch.no_grad():
            truth = module.double()(x.double())[0]
        module.float()
        for name, form in FORMS.items():
            error = rnnkern.Stream(module, weights=form).run(x) - truth
            relative = error.norm() / truth.norm()
            yield f"{what}, {name}: largest error {error.abs().max().item():.1e}, relative {relative.item():.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.splitlines()[0])
    parser.add_argument("--cell", nargs="*", default=["lstm", "gru", "rnn"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--out", type=Path, help="appended to; default: benchmarks/results/stream/<machine>.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.accuracy:
        for line in accuracies():
            print(line, flush=True)
        return 0
    out = args.out or RESULTS / "stream" / f"{machine.machine()}.csv"
    shared = {name: value for name, value in constants(1).items() if name in COLUMNS}
    with torch.inference_mode():
        for case in CASES:
            for row in measured(*case, args.rounds) if case[0] in args.cell else ():
                append(out, shared | row, COLUMNS)
                print(", ".join(f"{value}" for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
