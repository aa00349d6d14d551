"""What the C++ scans do beyond the plain one: each instruction set, sizes, layouts and resets, one thread and two."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from scans import Case, agree, inputs_of, run
from test_cpp import cases, every_isa, expected

from rnnkern.backends.base import ScanInputs
from rnnkern.backends.cpp import Cpp
from rnnkern.cells import CELLS


def with_options(case: Case) -> ScanInputs:
    """The case's scan with some of the options, in other company from case to case."""
    inputs, cell = inputs_of(case), CELLS[case.cell]
    rng, generator = random.Random(str(case)), torch.Generator().manual_seed(case.seed)
    (S, N, width), B, P = inputs.gx.shape, inputs.B, inputs.states[0].shape[-1]
    H, two = width // len(cell.gates), cell.has_c
    sizes = {"h": (N, B, P), "h_step": (S, N, P), "zoneout_h": (S, N, P), "zoneout_c": (S, N, H)}
    sizes |= {name: (S, N, H) for name in cell.masks}
    names = [name for name in sizes if (two or name != "zoneout_c") and rng.random() < 0.5]
    kinds = [kind for kind in ("ln_hh", "peephole", "ln_c") if rng.random() < 0.4]
    small = [p for p in ("ln_hh", *cell.small) if p.startswith(tuple(kinds))]
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


def test_refusals_are_by_name() -> None:
    inputs, backend = inputs_of(Case("gru")), Cpp()

    def reasons(**options: object) -> list[str]:
        return backend.unsupported(dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, **options)))  # type: ignore[arg-type]

    assert reasons(noise=("zoneout_c",)) == ["mask zoneout_c"]
    assert reasons(cell_clip=1.0) == reasons(zoneout=(0.0, 0.1)) == ["gru has no state c to clip or zone out"]
    assert reasons(params=("w_hh", "b_hh", "peephole_i")) == ["parameter peephole_i"]
    assert not reasons(params=("w_hh", "b_hh", "ln_hh"), noise=("h", "h_step", "candidate", "zoneout_h"), grad_clip=1.0)
