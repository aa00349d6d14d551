"""Tests of the tests: errors that are easy to make in a kernel, each of which `compare` must see.

A mutant replaces one device function; the kernels find it through the globals of their module.
"""

from __future__ import annotations

import dataclasses

import pytest
import triton
import triton.language as tl
from scans import Case, compare, gradients_of, inputs_of

from rnnkern import dispatch
from rnnkern.backends.triton import batch_parallel_kernels, per_step_backward, per_step_kernels, per_step_parts, slots
from rnnkern.backends.triton.cells import STEPS
from rnnkern.cells.gru import triton_step as gru
from rnnkern.cells.slstm import triton_step as slstm


@triton.jit
def gru_shares_its_gate_gradients(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dgx, dgh, dentering, small = gru.step_backward(dstates, planes, states, aux)
    return dgx, dgx, dentering, small


@triton.jit
def walks_all_one_way(n, PERIOD: tl.constexpr, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    return n < 0


@triton.jit
def computes_padding(b, B, T, lengths, HAS_LENGTHS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where(b < B, T, 0)


_entering = per_step_parts.entering_of
_d_states = batch_parallel_kernels._d_states
_d_recurrent = per_step_backward._d_recurrent


@triton.jit
def reads_the_row_beside(  # type: ignore[no-untyped-def]
    table, row, alive, before, went, n, b, B,
    WIDTH: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, RESTART: tl.constexpr, WRITTEN: tl.constexpr,
    TYPE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As where the offset of the step before is taken for that of this one."""
    beside = tl.where(before > 0, before - 1, before)
    return _entering(
        table,
        row,
        alive,
        beside,
        went,
        n,
        b,
        B,
        WIDTH,
        N,
        FIRST,
        RESTART,
        WRITTEN,
        TYPE,
        HAS_RESET,
        HAS_RESTART,
        ALIGNED,
    )


@triton.jit
def forgets_resets_of_a_scan(  # type: ignore[no-untyped-def]
    pending, weights, carry, d_restart, came, was_reset, factor, bound,
    GATES: tl.constexpr, HAS_RESET: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    return _d_states(
        pending, weights, carry, d_restart, came, was_reset & (was_reset == 0), factor, bound,
        GATES, HAS_RESET, ACC, PRECISION, DIAGONAL,
    )  # fmt: skip


@triton.jit
def forgets_resets_of_a_step(  # type: ignore[no-untyped-def]
    table, row, alive, after, came, n, b, B, p,
    GATES: tl.constexpr, MIXES_H: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    return _d_recurrent(
        table, row, alive, after, came, n, b, B, p, GATES, MIXES_H, H, P, N, False, False, STORAGE, ACC, PRECISION,
        ALIGNED, DY_ALIGNED, BLOCK_B, BLOCK_H, BLOCK_K, OPTIONS, DIAGONAL,
    )  # fmt: skip


def of_one_state(words: tl.constexpr) -> tl.constexpr:
    """As where every state beyond h is taken for the first of them."""
    return tl.constexpr(words.value[:1] * len(words.value))


@triton.jit
def slstm_divides_by_nothing(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    """By the formulas alone, which have no beginning."""
    h0, c0, n0, m0 = states
    return slstm.step(gx, gh, (h0, c0, tl.where(n0 == 0.0, 1e-30, n0), m0), aux)


SCAN, STEP = (batch_parallel_kernels,), (per_step_parts, per_step_kernels, per_step_backward)  # a driver's modules
MUTANTS = {
    "reads_the_row_beside": (
        (STEP,), "entering_of", reads_the_row_beside, Case("lstm", T=4, B=5, H=3, layout="packed", reverse=(True,)),
    ),
    "walks_all_one_way": ((SCAN, STEP), "walks_back", walks_all_one_way, Case("gru", T=3, B=3, H=3)),
    "computes_padding": (
        (SCAN, STEP), "lengths_of", computes_padding, Case("rnn_tanh", T=3, B=5, H=3, layout="padded"),
    ),
    "forgets_resets_of_a_scan": (
        (SCAN,), "_d_states", forgets_resets_of_a_scan, Case("gru", T=4, B=5, H=3, reset="learned"),
    ),
    "forgets_resets_of_a_step": (
        (STEP,), "_d_recurrent", forgets_resets_of_a_step, Case("gru", T=4, B=5, H=3, reset="learned"),
    ),
}  # fmt: skip
STATES = Case("slstm", T=2, B=3, H=3, reverse=(False,), reset="learned")


def judge(case: Case) -> None:
    inputs = inputs_of(case)
    compare(dispatch.backend("triton"), inputs, gradients_of(case, inputs))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers, function, mutant, case = MUTANTS[name]
    for modules in drivers:
        driver = "batch_parallel" if modules is SCAN else "per_step"
        monkeypatch.setenv("RNNKERN_TRITON_CONFIG", f"driver={driver}")
        judge(case)
        with monkeypatch.context() as patch:
            for module in modules:
                if hasattr(module, function):
                    patch.setattr(module, function, mutant)
            with pytest.raises(AssertionError, match=r"error|cosine|L2|truth"):
                judge(case)


@pytest.mark.parametrize("driver", ["batch_parallel", "per_step"])
def test_a_cell_that_shares_its_gate_gradients_is_caught(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_TRITON_CONFIG", f"driver={driver}")
    case = Case("gru", T=3, B=3, H=3)
    judge(case)
    monkeypatch.setitem(STEPS, "gru", STEPS["gru"]._replace(step_backward=gru_shares_its_gate_gradients))
    with pytest.raises(AssertionError, match=r"error|cosine|L2"):
        judge(case)


@pytest.mark.parametrize("words", ["C0", "RESTART_C", "C_CARRY", "SEQ", "DSEQ", "DC0", "DRESTART_C"])
def test_states_in_each_others_places_are_caught(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, words, of_one_state(getattr(slots, words)))
    with pytest.raises(AssertionError, match=r"error|cosine|L2|truth"):
        judge(STATES)


def test_a_unit_that_does_not_begin_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(STATES)
    monkeypatch.setitem(STEPS, "slstm", STEPS["slstm"]._replace(step=slstm_divides_by_nothing))
    with pytest.raises(AssertionError, match=r"error|cosine|L2|truth"):
        judge(dataclasses.replace(STATES, reset="zero"))
