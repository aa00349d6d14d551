"""What the C++ scans do beyond the plain one: each instruction set, sizes, layouts and resets, one thread and two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scans import Case, agree, inputs_of, run, with_options
from test_cpp import cases, every_isa, expected

from rnnkern.backends.cpp import Cpp


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
