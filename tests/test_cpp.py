"""The C++ scans beyond what every backend is tested for: each instruction set of this machine, each way of sharing the
work among threads, the input projection inside the scan, calls that must be refused, and the activations' accuracy."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from isas import instruction_sets
from scans import (
    DTYPES,
    REFERENCE,
    Case,
    Results,
    agree,
    assert_same_bits,
    compare,
    drawn,
    gradients_of,
    inputs_of,
    references,
    run,
    tensors,
    wide,
)
from tolerance import EXACT, FLOOR
from torch import Tensor
from torch.nn.functional import linear

from rnnkern import dispatch
from rnnkern.backends.base import ScanInputs, ScanOutputs, ScanSpec
from rnnkern.cells import CELLS

if dispatch.unavailable("cpp") is not None:
    pytest.skip(f"backend cpp: {dispatch.unavailable('cpp')}", allow_module_level=True)

from rnnkern import _cpu
from rnnkern.backends.cpp import Cpp

PROJECTING = ["lstm"]  # the one cell with a width of h apart from H


every_isa = pytest.mark.parametrize("isa", instruction_sets())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Sizes that threads share in every way: a barrier is worth it from some 50,000 multiplications of each thread on.
SIZES = [
    *((1, 1, 1), (20, 1, 3), (3, 7, 1), (1, 2, 17), (20, 7, 17), (3, 33, 17), (20, 33, 3), (20, 2, 33), (1, 33, 33)),
    *((3, 7, 33), (20, 33, 33), (1, 1, 200), (20, 1, 200), (3, 2, 200), (3, 7, 200), (3, 33, 200), (1, 7, 200)),
]
AXES: dict[str, list] = {
    "T, B, H": SIZES,
    "layout": ["dense", "packed", "padded"],
    "reverse": [(False,), (True,), (False, True), (False, True, True)],
    "bias": [True, True, False],
    "project": [False, True],
    "save": ["all", "all", "all", "all", "states", "none"],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["", "", "zero", "learned"],
}


def cases() -> list[Case]:
    return [
        dataclasses.replace(case, project=case.project and case.cell in PROJECTING) for case in drawn(len(SIZES), AXES)
    ]


@lru_cache(maxsize=4)
def expected(
    case: Case, make: Callable[[Case], ScanInputs] = inputs_of
) -> tuple[ScanInputs, tuple, tuple[Results, Results, ScanOutputs | None]]:
    """Inputs as `make` makes them, gradients given, and what `references` gives."""
    inputs = make(case)
    grads = gradients_of(case, inputs)
    return inputs, grads, references(inputs, grads)


@every_isa
@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_reference_on_one_thread_and_on_two(case: Case, isa: str) -> None:
    inputs, grads, (yardstick, truth, saved) = expected(case)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        agree(run(Cpp(isa), inputs, grads, saved), yardstick, truth, inputs)


# Threads of a team with a barrier, shares of rows, groups at once; with 4 threads two of these at a time.
TEAMS = {
    "columns": Case(T=4, B=3, H=200, reverse=(False,)),
    "rows": Case(T=4, B=33, H=64, layout="padded", reverse=(True,)),
    "groups": Case(T=4, B=3, H=200, layout="packed"),
    "projected": Case(T=4, B=9, H=200, project=True, reverse=(False,), reset="learned"),
}


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("team", TEAMS)
def test_any_number_of_threads_and_the_same_bits_again(team: str, cell: str, dtype: torch.dtype, isa: str) -> None:
    case = dataclasses.replace(TEAMS[team], cell=cell, dtype=dtype, project=team == "projected" and cell in PROJECTING)
    inputs, grads, (yardstick, truth, saved) = expected(case)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        first = run(Cpp(isa), inputs, grads, saved)
        agree(first, yardstick, truth, inputs)
        assert_same_bits(run(Cpp(isa), inputs, grads, saved), first, inputs)


@every_isa
def test_more_threads_than_there_is_work_for(isa: str) -> None:
    case = Case(T=8, B=1, H=130, reverse=(False,))
    inputs, grads, (yardstick, truth, saved) = expected(case)
    for threads in (5, 7):
        torch.set_num_threads(threads)
        agree(run(Cpp(isa), inputs, grads, saved), yardstick, truth, inputs)


# ---- the input projection inside the scan ----------------------------------------------------------------------------


def layer_inputs(case: Case, width: int, models: int, spread_out: bool) -> tuple[ScanInputs, Tensor, tuple, tuple]:
    """A scan's inputs without gx, and x [S, M, I], w_ih and b_ih of every group."""
    inputs, generator = inputs_of(case), torch.Generator().manual_seed(case.seed + 2)
    S, N, columns = inputs.gx.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    x = normal(S, models, width)
    if spread_out:  # as a slice of features, and as batch_first gives it: neither rows nor columns are neighbours
        x = normal(models, S, 2 * width + 3)[..., 1 : 1 + width].transpose(0, 1)
        if case.seed % 2:
            x = normal(width, S, models).permute(1, 2, 0)
    w_ih = tuple(normal(columns, width) / width**0.5 for _ in range(N))
    b_ih = tuple(normal(columns) if case.bias else None for _ in range(N))
    inputs.gx = inputs.gx.new_full((), float("nan")).expand(inputs.gx.shape)
    return inputs, x, w_ih, b_ih


def projected(inputs: ScanInputs, x: Tensor, w_ih: tuple, b_ih: tuple) -> ScanOutputs:
    """The same on the reference."""
    per_model = len(w_ih) // x.shape[1]
    gx = [linear(x[:, n // per_model], w, b) for n, (w, b) in enumerate(zip(w_ih, b_ih, strict=True))]
    return REFERENCE.forward(dataclasses.replace(inputs, gx=torch.stack(gx, 1)))


LAYERS = [  # case, I, M, whether x is not contiguous
    (Case(T=5, B=7, H=17, layout="padded"), 3, 1, False),
    (Case(T=20, B=7, H=33, layout="packed", reset="learned", bias=False), 65, 2, True),
    (Case(T=3, B=33, H=200, reverse=(False,), save="states"), 129, 1, True),
    (Case(T=40, B=33, H=9, reverse=(True, False, False), seed=1), 31, 3, True),  # more rows than one chunk holds
    (Case(T=1, B=1, H=200, reverse=(False,), save="none"), 1, 1, False),
    (Case(T=1, B=40, H=3, reverse=(True,), save="none", seed=1), 513, 1, True),
    (Case(T=20, B=2, H=64, save="none", layout="padded"), 64, 1, False),
]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("which", range(len(LAYERS)))
def test_projection_and_scan_in_one(which: int, cell: str, dtype: torch.dtype, isa: str) -> None:
    case, *rest = LAYERS[which]
    call = layer_inputs(dataclasses.replace(case, cell=cell, dtype=dtype), *rest)
    yardstick, truth = projected(*call), projected(*(wide(v) for v in call))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = Cpp(isa).layer_forward(*call)
        if CELLS[cell].planes == ("a",) and call[0].spec.save == "all" and not found.planes.numel():
            found.planes = found.y.unsqueeze(2)  # saved once: backward reads it there
        agree([found], [yardstick], [truth], call[0])


# ---- calls that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [6, 2, 1]}, r"lengths must lie in \[0, 5\], got 6"),
        ({"lengths": [5, -1, 1]}, r"lengths must lie in \[0, 5\], got -1"),
        ({"lengths": [2**62, 2, 1]}, "lengths must lie in"),
        ({"offsets": [0, 3, 6, 9, 13]}, "step 4 reaches beyond the 15 rows given"),
        ({"offsets": [0, 3, -1, 9, 12]}, "step 2 reaches beyond the 15 rows given"),
        ({"offsets": [2**62, 3, 6, 9, 12]}, "step 0 reaches beyond the 15 rows given"),
        ({"offsets": [2**63 - 1, 3, 6, 9, 12]}, "step 0 reaches beyond the 15 rows given"),
        ({"offsets": [0, 3, 6, 9, 12], "lengths": None}, "offsets without lengths"),
        ({"lengths": None, "T": 6}, "expected T\\*B rows, got 15"),
        ({"T": 6, "lengths": [6, 6, 6]}, "step 5 reaches beyond the 15 rows given"),
    ],
)
def test_rows_that_do_not_exist_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = inputs_of(Case(T=5, B=3, H=8))
    grads = gradients_of(Case(T=5, B=3, H=8), inputs)
    outputs = dataclasses.replace(Cpp().forward(inputs), final=())
    given = {"lengths": [5, 5, 5], **change}
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    bad = dataclasses.replace(inputs, **given)
    with pytest.raises(ValueError, match=message):
        Cpp().forward(bad)
    with pytest.raises(ValueError, match=message):
        Cpp().backward(bad, outputs, *grads)


def test_memory_that_cannot_be_had() -> None:
    """Two million hidden units would take 16 TiB for their packed weights: asked for before anything is read."""
    T, B, H = 4, 16, 2**21
    sizes = (T, B, T * B, 1, 0, H, H, 1, 1, H, 0)
    with pytest.raises(RuntimeError, match=r"out of memory: cannot allocate \d{14} bytes"):
        _cpu.forward("baseline", 0, 1, sizes, (0,) * 5, (), (), (0,) * 6, (0,), (0,) * 6, (0,) * 5)


# ---- the process around --------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


SMALL_CALL = """
import torch, rnnkern
torch.manual_seed(0)
m = rnnkern.GRU(5, 7)
with torch.no_grad(), rnnkern.use_backend("cpp"):
    y = m(torch.ones(3, 2, 5))[0]
from rnnkern.backends.cpp import BACKEND
print(BACKEND.isa, *y.flatten().tolist())
"""


def test_the_environment_names_the_instruction_set() -> None:
    numbers = []
    for isa in _cpu.isas():
        done = python(SMALL_CALL, RNNKERN_CPU_ISA=isa)
        try:
            _cpu.chosen(isa)
        except RuntimeError:
            assert done.returncode and "this machine does not have that instruction set" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        name, *values = done.stdout.split()
        assert name == isa
        numbers.append(torch.tensor([float(v) for v in values]))
    assert all((v - numbers[0]).abs().max() <= FLOOR * torch.finfo(torch.float32).eps for v in numbers)
    done = python(SMALL_CALL, RNNKERN_CPU_ISA="sse9")
    assert done.returncode and f"RNNKERN_CPU_ISA=sse9: expected one of {', '.join(_cpu.isas())}" in done.stderr


@every_isa
def test_several_python_threads_with_teams_of_their_own(isa: str) -> None:
    case = Case(T=5, B=3, H=200)
    inputs, grads, *_ = expected(case)
    torch.set_num_threads(2)
    once = run(Cpp(isa), inputs, grads)
    results: list[Results] = []

    def work() -> None:
        torch.set_num_threads(2)  # of this thread: OpenMP's setting is each thread's own
        for _ in range(5):
            results.append(run(Cpp(isa), inputs, grads))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    for got in results:
        assert_same_bits(got, once, inputs)


def _in_child(case: Case, sender: Any) -> None:
    torch.set_num_threads(1)
    inputs = inputs_of(case)
    sender.send([t.clone().numpy() for r in run(Cpp(), inputs, gradients_of(case, inputs)) for _, t in tensors(r)])


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of forking a process that has threads
def test_one_thread_after_a_fork() -> None:
    """As in a DataLoader's worker: OpenMP's threads are not there any more, and must not be waited for."""
    case = Case(T=5, B=3, H=200)
    inputs, grads, *_ = expected(case)
    torch.set_num_threads(2)
    run(Cpp(), inputs, grads)
    torch.set_num_threads(1)
    once = run(Cpp(), inputs, grads)
    torch.set_num_threads(2)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_in_child, args=(case, sender))
    child.start()
    assert receiver.poll(60), "the child process hangs"
    got = receiver.recv()
    child.join(60)
    assert child.exitcode == 0
    for a, b in zip(got, (t for r in once for _, t in tensors(r)), strict=True):
        assert np.array_equal(a, b.numpy())


# ---- numbers -------------------------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell: str, dtype: torch.dtype, isa: str) -> None:
    """Wherever in gx it is, in whichever lane; from there on in all units that see its own."""
    case = Case(cell, dtype, T=4, B=5, H=33, reverse=(False,))
    inputs = inputs_of(case)
    clean = Cpp(isa).forward(inputs)
    for column in range(inputs.gx.shape[2]):
        gx = inputs.gx.clone()
        gx[5 + 2, 0, column] = float("nan")  # step 1 of batch row 2
        y = Cpp(isa).forward(dataclasses.replace(inputs, gx=gx)).y.view(4, 5, 33)
        before, others = clean.y.view(4, 5, 33), [0, 1, 3, 4]
        assert torch.equal(y[:, others], before[:, others]) and torch.equal(y[0], before[0])
        assert y[1, 2, column % 33].isnan() and y[1, 2].isnan().sum() == 1
        seen = y[2:, 2].isnan()
        assert seen.all() if CELLS[cell].dense else seen[:, column % 33].all() and seen.sum() == 2


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_infinities_saturate(cell: str, dtype: torch.dtype, isa: str) -> None:
    case = Case(cell, dtype, T=3, B=5, H=17, reverse=(False,), save="none")
    inputs = inputs_of(case)
    signs = torch.tensor([float("inf"), float("-inf")], dtype=dtype)[torch.randint(0, 2, inputs.gx.shape)]
    inputs.gx = torch.where(torch.rand(inputs.gx.shape) < 0.2, signs, inputs.gx)
    ours, theirs = Cpp(isa).forward(inputs), REFERENCE.forward(inputs)
    agree([ours], [theirs], [REFERENCE.forward(wide(inputs))], inputs)
    assert torch.equal(ours.y.isnan(), theirs.y.isnan())


def arguments(dtype: torch.dtype) -> Tensor:
    """All magnitudes of both signs, subnormal and infinite ones too, the range where the activations bend, and NaN."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)
    lowest = float(np.log2(info.smallest_normal * info.eps))
    exponents = torch.rand(40000, generator=generator, dtype=torch.float64)
    spread = torch.exp2(lowest + exponents * (float(np.log2(info.max)) - lowest))
    bend = torch.rand(60000, generator=generator, dtype=torch.float64) * 100
    far = torch.rand(10000, generator=generator, dtype=torch.float64) * 800
    edges = torch.tensor([0.0, 0.5, 9.0, 10.0, 20.0, 40.0, 87.0, 88.0, 89.0, 104.0, 708.0, 709.0, 746.0, float("inf")])
    positive = torch.cat((spread, bend, far, edges.double())).to(dtype)
    return torch.cat((positive, -positive, torch.full((3,), float("nan"), dtype=dtype)))


def truth(name: str, v: Tensor) -> np.ndarray:
    """In the widest numbers that the machine has: for fp64, fp64 itself is no truth."""
    x = v.numpy().astype(np.longdouble)
    if name == "tanh":
        return np.tanh(x)
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, np.longdouble(1)) / (1 + small)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_activations_to_the_last_places(name: str, dtype: torch.dtype, isa: str) -> None:
    """One row for each argument: rnn_tanh's output without a product is tanh(gx), a gru's with h = 1 and n = 0 is z."""
    v = arguments(dtype)
    B = v.numel()
    if name == "tanh":
        cell, gx, h = "rnn_tanh", v.view(B, 1, 1), torch.zeros(1, B, 1, dtype=dtype)
    else:
        gx = torch.zeros(B, 1, 3, dtype=dtype)
        cell, gx[:, 0, 1], h = "gru", v, torch.ones(1, B, 1, dtype=dtype)
    spec = ScanSpec(cell, (False,), ("w_hh",), save="none")
    w_hh = torch.zeros(gx.shape[2], 1, dtype=dtype)
    y = Cpp(isa).forward(ScanInputs(spec, 1, B, gx, (h,), ((w_hh,),))).y.flatten()
    assert torch.equal(y.isnan(), v.isnan())
    exact = truth(name, v)
    info, known = torch.finfo(dtype), ~v.isnan().numpy()
    error, size = np.abs(y.numpy() - exact)[known], np.abs(exact)[known]
    # A result at the end of the normal range may be 0: below it there is no relative precision to keep.
    wrong = error > FLOOR * info.eps * size + 2 * info.smallest_normal
    assert not wrong.any(), f"{v.numpy()[known][wrong][:5]}: {error[wrong][:5]}, truth {size[wrong][:5]}"
    assert (y[v.isinf()].abs() <= 1).all() and (y.nan_to_num().abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    case = Case("gru", dtype, T=20, B=7, H=33)
    inputs = inputs_of(case)
    sets = [isa.values[0] for isa in instruction_sets() if not isa.marks]
    assert sets, "the baseline is everywhere"
    results = [Cpp(isa).forward(inputs).y for isa in sets]
    bound = EXACT if dtype == torch.float64 else FLOOR * torch.finfo(dtype).eps * case.T
    assert all((y - results[0]).abs().max() <= bound for y in results)


@every_isa
def test_a_long_sequence(isa: str) -> None:
    """65,536 steps and more, whose rows are beyond what a 32-bit byte offset reaches together."""
    case = Case("lstm", T=70_000, B=1, H=3, reverse=(True,), save="none")
    inputs = inputs_of(case)
    y = Cpp(isa).forward(inputs).y
    tail = dataclasses.replace(inputs, T=50, gx=inputs.gx[-50:])
    compare(Cpp(isa), tail, gradients_of(case, tail))
    assert torch.equal(y[-50:], Cpp(isa).forward(tail).y)
    assert y.isfinite().all()
