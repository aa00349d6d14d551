"""Every scan backend against the reference, at the level of the contract: all outputs, all gradients, all layouts.

Truth is the reference in fp64 on the same values, the yardstick the reference in the dtype under test (tolerance.py).
A new backend or cell is covered by being registered; what a backend refuses is skipped with its own reasons.
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from conftest import absent
from scans import (
    DTYPES,
    REFERENCE,
    Case,
    agree,
    assert_same_bits,
    check_nan_and_inf,
    check_refusals,
    check_rows_past_a_length,
    check_same_bits,
    compare,
    drawn,
    gradients_of,
    inputs_of,
    run,
    wide,
    with_options,
)
from torch import Tensor

from rnnkern import dispatch
from rnnkern.backends.base import Backend, ScanInputs, ScanSpec
from rnnkern.cells import CELLS

BACKENDS = [name for name in dispatch.ORDER if name != "reference"]
# What a backend must do; the other axes may be refused, by name.
AXES: dict[str, list] = {
    "T": [1, 2, 9],
    "B": [1, 7, 33],
    "H": [1, 3, 17, 200],
    "layout": ["dense", "packed", "padded"],
    "reverse": [(False,), (True,), (False, True), (False, True, True, False)],
    "bias": [True, False],
    "project": [False, False, True],
    "save": ["all", "all", "all", "all", "states", "none"],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["", "", "zero", "learned"],
}


def chosen() -> list[Case]:
    """Sizes that drawing them would make too many of: no rows at all, and more columns than any tile."""
    cases = []
    for cell in CELLS:
        for dtype in DTYPES:
            cases.append(Case(cell, dtype, B=0, H=3, layout="padded", reset="learned"))
            cases.append(Case(cell, dtype, B=0, H=3, T=1, save="none"))
            cases.append(Case(cell, dtype, T=2, B=7, H=650, layout="padded", reverse=(True,)))
            cases.append(Case(cell, dtype, T=1, B=1, H=650, reverse=(False,), save="none"))
            # Enough work in a step for any driver's way with large products and threads.
            cases.append(Case(cell, dtype, T=3, B=65, H=256, layout="packed", reset="zero", reverse=(False,)))
    return cases


def demand(backend: Backend, inputs: ScanInputs, case: Case) -> None:
    """Skips what the backend may refuse, with its reasons; all else it may not."""
    reasons = backend.unsupported(inputs)
    if reasons and (case.reset or (case.project and len(CELLS[case.cell].states) == 1)):
        pytest.skip(f"{backend.name}: {'; '.join(reasons)}")
    assert reasons == []


@pytest.fixture(params=BACKENDS)
def scan(request: pytest.FixtureRequest) -> Backend:
    reason = absent(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return dispatch.backend(request.param)


@pytest.mark.parametrize("case", [*drawn(18, AXES), *chosen()], ids=str)
def test_equals_the_reference(scan: Backend, case: Case) -> None:
    inputs = inputs_of(case)
    demand(scan, inputs, case)
    compare(scan, inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("cell", CELLS)
def test_rows_past_a_length_are_zero_and_their_states_pass_through(scan: Backend, cell: str) -> None:
    check_rows_past_a_length(scan, Case(cell, T=6, B=9, layout="padded"), [3, 0, 6, 1, 0, 5, 6, 2, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["gx", "h", "rest", "w_hh", "dy"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_go_where_the_reference_sends_them(
    scan: Backend, cell: str, where: str, bad: float, dtype: torch.dtype
) -> None:
    if where == "rest" and len(CELLS[cell].states) == 1:
        pytest.skip(f"{cell} has no state but h")
    check_nan_and_inf(scan, Case(cell, dtype, T=4, B=6, layout="padded", seed=3), [4, 0, 3, 4, 1, 2], where, bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(scan: Backend, cell: str, dtype: torch.dtype) -> None:
    check_same_bits(scan, Case(cell, dtype, T=7, B=9, H=37, layout="padded"))
    check_same_bits(scan, Case(cell, dtype, T=2, B=40, H=256, strided=True))


@pytest.mark.parametrize("cell", CELLS)
def test_backward_reads_what_another_backend_saved(scan: Backend, cell: str) -> None:
    """Planes, seq and hidden have one layout for all backends."""
    case = Case(cell, T=4, layout="padded", project=cell == "lstm")
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    yardstick, truth = run(REFERENCE, inputs, grads), run(REFERENCE, wide(inputs), wide(grads))
    forward = scan.forward(inputs)
    agree([scan.backward(inputs, yardstick[0], *grads)], yardstick[1:], truth[1:], inputs)  # type: ignore[arg-type]
    agree([REFERENCE.backward(inputs, forward, *grads)], yardstick[1:], truth[1:], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_may_be_cut_and_continued(scan: Backend, cell: str, dtype: torch.dtype) -> None:
    case = Case(cell, dtype, T=6, B=5, reverse=(False,), H=24)
    inputs = inputs_of(case)
    whole = scan.forward(inputs)
    head = scan.forward(dataclasses.replace(inputs, T=3, gx=inputs.gx[:15]))
    tail = scan.forward(dataclasses.replace(inputs, T=3, gx=inputs.gx[15:], states=head.final))
    joined = dataclasses.replace(whole, y=torch.cat([head.y, tail.y]), final=tail.final)
    agree([joined], [REFERENCE.forward(inputs)], [REFERENCE.forward(wide(inputs))], inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_h_is_rounded_as_torch_rounds(scan: Backend, dtype: torch.dtype) -> None:
    """Any bit patterns: subnormals, ties, overflow, NaN. A unit of relu with weight 3/4, whose products are exact."""
    B, generator = 5000, torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (4, B, 1, 1), generator=generator).to(torch.int16)
    exponents, one = int(1 / torch.finfo(dtype).eps), torch.ones((), dtype=dtype).view(torch.int16)
    bits[:, ::3] %= exponents  # subnormals among themselves
    bits[:, 1::3] = bits[:, 1::3] % exponents + one  # in [1, 2): ties
    values = bits.view(dtype)
    if dtype == torch.bfloat16:  # its subnormals are fp32's, which processors' bf16 products take for 0
        values = torch.where(values.abs() < torch.finfo(dtype).tiny, 0, values)
    h0, gx = values[0].abs().view(1, B, 1), values[1:].reshape(3 * B, 1, 1)
    spec = ScanSpec("rnn_relu", (False,), ("w_hh",), save="none")
    y = scan.forward(ScanInputs(spec, 3, B, gx, (h0,), ((torch.full((1, 1), 0.75, dtype=dtype),),))).y.view(3, B)
    h = h0.view(B)
    for t in range(3):
        h = (gx.view(3, B)[t].float() + 0.75 * h.float()).relu().to(dtype)
        same = (y[t] == h) | (y[t].isnan() & h.isnan())
        assert same.all(), f"step {t}: {y[t][~same][:5].tolist()}, not {h[~same][:5].tolist()}"


@pytest.mark.parametrize("cell", CELLS)
def test_several_python_threads(scan: Backend, cell: str) -> None:
    case = Case(cell, T=6, B=33, H=64)
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    expected = run(scan, inputs, grads)
    results: list = []
    workers = [threading.Thread(target=lambda: results.append(run(scan, inputs, grads))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == len(workers)
    for got in results:
        assert_same_bits(got, expected, inputs)


OPTIONS: dict[str, dict] = {
    "zoneout": {"zoneout": (0.1, 0.0)},
    "grad_clip": {"grad_clip": 0.1},
    "cell_clip": {"cell_clip": 0.5},
    "proj_clip": {"proj_clip": 0.1},
    "layer norm": {"ln_hh": True},
    "mask h": {"noise": "h"},
    "mask h_step": {"noise": "h_step"},
    "mask candidate": {"noise": "candidate"},
    "mask zoneout_h": {"noise": "zoneout_h"},
    "peephole": {"small": "peephole_"},
    "layer norm of c": {"small": "ln_c"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_options_are_done_as_the_reference_does_them_or_refused(scan: Backend, cell: str, option: str) -> None:
    case = Case(cell, torch.float64, project=option == "proj_clip" and cell == "lstm")
    inputs, change = inputs_of(case), dict(OPTIONS[option])
    S, N, width = inputs.gx.shape
    B, P, H = inputs.B, inputs.states[0].shape[-1], width // len(CELLS[cell].gates)
    generator = torch.Generator().manual_seed(5)
    extra: dict[str, tuple[int, ...]] = {"ln_hh": (width,)} if change.pop("ln_hh", False) else {}
    prefix = change.pop("small", None)
    extra |= {name: (H,) for name in CELLS[cell].small if prefix and name.startswith(prefix)}
    noise: tuple[Tensor, ...] = ()
    if "noise" in change:
        name = change["noise"]
        shape = {"h": (N, B, P), "h_step": (S, N, P), "zoneout_h": (S, N, P)}.get(name, (S, N, H))
        noise = (torch.rand(shape, generator=generator) < 0.7,)
        change |= {"noise": (name,), "scales": (1.0 if name.startswith("zoneout") else 1 / 0.7,)}
    spec = dataclasses.replace(inputs.spec, params=(*inputs.spec.params, *extra), **change)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in extra.values()]
    params = tuple((*group, *values) for group in inputs.params)
    inputs = dataclasses.replace(inputs, spec=spec, params=params, noise=noise)
    refused = REFERENCE.unsupported(inputs)
    if refused or (prefix and not extra):
        pytest.skip(f"not an option of {cell}")
    reasons = scan.unsupported(inputs)
    if reasons:
        pytest.skip(f"{scan.name}: {'; '.join(reasons)}")
    compare(scan, inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("case", drawn(3, AXES), ids=str)
def test_options_in_company(scan: Backend, case: Case) -> None:
    """Some of them at a time; tests/test_cpp_options.py has more of the C++ backend's."""
    inputs = with_options(case)
    reasons = scan.unsupported(inputs)
    if reasons:
        pytest.skip(f"{scan.name}: {'; '.join(reasons)}")
    compare(scan, inputs, gradients_of(case, inputs))


def test_other_devices_dtypes_and_cells_are_refused_by_name(scan: Backend) -> None:
    check_refusals(scan)
