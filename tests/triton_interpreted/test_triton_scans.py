"""Every Triton kernel against the reference, as test_backends.py does for the other backends."""

from __future__ import annotations

import dataclasses
import random
from itertools import product

import pytest
import torch
from scans import (
    DTYPES,
    Case,
    agree,
    check_nan_and_inf,
    check_refusals,
    check_rows_past_a_length,
    check_same_bits,
    compare,
    drawn,
    gradients_of,
    inputs_of,
    references,
)

from rnnkern import dispatch
from rnnkern.backends.base import ScanInputs
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import fits_batch_parallel, target_of
from rnnkern.backends.triton.drivers import question
from rnnkern.cells import CELLS

SCAN = dispatch.backend("triton")
DRIVERS = ("batch_parallel", "per_step")  # persistent programs wait for each other: test_triton_persistent.py
# What only per_step does: its steps are the slowest here, so these have a few cases that are chosen.
ALONE = [cell for cell in STEPS if len(CELLS[cell].states) > 2]
TESTED = [cell for cell in STEPS if cell not in ("indrnn_tanh", *ALONE)]  # IndRNN's two differ as RNN's do
DENSE = [cell for cell in TESTED if CELLS[cell].dense]
AXES: dict[str, list] = {
    "T": [1, 2, 3, 4, 5, 6],
    "B": [1, 3, 7, 17],
    "H": [1, 3, 17, 33, 65],
    "layout": ["dense", "packed", "padded"],
    "reverse": [(False,), (True,), (False, True), (False, True, True, False)],
    "bias": [True, True, False],
    "project": [False, False, True],
    "save": ["all", "all", "all", "all", "states", "none"],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["", "", "zero", "learned"],
}


def chosen() -> list[Case]:
    cases = []
    for cell in TESTED:
        cases.append(Case(cell, B=0, H=3, layout="padded", reset="learned"))
        cases.append(Case(cell, torch.bfloat16, T=3, B=7, H=128, reverse=(True,), reset="zero", layout="padded"))
        # Sixteen-bit h, and sums that are made over all steps of a reset state's gradient.
        cases.append(Case(cell, torch.float16, T=6, B=3, H=3, reset="learned", layout="packed"))
    cases.append(Case("lstm", T=3, B=3, H=33, project=True, layout="padded", save="none", reset="learned"))
    cases.append(Case("lstm", torch.float64, T=3, B=17, H=33, project=True, reset="learned"))
    for cell in ALONE:
        cases.append(Case(cell, B=0, H=3, layout="padded", reset="learned"))
        cases.append(Case(cell, torch.float64, T=3, H=17, layout="padded", strided=True, reset="zero"))
        cases.append(Case(cell, B=3, layout="packed", reverse=(True,), bias=False, dseq=False))
        cases.append(Case(cell, T=2, H=3, project=True, reverse=(False, True, True, False), reset="learned"))
        cases.append(Case(cell, H=3, project=True, reverse=(False,), save="none", reset="learned"))
        cases.append(Case(cell, T=3, B=3, H=3, reverse=(True,), save="states", reset="zero"))
        cases.append(Case(cell, torch.bfloat16, T=3, B=3, H=3, layout="padded"))
        cases.append(Case(cell, torch.float16, T=6, B=3, H=3, reverse=(True,), layout="packed", reset="learned"))
    return cases


def driven(case: Case, inputs: ScanInputs, patch: pytest.MonkeyPatch, driver: str | None = None) -> str:
    """Sets driver and tiles: as asked, else every other case batch-parallel where that can do it."""
    cannot = fits_batch_parallel(question(inputs, "forward", target_of(inputs.gx.device)))
    if driver is None:
        driver = DRIVERS[1 if cannot else case.seed % 2]
    rng = random.Random(str(case))
    text = f"driver={driver},block_b={rng.choice([4, 8, 16]) if driver == 'batch_parallel' else 16}"
    if driver == "per_step":
        text += f",block_h={rng.choice([16, 32])},block_k={rng.choice([16, 32, 64])}"
    patch.setenv("RNNKERN_TRITON_CONFIG", text)
    return text


def demand(inputs: ScanInputs) -> None:
    """Skips what may be refused; all else may not."""
    reasons = SCAN.unsupported(inputs)
    if any(f"projected {inputs.spec.cell}" in reason for reason in reasons):
        pytest.skip("; ".join(reasons))
    assert reasons == []


@pytest.mark.parametrize("case", [*drawn(12, AXES, TESTED), *chosen()], ids=str)
def test_equals_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if CELLS[case.cell].mixes_h or not CELLS[case.cell].dense:
        case = dataclasses.replace(case, project=False)
    inputs = inputs_of(case)
    driven(case, inputs, monkeypatch)
    demand(inputs)
    compare(SCAN, inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("case", [c for c in drawn(4, AXES, TESTED) if c.dtype != torch.float16], ids=str)
def test_as_configured_by_size(case: Case) -> None:
    """Nothing asked for: the size model's own tiles."""
    case = dataclasses.replace(case, project=case.project and case.cell == "lstm", T=min(case.T, 3))
    inputs = inputs_of(case)
    demand(inputs)
    compare(SCAN, inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("cell, driver", [*product(TESTED, DRIVERS), *product(ALONE, DRIVERS[1:])])
def test_rows_past_a_length(cell: str, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = (True,) if cell in ALONE else (False, True)
    case = Case(cell, T=5, B=17, H=5, layout="padded", reverse=walks, reset="learned")
    driven(case, inputs_of(case), monkeypatch, driver)
    check_rows_past_a_length(SCAN, case, [3, 0, 5, 1, 0, 5, 4, 2, 4, 0, 0, 0, 1, 1, 1, 1, 3])


PLACES = ("gx", "h", "rest", "w_hh", "dy")


@pytest.mark.parametrize(
    "cell, where, driver", [*product(DENSE, PLACES, DRIVERS), *product(ALONE, ("gx", "rest"), DRIVERS[1:])]
)
def test_nan_and_inf_go_where_the_reference_sends_them(
    cell: str, where: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "rest" and len(CELLS[cell].states) == 1:
        pytest.skip(f"{cell} has no state but h")
    case = Case(cell, T=3, B=6, H=5, layout="padded", seed=3)
    driven(case, inputs_of(case), monkeypatch, driver)
    for bad in (float("nan"), float("inf"), float("-inf")):
        check_nan_and_inf(SCAN, case, [3, 0, 2, 3, 1, 2], where, bad)


@pytest.mark.parametrize(
    "cell, dtype, driver", [*product(DENSE, DTYPES, DRIVERS), *product(ALONE, DTYPES[1:2], DRIVERS[1:])], ids=str
)
def test_same_bits_and_inputs_left_alone(
    cell: str, dtype: torch.dtype, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(cell, dtype, T=3, B=17, H=9, layout="padded", strided=True, reset="learned")
    driven(case, inputs_of(case), monkeypatch, driver)
    check_same_bits(SCAN, case)


@pytest.mark.parametrize("cell", (*TESTED, *ALONE))
def test_both_drivers_save_the_same(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one driver's forward saved, the other's backward reads, and the reference's."""
    drivers = DRIVERS[1:] if cell in ALONE else DRIVERS
    case = Case(cell, T=4, B=5, H=17, layout="packed", reset="zero")
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    yardstick, truth, saved = references(inputs, grads)
    outputs = []
    for driver in drivers:
        driven(case, inputs, monkeypatch, driver)
        outputs.append(SCAN.forward(inputs))
    for found, driver in zip(reversed(outputs), drivers, strict=True):
        driven(case, inputs, monkeypatch, driver)
        if saved is None:
            agree([SCAN.backward(inputs, found, *grads)], yardstick[1:], truth[1:], inputs)
        agree([SCAN.backward(inputs, saved or yardstick[0], *grads)], yardstick[1:], truth[1:], inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_models_and_a_pattern_of_directions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gru", dtype, T=2, B=2, H=3, reverse=(False, True) * 12)
    inputs = inputs_of(case)
    driven(case, inputs, monkeypatch, "batch_parallel")
    demand(inputs)
    compare(SCAN, inputs, gradients_of(case, inputs))
    odd = dataclasses.replace(inputs.spec, reverse=(True, *(False,) * 40))
    assert any("directions" in reason for reason in SCAN.unsupported(dataclasses.replace(inputs, spec=odd)))


@pytest.mark.parametrize("driver", DRIVERS)
def test_small_values_keep_their_precision(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tanh near 0, where differences of exponentials cancel."""
    case = Case("rnn_tanh", T=1, B=4, H=4, reverse=(False,))
    inputs = inputs_of(case)
    tiny = [t.mul_(1e-6) for t in (inputs.gx, *inputs.states, *inputs.params[0])]
    assert tiny
    driven(case, inputs, monkeypatch, driver)
    compare(SCAN, inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_units_of_slstm_without_a_past_and_with_large_gates(scale: float) -> None:
    """Where n is 0, m is not looked at; no exponential overflows; of n at every step there is no gradient."""
    case = Case("slstm", T=3, B=3, H=5, reverse=(False,))
    inputs = inputs_of(case)
    inputs.gx.mul_(scale)
    _, _, n, m = inputs.states
    n[..., ::2], m[..., ::2] = 0.0, float("nan")
    dy, dfinal, (of_c, of_n, of_m) = gradients_of(case, inputs)
    compare(SCAN, inputs, (dy, dfinal, (of_c, of_n.new_empty(0), of_m)))
    assert all(s.isfinite().all() for s in SCAN.forward(inputs).seq)


def test_other_devices_dtypes_and_cells_are_refused_by_name() -> None:
    check_refusals(SCAN)
