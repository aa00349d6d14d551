"""What the Triton scans do beyond the plain one, options in other company from case to case, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scans import Case, compare, drawn, gradients_of, inputs_of, with_options
from test_triton_scans import SCAN, driven

from rnnkern.backends.base import ScanInputs
from rnnkern.backends.triton import config, shipped
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import VARIABLE, choose
from rnnkern.backends.triton.drivers import question
from rnnkern.backends.triton.options import BITS, options_of
from rnnkern.cells import CELLS

AXES: dict[str, list] = {
    "T": [3, 2],
    "B": [3, 5],
    "H": [5, 16],  # projected to one unit, h has no gradient through layer norm but by eps: nothing but rounding
    "layout": ["padded", "packed", "dense"],
    "reverse": [(False, True), (True,)],
    "bias": [True, False],
    "project": [False, True],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["learned", "zero", ""],
}


# The cases that are drawn are few; these have what chance left out.
CHOSEN = [Case("lstm", T=3, B=B, H=16, layout="padded", reset="learned") for B in (3, 8)]


def cases() -> list[Case]:
    found = drawn(2, AXES, [cell for cell in STEPS if cell != "indrnn_tanh"])
    found += CHOSEN
    return [c if len(CELLS[c.cell].states) > 1 else dataclasses.replace(c, project=False) for c in found]


def optioned(case: Case) -> ScanInputs:
    """Every other one without layer norm, for the driver that does not have it."""
    return with_options(case) if case.seed % 2 else with_options(case, ("peephole",))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = optioned(case)
    driven(case, inputs, monkeypatch)
    assert SCAN.unsupported(inputs) == []
    compare(SCAN, inputs, gradients_of(case, inputs))


def test_the_cases_have_every_option_on_every_driver_that_does_it() -> None:
    seen: dict[str, int] = {}
    patch = pytest.MonkeyPatch()
    for case in cases():
        inputs = optioned(case)
        driver = driven(case, inputs, patch).partition(",")[0]
        seen[driver] = seen.get(driver, 0) | options_of(inputs.spec)
    patch.undo()
    names = {driver: {name for k, name in enumerate(BITS) if found & 1 << k} for driver, found in seen.items()}
    assert names["driver=per_step"] == set(BITS)
    assert names["driver=batch_parallel"] == set(BITS) - {"proj_clip", "norm_h", "norm_c"}


def test_numbers_are_of_run_time() -> None:
    """A probability that changes from call to call compiles nothing anew."""
    from rnnkern.backends.triton.drivers import plan_forward

    def launches(scale: float, share: float) -> list:
        inputs = inputs_of(Case(T=3, H=20))
        mask = torch.ones(21, 2, 20, dtype=torch.bool)
        spec = dataclasses.replace(
            inputs.spec, noise=("h_step",), scales=(scale,), zoneout=(share, share), cell_clip=2 * scale
        )
        planned = (plan_forward(dataclasses.replace(inputs, spec=spec, noise=(mask,)), TARGET, d) for d in DRIVERS)
        return [(one.key, one.signature()) for _, program in planned for one in program.launches]

    TARGET, DRIVERS = shipped.TARGETS["sm_90"], ("batch_parallel", "per_step")  # noqa: N806
    assert launches(1.25, 0.1) == launches(2.0, 0.5)


@pytest.mark.parametrize("driver", ["persistent", "gluon"])
def test_drivers_of_plain_scans_refuse_options_by_name(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"driver={driver}")
    monkeypatch.setattr(config, "unavailable", str)
    inputs = inputs_of(Case("lstm", torch.bfloat16, T=2, B=3, H=64))
    assert SCAN.unsupported(inputs) == []
    clipped = dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, grad_clip=1.0))
    assert any(f"{driver} has plain scans" in reason for reason in SCAN.unsupported(clipped))
    assert any("diagonal" in reason for reason in SCAN.unsupported(inputs_of(Case("indrnn_relu", H=64))))
    (why,) = SCAN.unsupported(inputs_of(Case("slstm", torch.bfloat16, T=2, B=3, H=64)))
    assert why.startswith(f"slstm, a cell of 4 states ({driver} has room for two")


def test_layer_norm_is_step_by_step_and_of_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (shipped._inputs("gru", torch.bfloat16, H, 4, "norm", "all", "ieee") for H in (32, 4096))
    assert choose(question(small, "forward", shipped.TARGETS["sm_90"])).driver == "per_step"
    cpu = dataclasses.replace(large, gx=torch.empty(1, 2, 3 * 4096, dtype=torch.bfloat16))
    assert any("layer norm with H=4096" in reason for reason in SCAN.unsupported(cpu))
    monkeypatch.setenv(VARIABLE, "driver=batch_parallel")
    cpu = dataclasses.replace(small, gx=torch.empty(1, 2, 96, dtype=torch.bfloat16))
    assert any("layer norm (batch_parallel is without" in reason for reason in SCAN.unsupported(cpu))


UNKNOWN: dict[str, dict] = {
    "mask zoneout_c": {"noise": ("zoneout_c",), "scales": (1.0,)},
    "mask many": {"noise": ("many",), "scales": (1.0,)},
    "gru has no state c": {"cell_clip": 0.5},
    "parameter peephole_i": {"params": ("w_hh", "b_hh", "peephole_i")},
}


@pytest.mark.parametrize("option", UNKNOWN)
def test_what_a_cell_does_not_have_is_refused_by_name(option: str) -> None:
    inputs = inputs_of(Case("gru"))
    changed = dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, **UNKNOWN[option]))
    assert any(option in reason for reason in SCAN.unsupported(changed))


def test_half_of_the_peepholes_are_refused() -> None:
    inputs = inputs_of(Case("lstm"))
    changed = dataclasses.replace(inputs.spec, params=("w_hh", "b_hh", "peephole_f"))
    reasons = SCAN.unsupported(dataclasses.replace(inputs, spec=changed))
    assert reasons == ["parameter peephole_f without peephole_i, peephole_o"]
