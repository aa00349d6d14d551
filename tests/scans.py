"""Scans as data: cases drawn at random, their inputs, and how a backend's results are held against the reference.

Truth is the reference in fp64 on the same values, the yardstick the reference in the dtype under test (tolerance.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from states import natural
from tolerance import check, check_grad
from torch import Tensor

from rnnkern import dispatch
from rnnkern.backends.base import Backend, ScanGrads, ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.cells import CELLS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REFERENCE = dispatch.backend("reference")
TORCHS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
Results = list[ScanOutputs | ScanGrads]


@dataclass(frozen=True)
class Case:
    cell: str = "lstm"
    dtype: torch.dtype = torch.float32
    T: int = 5
    B: int = 7
    H: int = 17
    layout: str = "dense"
    reverse: tuple[bool, ...] = (False, True)
    bias: bool = True
    project: bool = False
    save: str = "all"
    strided: bool = False
    dseq: bool = True
    reset: str = ""
    seed: int = 0

    def __str__(self) -> str:
        walk = "".join("<" if r else ">" for r in self.reverse)
        words = [name for name in ("bias", "project", "strided", "dseq") if getattr(self, name)]
        kind = str(self.dtype).removeprefix("torch.")
        parts = [self.cell, kind, f"T{self.T}", f"B{self.B}", f"H{self.H}", self.layout, walk, self.save, *words]
        return "-".join([*parts, f"reset_{self.reset}" if self.reset else "keep"])


def drawn(count: int, axes: dict[str, list], cells: Iterable[str] = CELLS) -> list[Case]:
    """For each of torch.nn's cells and each dtype `count` cases in which every value of every axis occurs, in ever
    different company; for the other cells, which are scanned by the same drivers, a third of them.
    """
    cases = []
    for cell in cells:
        for dtype in DTYPES:
            rng = random.Random(f"{cell} {dtype}")
            columns = {}
            for name, values in axes.items():
                column = [values[k % len(values)] for k in range(count)]
                rng.shuffle(column)
                columns[name] = column
            for k in range(0, count, 1 if cell in TORCHS else 3):
                given = {name: column[k] for name, column in columns.items()}
                T, B, H = given.pop("T, B, H", (0, 0, 0))  # an axis of its own where sizes are not free
                cases.append(Case(cell, dtype, **({"T": T, "B": B, "H": H} if H else {}), **given, seed=k))
    return cases


def lengths_of(case: Case, rng: random.Random) -> list[int] | None:
    if case.layout == "dense":
        return None
    if case.layout == "packed":
        return sorted((rng.randint(1, case.T) for _ in range(case.B)), reverse=True)
    return [rng.randint(0, case.T) for _ in range(case.B)]


def spread(tensor: Tensor, strided: bool) -> Tensor:
    """The same values in the last columns of a wider tensor with its first two dimensions swapped."""
    if not strided:
        return tensor
    wide = tensor.new_full((tensor.shape[1], tensor.shape[0], tensor.shape[2] + 5), float("nan"))
    wide[..., 5:] = tensor.transpose(0, 1)
    return wide.transpose(0, 1)[..., 5:]


def inputs_of(case: Case) -> ScanInputs:
    cell, rng, generator = CELLS[case.cell], random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    T, B, H, N, G = case.T, case.B, case.H, len(case.reverse), len(cell.gates)
    # A cell that mixes h into its new state has no h of another width.
    P = max(1, H // 2) if case.project and len(cell.states) > 1 else H
    accumulate = accumulation_dtype(case.dtype)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def states(rows: int) -> tuple[Tensor, ...]:
        rest = (normal(N, rows, H, dtype=accumulate) for _ in cell.states[1:])
        return natural(cell, (normal(N, rows, P), *rest))

    lengths, offsets, S = lengths_of(case, rng), None, T * B
    if case.layout == "packed":
        alive = [sum(length > t for length in lengths or []) for t in range(T)]
        offsets = torch.tensor([sum(alive[:t]) for t in range(T)], dtype=torch.int64)
        S = sum(alive)
    params = []
    for _ in range(N):
        group = [normal(*cell.recurrent_shape(H, P)) / P**0.5]
        if case.bias:
            group.append(normal(G * H))
        if case.project:
            group.append(normal(P, H) / H**0.5)
        params.append(tuple(group))
    names = ("w_hh", *(("b_hh",) if case.bias else ()), *(("w_hr",) if case.project else ()))
    reset = None
    if case.reset:
        reset = torch.rand((S, 1), generator=generator).lt(0.3).expand(S, N)
    learned = tuple(s.expand(-1, B, -1) for s in states(1)) if case.reset == "learned" else ()
    return ScanInputs(
        spec=ScanSpec(case.cell, case.reverse, names, save=case.save),
        T=T,
        B=B,
        gx=spread(normal(S, N, G * H), case.strided),
        states=tuple(spread(s, case.strided) for s in states(B)),
        params=tuple(params),
        offsets=offsets,
        lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        reset=reset,
        reset_states=learned,
    )


def with_options(case: Case, parameters: tuple[str, ...] = ("ln_hh", "peephole", "ln_c")) -> ScanInputs:
    """The case's scan with some of the options, in other company from case to case; `parameters` are the kinds of them
    that there may be."""
    inputs, cell = inputs_of(case), CELLS[case.cell]
    rng, generator = random.Random(str(case)), torch.Generator().manual_seed(case.seed)
    (S, N, width), B, P = inputs.gx.shape, inputs.B, inputs.states[0].shape[-1]
    H, two = width // len(cell.gates), cell.has_c
    sizes = {"h": (N, B, P), "h_step": (S, N, P), "zoneout_h": (S, N, P), "zoneout_c": (S, N, H)}
    sizes |= {name: (S, N, H) for name in cell.masks}
    names = [name for name in sizes if (two or name != "zoneout_c") and rng.random() < 0.5]
    kinds = tuple(kind for kind in parameters if rng.random() < 0.4)
    if min(H, P) == 1:  # normalised, one number is 0, and a product of one h the same whatever h is: rounding is all
        kinds = tuple(kind for kind in kinds if not kind.startswith("ln_"))
    small = [p for p in ("ln_hh", *cell.small) if p.startswith(kinds)]
    params = tuple(
        (
            *group,
            *((torch.randn(width if p == "ln_hh" else H, generator=generator) / 2 + 1).to(case.dtype) for p in small),
        )
        for group in inputs.params
    )
    share = (rng.choice([0.0, 0.3]), rng.choice([0.0, 0.2]) if two else 0.0)
    spec = dataclasses.replace(
        inputs.spec,
        noise=tuple(names),
        scales=tuple(1.0 if name.startswith("zoneout") else 1 / 0.7 for name in names),
        zoneout=share,
        params=(*inputs.spec.params, *small),
        cell_clip=rng.choice([0.0, 0.5]) if two else 0.0,
        proj_clip=rng.choice([0.0, 0.5]) if "w_hr" in inputs.spec.params else 0.0,
        grad_clip=rng.choice([0.0, 0.5]),
    )
    noise = tuple(torch.rand(sizes[name], generator=generator) < 0.7 for name in names)
    return dataclasses.replace(inputs, spec=spec, noise=noise, params=params)


def gradients_of(case: Case, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """dy (of stride 0 if strided), dfinal and dseq."""
    generator = torch.Generator().manual_seed(case.seed + 1)

    def like(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    S, N = inputs.gx.shape[:2]
    P = inputs.states[0].shape[-1]
    dy = like(torch.Size((1, 1, P) if case.strided else (S, N, P)), case.dtype).expand(S, N, P)
    dfinal = tuple(spread(like(s.shape, s.dtype), case.strided) for s in inputs.states)
    rest = inputs.states[1:]
    dseq = tuple(
        like(torch.Size((S, N, s.shape[-1])), s.dtype) if case.dseq else torch.zeros(0, dtype=s.dtype) for s in rest
    )
    return dy, dfinal, dseq


def wide(value: Any) -> Any:
    """The same values in fp64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and not isinstance(value, str):
        return tuple(wide(v) for v in value)
    if isinstance(value, ScanOutputs):
        return ScanOutputs(**{f.name: wide(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, ScanInputs):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "spec"}
        return ScanInputs(value.spec, **{k: wide(v) for k, v in fields.items()})
    return value


def tensors(result: ScanOutputs | ScanGrads | ScanInputs) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a result with its name."""

    def walk(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            for k, v in enumerate(value):
                yield from walk(f"{name}[{k}]", v)

    for field in dataclasses.fields(result):
        yield from walk(field.name, getattr(result, field.name))


def run(backend: Backend, inputs: ScanInputs, grads: tuple, saved: ScanOutputs | None = None) -> Results:
    """Forward and, if it was saved for, backward, given no more than the contract allows backward to read; `saved` is
    what another forward saved for it."""
    outputs = backend.forward(inputs)
    if inputs.spec.save != "all":
        return [outputs]
    shape_only = inputs.gx.new_full((), float("nan")).expand(inputs.gx.shape)
    kept = dataclasses.replace(saved or outputs, final=())
    return [outputs, backend.backward(dataclasses.replace(inputs, gx=shape_only), kept, *grads)]


def jumps(cell: str) -> bool:
    """Whether a derivative of the cell jumps, as relu's does."""
    return "relu" in inspect.getsource(CELLS[cell].step)


def references(inputs: ScanInputs, grads: tuple) -> tuple[Results, Results, ScanOutputs | None]:
    """Yardstick, truth, and what a backward to be held against them must be given.

    A derivative may jump: where rounding moves a unit past the place, no bound holds. There all go back from the
    yardstick's forward, elsewhere each from its own.
    """
    yardstick, spec = run(REFERENCE, inputs, grads), inputs.spec
    saved = yardstick[0] if jumps(spec.cell) or spec.cell_clip or spec.proj_clip else None
    assert saved is None or isinstance(saved, ScanOutputs)
    return yardstick, run(REFERENCE, wide(inputs), wide(grads), wide(saved)), saved


def existing(inputs: ScanInputs) -> Tensor:
    """[S] which rows are some step's."""
    if inputs.lengths is None or inputs.offsets is not None:
        return torch.ones(inputs.gx.shape[0], dtype=torch.bool)
    return (torch.arange(inputs.T)[:, None] < inputs.lengths).flatten()


def agree(ours: Results, yardsticks: Results, truths: Results, inputs: ScanInputs) -> None:
    exist = existing(inputs)
    precision = torch.bfloat16 if inputs.spec.precision == "tf32" else inputs.gx.dtype  # as rnnkern's own trial has it
    for mine, yardstick, truth in zip(ours, yardsticks, truths, strict=True):
        rule = check if isinstance(mine, ScanOutputs) else check_grad
        for (what, a), (_, b), (_, c) in zip(tensors(mine), tensors(yardstick), tensors(truth), strict=True):
            if what == "planes" and a.numel():  # only backward reads them: rows past a length may hold anything
                a, b, c = a[exist][:, :, : b.shape[2]], b[exist], c[exist]
            assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
            assert a.dtype == b.dtype, f"{what}: {a.dtype}, not {b.dtype}"
            rule(a, b, c, what, precision)  # in bf16 an fp32 state is no better than its h


def assert_same_bits(first: Results, second: Results, inputs: ScanInputs) -> None:
    exist = existing(inputs)
    for one, two in zip(first, second, strict=True):
        for (what, a), (_, b) in zip(tensors(one), tensors(two), strict=True):
            assert torch.equal(*((a[exist], b[exist]) if what == "planes" else (a, b))), what


def compare(backend: Backend, inputs: ScanInputs, grads: tuple) -> None:
    yardstick, truth, saved = references(inputs, grads)
    agree(run(backend, inputs, grads, saved), yardstick, truth, inputs)


# ---- what every backend must do, whatever runs it --------------------------------------------------------------------


def check_rows_past_a_length(backend: Backend, case: Case, lengths: list[int]) -> None:
    """They are zero whatever a loss left there, and rows of no steps hand states and gradients through."""
    inputs = dataclasses.replace(inputs_of(case), lengths=torch.tensor(lengths))
    dy, dfinal, dseq = gradients_of(case, inputs)
    past = ~existing(inputs)
    for t in (inputs.gx, dy, *dseq):
        t[past] = float("nan")
    outputs, grads = run(backend, inputs, (dy, dfinal, dseq))
    assert isinstance(outputs, ScanOutputs) and isinstance(grads, ScanGrads)
    for what, t in (("y", outputs.y), ("dgx", grads.dgx), ("dgh", grads.dgh), *(("seq", s) for s in outputs.seq)):
        assert t.numel() == 0 or t[past].eq(0).all(), what
        assert t.isfinite().all(), what
    empty = [length == 0 for length in lengths]
    assert any(empty)
    for final, start, dstart, dend in zip(outputs.final, inputs.states, grads.dstates, dfinal, strict=True):
        assert torch.equal(final[:, empty], start[:, empty])
        assert torch.equal(dstart[:, empty], dend[:, empty])
    compare(backend, inputs, (dy, dfinal, dseq))


def check_nan_and_inf(backend: Backend, case: Case, lengths: list[int], where: str, bad: float) -> None:
    """`bad` in "gx", "h", "rest" (the other state), "w_hh" or "dy" goes where the reference sends it."""
    inputs = dataclasses.replace(inputs_of(case), lengths=torch.tensor(lengths))
    dy, dfinal, dseq = gradients_of(case, inputs)
    row = case.B + 2  # the third sequence's second step
    if where == "gx":
        inputs.gx[row, 0, 1::3] = bad
        inputs.gx[row + 1, -1] = bad
    elif where in ("h", "rest"):
        inputs.states[where == "rest"][0, case.B // 2, 2] = bad
    elif where == "w_hh":
        w_hh = inputs.params[0][0]
        w_hh[(1, 2)[-w_hh.dim() :]] = bad
    else:
        dy[row, 0] = bad  # all of it: a unit of relu that is off passes nothing on
    grads = (dy, dfinal, dseq)
    ours, theirs = run(backend, inputs, grads), run(REFERENCE, inputs, grads)
    agree(ours, theirs, run(REFERENCE, wide(inputs), wide(grads)), inputs)
    seen = same_nan_and_inf(ours, theirs, inputs)
    assert seen or bad == bad  # Inf may saturate a gate and be gone, NaN may not


def same_nan_and_inf(ours: Results, theirs: Results, inputs: ScanInputs) -> bool:
    """Checks it; whether there is any."""
    exist, seen = existing(inputs), False
    for mine, other in zip(ours, theirs, strict=True):
        for (what, a), (_, b) in zip(tensors(mine), tensors(other), strict=True):
            if what == "planes":
                a, b = a[exist][:, :, : b.shape[2]], b[exist]
            assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN in other places"
            assert torch.equal(a.isposinf(), b.isposinf()) and torch.equal(a.isneginf(), b.isneginf()), what
            seen = seen or not bool(b.isfinite().all())
    return seen


def check_same_bits(backend: Backend, case: Case) -> None:
    """Two runs give the same, and change nothing of the caller's."""
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    given = [t for _, t in tensors(inputs)] + [grads[0], *grads[1], *grads[2]]
    kept = [t.clone() for t in given]
    first, second = run(backend, inputs, grads), run(backend, inputs, grads)
    assert_same_bits(first, second, inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, given, strict=True))


def check_refusals(backend: Backend) -> None:
    """Of other devices, dtypes and cells, each by its name."""
    inputs = inputs_of(Case())
    elsewhere = dataclasses.replace(inputs, gx=inputs.gx.to("meta"))
    assert any("meta" in reason for reason in backend.unsupported(elsewhere))
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        odd = dataclasses.replace(inputs, gx=inputs.gx.to(dtype), states=tuple(s.to(dtype) for s in inputs.states))
        assert any(str(dtype) in reason for reason in backend.unsupported(odd))
    unknown = dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, cell="no_such_cell"))
    assert any("no_such_cell" in reason for reason in backend.unsupported(unknown))
