"""What the C++ scans do beyond the plain one: each instruction set, sizes, layouts and resets, one thread and two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scans import Case, agree, assert_same_bits, inputs_of, run, with_options
from test_cpp import LAYERS, PROJECTING, TEAMS, cases, every_isa, expected, layer_inputs, wide
from torch import Tensor

from rnnkern._regularised import normalised
from rnnkern.autograd import Group
from rnnkern.backends.base import ScanInputs, ScanOutputs
from rnnkern.backends.cpp import Cpp
from rnnkern.backends.reference import BACKEND as REFERENCE
from rnnkern.cells import CELLS


@every_isa
@pytest.mark.parametrize("case", cases()[::2], ids=str)
def test_equals_the_reference(case: Case, isa: str) -> None:
    inputs, grads, (yardstick, truth, saved) = expected(case, with_options)
    backend = Cpp(isa)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            agree(run(backend, inputs, grads, saved), yardstick, truth, inputs)
    finally:
        torch.set_num_threads(before)


def normed(case: Case) -> ScanInputs:
    """The case's scan under layer norm, and nothing else."""
    names = ("ln_hh", *(name for name in CELLS[case.cell].small if name.startswith("ln_c")))
    return with_gains(case, inputs_of(case), names)


def with_gains(case: Case, inputs: ScanInputs, names: tuple[str, ...]) -> ScanInputs:
    cell = CELLS[case.cell]
    generator = torch.Generator().manual_seed(case.seed + 2)
    widths = [inputs.gx.shape[-1] // (1 if name in ("ln_ih", "ln_hh") else len(cell.gates)) for name in names]
    gains = [[torch.randn(w, generator=generator).to(case.dtype) / 2 + 1 for w in widths] for _ in inputs.params]
    params = tuple((*group, *own) for group, own in zip(inputs.params, gains, strict=True))
    spec = dataclasses.replace(inputs.spec, params=(*inputs.spec.params, *names))
    return dataclasses.replace(inputs, spec=spec, params=params)


@every_isa
@pytest.mark.parametrize("make", [normed, with_options])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("team", TEAMS)
def test_layer_norm_by_any_number_of_threads(
    team: str, cell: str, dtype: torch.dtype, make: Callable[[Case], ScanInputs], isa: str
) -> None:
    """Of rows that threads share by columns, too, whose sums they must tell one another."""
    H = 400 if cell == "rnn_tanh" else TEAMS[team].H  # fewer products are not worth a barrier
    case = dataclasses.replace(
        TEAMS[team], cell=cell, dtype=dtype, H=H, project=team == "projected" and cell in PROJECTING
    )
    inputs, grads, (yardstick, truth, saved) = expected(case, make)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            first = run(Cpp(isa), inputs, grads, saved)
            agree(first, yardstick, truth, inputs)
            assert_same_bits(run(Cpp(isa), inputs, grads, saved), first, inputs)
    finally:
        torch.set_num_threads(before)


def projected_and_normed(inputs: ScanInputs, x: Tensor, w_ih: tuple[Tensor, ...], b_ih: tuple[Any, ...]) -> ScanOutputs:
    """What layer_forward gives, on the reference; ln_ih is the last of a group's params."""
    per_model = len(w_ih) // x.shape[1]
    gx, params = [], []
    for n, (w, b, group) in enumerate(zip(w_ih, b_ih, inputs.params, strict=True)):
        rows, (rest,) = normalised(inputs.spec.cell, x[:, n // per_model], [Group(w, b, group)], len(group) - 1)
        gx.append(rows)
        params.append(rest.params)
    spec = dataclasses.replace(inputs.spec, params=inputs.spec.params[:-1])
    return REFERENCE.forward(dataclasses.replace(inputs, spec=spec, params=tuple(params), gx=torch.cat(gx, 1)))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "mgu", "indrnn_relu"])
@pytest.mark.parametrize("which", range(len(LAYERS) + 1))
def test_layer_norm_of_the_input_within_the_scan(which: int, cell: str, dtype: torch.dtype, isa: str) -> None:
    """Some steps ahead of it, by threads that share columns too."""
    several_chunks = Case(T=100, B=3, H=200, layout="padded", reverse=(False,)), 20, 1, False
    case, *rest = (*LAYERS, several_chunks)[which]
    case = dataclasses.replace(case, cell=cell, dtype=dtype, save="none")
    inputs, *given = layer_inputs(case, *rest)
    call = with_gains(case, inputs, ("ln_hh", "ln_ih")), *given
    yardstick, truth = projected_and_normed(*call), projected_and_normed(*(wide(v) for v in call))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            agree([Cpp(isa).layer_forward(*call)], [yardstick], [truth], call[0])
    finally:
        torch.set_num_threads(before)


def test_refusals_are_by_name() -> None:
    inputs, backend = inputs_of(Case("gru")), Cpp()

    def reasons(**options: object) -> list[str]:
        return backend.unsupported(dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, **options)))  # type: ignore[arg-type]

    assert reasons(noise=("zoneout_c",)) == ["mask zoneout_c"]
    assert reasons(cell_clip=1.0) == reasons(zoneout=(0.0, 0.1)) == ["gru has no state c to clip or zone out"]
    assert reasons(params=("w_hh", "b_hh", "peephole_i")) == ["parameter peephole_i"]
    assert not reasons(params=("w_hh", "b_hh", "ln_hh"), noise=("h", "h_step", "candidate", "zoneout_h"), grad_clip=1.0)
