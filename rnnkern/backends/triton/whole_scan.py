"""What kernels that walk a whole scan in one launch have in common: reading a step's values, writing what it leaves.

A tile is [BLOCK_B, BLOCK_H], batch rows by units; `at` are rows of (time, batch, group), `own` rows of (group, batch).
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.cells.triton_math import bounded, zeros_like


@triton.jit
def wide(size, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A stride in 64 bits; ALIGNED promises a multiple of 16."""
    size = size.to(tl.int64)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def read(base, rows, j, mask, ACC: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B, BLOCK_H] rows of a tensor that is H wide."""
    return tl.load(base + (rows * H)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B] which rows' entering states are replaced."""
    if HAS_RESET:
        return tl.load(reset + row * reset_row + n * reset_group, mask=alive, other=0) != 0
    else:
        return row < 0


@triton.jit
def biases(  # type: ignore[no-untyped-def]
    bias, n, j, batch, GATES: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """A tile for each gate, with which its sums begin."""
    found = ()
    for g in tl.static_range(GATES):
        start = zeros_like(batch).to(ACC)
        if HAS_BIAS:
            start += tl.load(bias + (n * GATES + g) * H + j, mask=j < H, other=0.0).to(ACC)[None, :]
        found = found + (start,)
    return found


@triton.jit
def initial(h0, c0, own, j, batch, HAS_C: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The states before the first step."""
    states = (read(h0, own, j, batch, ACC, H),)
    if HAS_C:
        states = states + (read(c0, own, j, batch, ACC, H),)
    return states


@triton.jit
def gate_inputs(gx, at, j, mask, GATES: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """A step's gx, a tile for each gate; `at` are offsets of rows."""
    source = gx + at[:, None] + j[None, :]
    found = ()
    for g in tl.static_range(GATES):
        found = found + (tl.load(source + g * H, mask=mask, other=0.0).to(ACC),)
    return found


@triton.jit
def after_resets(  # type: ignore[no-untyped-def]
    states, replaced, restart_h, restart_c, own, j, batch,
    HAS_C: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The states that enter a step."""
    entering = states
    if HAS_RESET:
        again = replaced[:, None]
        if HAS_RESTART:
            entering = (tl.where(again, read(restart_h, own, j, batch, ACC, H), states[0]),)
            if HAS_C:
                entering = entering + (tl.where(again, read(restart_c, own, j, batch, ACC, H), states[1]),)
        else:
            entering = (tl.where(again, 0.0, states[0]),)
            if HAS_C:
                entering = entering + (tl.where(again, 0.0, states[1]),)
    return entering


@triton.jit
def leave(  # type: ignore[no-untyped-def]
    h, new, activations, states, seq, planes, at, j, mask,
    SAVED: tl.constexpr, HAS_C: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Writes what a step saves but for h, which is `new[0]` as it is stored; the states as they go on."""
    kept = (tl.where(mask, h.to(ACC), states[0]),)  # what is past H stays 0, whatever the cell makes of it
    if HAS_C:
        kept = kept + (tl.where(mask, new[1], states[1]),)
        if SAVE_STATES:
            tl.store(seq + (at * H)[:, None] + j[None, :], new[1], mask=mask)
    if SAVE_PLANES:
        for q in tl.static_range(SAVED):
            place = planes + ((at * SAVED + q) * H)[:, None] + j[None, :]
            tl.store(place, activations[q].to(STORAGE), mask=mask)
    return kept


@triton.jit
def end(h_last, c_last, states, own, j, batch, HAS_C: tl.constexpr, STORAGE: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes states, or their gradients, that are left when the walk is done."""
    ends = (own * H)[:, None] + j[None, :]
    tl.store(h_last + ends, states[0].to(STORAGE), mask=batch)
    if HAS_C:
        tl.store(c_last + ends, states[1], mask=batch)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def saved_activations(planes, at, j, mask, SAVED: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    found = ()
    for q in tl.static_range(SAVED):
        place = planes + ((at * SAVED + q) * H)[:, None] + j[None, :]
        found = found + (tl.load(place, mask=mask, other=0.0).to(ACC),)
    return found


@triton.jit
def saved_state(  # type: ignore[no-untyped-def]
    written, first, restart, before, own, j, inside, there, start, replaced,
    HAS_RESTART: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """A state that entered the step: of the row `before` where it is `there`, the initial one where the row starts."""
    found = read(written, before, j, there[:, None] & inside, ACC, H)
    found += read(first, own, j, start[:, None] & inside, ACC, H)
    if HAS_RESTART:
        found += read(restart, own, j, replaced[:, None] & inside, ACC, H)
    return found


@triton.jit
def saved_states(  # type: ignore[no-untyped-def]
    y, seq, h0, c0, restart_h, restart_c, before, own, j, inside, alive, went, replaced, zero,
    MIXES_H: tl.constexpr, HAS_C: tl.constexpr, HAS_RESTART: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The states that entered a step, from what the forward wrote; h only where the cell's equations have it."""
    there = went & (replaced == 0)
    start = alive & (went == 0) & (replaced == 0)
    entering = (zero,)
    if MIXES_H:
        h = saved_state(y, h0, restart_h, before, own, j, inside, there, start, replaced, HAS_RESTART, ACC, H)
        entering = (h,)
    if HAS_C:
        c = saved_state(seq, c0, restart_c, before, own, j, inside, there, start, replaced, HAS_RESTART, ACC, H)
        entering = entering + (c,)
    return entering


@triton.jit
def through(total, carry, d_restart, came, was_reset, HAS_RESET: tl.constexpr):  # type: ignore[no-untyped-def]
    """(dh as it leaves the step before, what goes to the reset state), with its product made."""
    total = tl.where(came[:, None], total, carry)  # with NaN in W, the product of nothing is not 0
    if HAS_RESET:
        d_restart = tl.where(was_reset[:, None], d_restart + total, d_restart)
        total = tl.where(was_reset[:, None], 0.0, total)
    return total, d_restart


@triton.jit
def d_leave(  # type: ignore[no-untyped-def]
    dentering, total, dc, d_restart_c, replaced, mask, zero, bound,
    MIXES_H: tl.constexpr, HAS_C: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """What a step leaves to the one before: (the carry of h, dc, what goes to the reset state's c).

    `bound` is that of gradients, in a tuple that may be empty.
    """
    left = zero
    if MIXES_H:
        left = dentering[0]
    carry = tl.where(mask, left, total)
    if HAS_C:
        left = dentering[1]
        if HAS_RESET:
            d_restart_c = tl.where(replaced[:, None], d_restart_c + left, d_restart_c)
            left = tl.where(replaced[:, None], 0.0, left)
        if len(bound):
            left = bounded(left, bound[0])
        dc = tl.where(mask, left, dc)
    return carry, dc, d_restart_c
