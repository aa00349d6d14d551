"""The backward of a step as one launch, two or three; per_step_kernels.py says how steps go together."""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton import slots
from rnnkern.backends.triton.options import (
    DROPS,
    GRAD_CLIP,
    NORM_H,
    NORMS,
    PROJ_CLIP,
    SMALL,
    STAY_C,
    STAY_H,
    ZONES_C,
    ZONES_H,
    d_normalised,
)
from rnnkern.backends.triton.per_step_parts import (
    at_step,
    auxiliary_of,
    dropped_of,
    entering_of,
    number_of,
    resets_of,
    staying_of,
)
from rnnkern.backends.triton.places import locate
from rnnkern.backends.triton.slots import pointer, stride
from rnnkern.cells.triton_math import bounded


@triton.jit
def _d_recurrent(  # type: ignore[no-untyped-def]
    table, row, alive, after, came, n, b, B, p,
    GATES: tl.constexpr, MIXES_H: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The whole gradient of h after this step, [BLOCK_B, BLOCK_H] at columns p.

    What the step `after` in the walk sends back, or the gradient of the final state where there is none, and dy. Where
    that later step was a reset, its share goes to the reset state; where this step is not there, to the initial state.
    """
    inside = (p < P)[None, :]
    there = came[:, None] & inside
    source = pointer(table, slots.DPROD if NORM_H & OPTIONS else slots.DGH, STORAGE, ALIGNED)
    source += (after * N + n) * (GATES * H)
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    if DIAGONAL:
        for g in tl.static_range(GATES):
            d = tl.load(source[:, None] + (g * H + p)[None, :], mask=there, other=0.0).to(ACC)
            w = pointer(table, slots.W, STORAGE, ALIGNED) + (n * GATES + g) * H + p
            total += d * tl.load(w, mask=p < P, other=0.0).to(ACC)[None, :]
    else:
        weights = pointer(table, slots.W, STORAGE, ALIGNED) + n * (GATES * H * P)
        for k in range(0, GATES * H, BLOCK_K):
            kk = k + tl.arange(0, BLOCK_K)
            d = tl.load(source[:, None] + kk[None, :], mask=came[:, None] & (kk < GATES * H)[None, :], other=0.0)
            w = tl.load(weights + kk[:, None] * P + p[None, :], mask=(kk < GATES * H)[:, None] & inside, other=0.0)
            total = tl.dot(d, w, total, input_precision=PRECISION, out_dtype=ACC)
    if DROPS & OPTIONS:
        total = dropped_of(table, total, n * B + b, after * N + n, p, there, P, STORAGE, ACC, ALIGNED, OPTIONS)
        total = total * number_of(table, slots.SCALE_H, ACC)
    own = ((n * B + b) * P)[:, None] + p[None, :]
    if MIXES_H:
        total += tl.load(pointer(table, slots.CARRY, ACC, ALIGNED) + own, mask=came[:, None] & inside, other=0.0)
    if HAS_RESET:
        reset = resets_of(table, after, n, came, HAS_RESET)
        if HAS_RESTART:
            at = pointer(table, slots.DRESTART_H, ACC, ALIGNED) + own
            through = (came & reset)[:, None] & inside
            sum_through = tl.load(at, mask=through, other=0.0) + total
            tl.debug_barrier()
            tl.store(at, sum_through, mask=through)
        total = tl.where(reset[:, None], 0.0, total)
    if GRAD_CLIP & OPTIONS:
        total = bounded(total, number_of(table, slots.GRAD_CLIP, ACC))
    ends = pointer(table, slots.DH0, STORAGE, ALIGNED) + own
    tl.store(ends, total.to(STORAGE), mask=(came & (alive == 0))[:, None] & inside)
    end = tl.load(ends, mask=(alive & (came == 0))[:, None] & inside, other=0.0).to(ACC)
    at = row * stride(table, slots.DY_ROW, DY_ALIGNED) + n * stride(table, slots.DY_GROUP, DY_ALIGNED)
    at = pointer(table, slots.DY, STORAGE, DY_ALIGNED) + at[:, None] + p[None, :]
    dy = tl.load(at, mask=alive[:, None] & inside, other=0.0).to(ACC)
    return tl.where(came[:, None], total, end) + dy  # came: with NaN in W, the product of nothing is not 0


@triton.jit
def _d_product(  # type: ignore[no-untyped-def]
    table, dgh, n, row, alive, j, mask,
    GATES: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Through the layer norm of the product, a tile for each gate."""
    normed = ()
    gained = ()
    for g in tl.static_range(GATES):
        at = pointer(table, slots.NORMED, STORAGE, ALIGNED) + ((row * GATES + g) * H)[:, None] + j[None, :]
        normed = normed + (tl.load(at, mask=mask, other=0.0).to(ACC),)
        gain = pointer(table, slots.GAIN_H, STORAGE, ALIGNED) + (n * GATES + g) * H + j
        gain = tl.load(gain, mask=j < H, other=0.0).to(ACC)
        gained = gained + (tl.where(mask, dgh[g] * gain[None, :], 0.0),)
    found = ()
    for k in tl.static_range(len(NORM)):
        scale = pointer(table, slots.NORM_SCALES, ACC, False) + row * len(NORM) + k
        scale = tl.load(scale, mask=alive, other=0.0)[:, None]
        found = found + d_normalised(gained, normed, scale, STARTS[k], NORM[k], H)
    return found


@triton.jit
def _d_cell(  # type: ignore[no-untyped-def]
    table, dh, past, row, alive, before, went, n, b, B, j,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, REST: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    OPTIONS: tl.constexpr, SMALLS: tl.constexpr, PEEPS: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the step's own h to those of its gates, and to what it leaves to the step before it.

    `past` is the tile of what goes to the entering h past the step, in a tuple that may be empty.
    """
    mask = alive[:, None] & (j < H)[None, :]
    own = (row * N + n)[:, None]
    at = pointer(table, slots.PLANES, STORAGE, ALIGNED) + own * (SAVED * H) + j[None, :]
    planes = ()
    for q in tl.static_range(SAVED):
        planes = planes + (tl.load(at + q * H, mask=mask, other=0.0).to(ACC),)
    states = (tl.zeros_like(dh),)
    if MIXES_H:
        source, read = entering_of(
            table, row, alive, before, went, n, b, B,
            H, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        h = tl.load(source[:, None] + j[None, :], mask=read[:, None] & (j < H)[None, :], other=0.0)
        states = (h.to(ACC),)
    place = ((n * B + b) * H)[:, None] + j[None, :]
    dstates = (dh,)
    for k in tl.static_range(REST):
        source, read = entering_of(
            table, row, alive, before, went, n, b, B,
            H, N, slots.C0[k], slots.RESTART_C[k], slots.SEQ[k], ACC, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        state = tl.load(source[:, None] + j[None, :], mask=read[:, None] & (j < H)[None, :], other=0.0)
        states = states + (state,)
        carry = pointer(table, slots.DC0[k], ACC, ALIGNED) + place
        d = tl.load(carry, mask=mask, other=0.0)
        if HAS_DSEQ & (1 << k):
            d += tl.load(pointer(table, slots.DSEQ[k], ACC, ALIGNED) + own * H + j[None, :], mask=mask, other=0.0)
        dstates = dstates + (d,)
    if ZONES_C & OPTIONS:
        stay = staying_of(
            table, row * N + n, j, mask, slots.STAY_C, slots.SHARE_C, STAY_C, H, STORAGE, ACC, ALIGNED, OPTIONS
        )
        past_c = stay * dstates[1]
        dstates = (dh, (1.0 - stay) * dstates[1]) + dstates[2:]

    aux = auxiliary_of(table, n, row * N + n, j, mask, SMALLS, PEEPS, H, STORAGE, ACC, ALIGNED, OPTIONS)
    dgx, dgh, dentering, small = CELL(dstates, planes, states, aux)
    if ZONES_C & OPTIONS:
        dentering = (dentering[0], dentering[1] + past_c) + dentering[2:]
    if SMALL & OPTIONS:
        sums = pointer(table, slots.DSMALL, ACC, ALIGNED) + ((n * SMALLS * B + b) * H)[:, None] + j[None, :]
        totals = ()
        for k in tl.static_range(SMALLS):
            totals = totals + (tl.load(sums + k * B * H, mask=mask, other=0.0) + small[k],)
    if HAS_RESET:
        reset = resets_of(table, row, n, alive, HAS_RESET)[:, None]
    restarts = ()
    through = ()
    if HAS_RESTART:
        for k in tl.static_range(REST):
            restarts = restarts + (pointer(table, slots.DRESTART_C[k], ACC, ALIGNED) + place,)
            through = through + (tl.load(restarts[k], mask=mask & reset, other=0.0) + dentering[1 + k],)

    tl.debug_barrier()
    at = own * (GATES * H) + j[None, :]
    for g in tl.static_range(GATES):
        tl.store(pointer(table, slots.DGX, STORAGE, ALIGNED) + at + g * H, dgx[g].to(STORAGE), mask=mask)
        if SPLIT:
            tl.store(pointer(table, slots.DGH, STORAGE, ALIGNED) + at + g * H, dgh[g].to(STORAGE), mask=mask)
    if NORM_H & OPTIONS:
        dprod = _d_product(table, dgh, n, row * N + n, alive, j, mask, GATES, H, NORM, STARTS, STORAGE, ACC, ALIGNED)
        for g in tl.static_range(GATES):
            tl.store(pointer(table, slots.DPROD, STORAGE, ALIGNED) + at + g * H, dprod[g].to(STORAGE), mask=mask)
    if MIXES_H:
        left = dentering[0]
        if len(past):
            left += past[0]
        tl.store(pointer(table, slots.CARRY, ACC, ALIGNED) + place, left, mask=mask)
    if SMALL & OPTIONS:
        for k in tl.static_range(SMALLS):
            tl.store(sums + k * B * H, totals[k], mask=mask)
    for k in tl.static_range(REST):
        d = dentering[1 + k]
        if HAS_RESTART:
            tl.store(restarts[k], through[k], mask=mask & reset)
        if HAS_RESET:
            d = tl.where(reset, 0.0, d)
        if GRAD_CLIP & OPTIONS:
            d = bounded(d, number_of(table, slots.GRAD_CLIP, ACC))
        if REST > 1:  # as in the forward
            carry = pointer(table, slots.DC0[k], ACC, ALIGNED) + place
        tl.store(carry, d, mask=mask)


@triton.jit(do_not_specialize=["i"])
def backward_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, REST: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr, PROJECT: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
    PEEPS: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Launched T + 1 times, from the walk's last step to the one before its first, where only dstates are left.

    With a projection it ends at dh, and `backward_cell_step` goes on from there; under layer norm, whose rows must be
    whole, `backward_row_step` is what ends the step.
    """
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    w = T - 1 - s
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(w, back, b, length, B, T, offsets, HAS_OFFSETS)
    after, came = locate(w + 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    if HAS_LENGTHS:
        if tl.max((alive | came).to(tl.int32)) == 0:
            return
    p = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dh = _d_recurrent(
        table, row, alive, after, came, n, b, B, p,
        GATES, MIXES_H, H, P, N, HAS_RESET, HAS_RESTART, STORAGE, ACC, PRECISION, ALIGNED, DY_ALIGNED,
        BLOCK_B, BLOCK_H, BLOCK_K, OPTIONS, DIAGONAL,
    )  # fmt: skip
    past = ()
    mask = alive[:, None] & (p < P)[None, :]
    if ZONES_H & OPTIONS:
        stay = staying_of(
            table, row * N + n, p, mask, slots.STAY_H, slots.SHARE_H, STAY_H, P, STORAGE, ACC, ALIGNED, OPTIONS
        )
        past = (stay * dh,)
        dh = (1.0 - stay) * dh
    if PROJECT:
        at = ((row * N + n) * P)[:, None] + p[None, :]
        if PROJ_CLIP & OPTIONS:
            within = tl.load(pointer(table, slots.WITHIN, STORAGE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
            dh = tl.where(within != 0.0, dh, 0.0)
        tl.store(pointer(table, slots.DH, STORAGE, ALIGNED) + at, dh.to(STORAGE), mask=mask)
    elif NORMS & OPTIONS:
        at = ((n * B + b) * P)[:, None] + p[None, :]
        tl.store(pointer(table, slots.DHIDDEN, ACC, ALIGNED) + at, dh, mask=mask)
    if PROJECT or (NORMS & OPTIONS):
        if ZONES_H & OPTIONS:
            tl.debug_barrier()
            carry = pointer(table, slots.CARRY, ACC, ALIGNED) + ((n * B + b) * P)[:, None] + p[None, :]
            tl.store(carry, past[0], mask=mask)
    else:
        before, went = locate(w - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        _d_cell(
            table, dh, past, row, alive, before, went, n, b, B, p,
            CELL, GATES, SAVED, REST, MIXES_H, SPLIT, HAS_DSEQ, H, N, HAS_RESET, HAS_RESTART, STORAGE, ACC, ALIGNED,
            OPTIONS, SMALLS, PEEPS, NORM, STARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["i"])
def backward_cell_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, REST: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
    PEEPS: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """What follows `backward_step` with a projection: dm = dh W_hr, and the cell, but for that under layer norm."""
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    w = T - 1 - s
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(w, back, b, length, B, T, offsets, HAS_OFFSETS)
    if tl.max(alive.to(tl.int32)) == 0:
        return
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    source = pointer(table, slots.DH, STORAGE, ALIGNED) + (row * N + n) * P
    weights = pointer(table, slots.W_HR, STORAGE, ALIGNED) + n * (P * H)
    dm = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for k in range(0, P, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        dh = tl.load(source[:, None] + kk[None, :], mask=alive[:, None] & (kk < P)[None, :], other=0.0)
        at = weights + kk[:, None] * H + j[None, :]
        w_hr = tl.load(at, mask=(kk < P)[:, None] & (j < H)[None, :], other=0.0)
        dm = tl.dot(dh, w_hr, dm, input_precision=PRECISION, out_dtype=ACC)
    if NORMS & OPTIONS:
        at = pointer(table, slots.DHIDDEN, ACC, ALIGNED) + ((n * B + b) * H)[:, None] + j[None, :]
        tl.store(at, dm, mask=alive[:, None] & (j < H)[None, :])
        return
    before, went = locate(w - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    _d_cell(
        table, dm, (), row, alive, before, went, n, b, B, j,
        CELL, GATES, SAVED, REST, False, SPLIT, HAS_DSEQ, H, N, HAS_RESET, HAS_RESTART, STORAGE, ACC, ALIGNED,
        OPTIONS, SMALLS, PEEPS, NORM, STARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["i"])
def backward_row_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, REST: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr, PROJECT: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
    PEEPS: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """What ends a step under layer norm: the cell, and the norm of its product."""
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    w = T - 1 - s
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(w, back, b, length, B, T, offsets, HAS_OFFSETS)
    if tl.max(alive.to(tl.int32)) == 0:
        return
    before, went = locate(w - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    j = tl.arange(0, BLOCK_H)
    at = ((n * B + b) * H)[:, None] + j[None, :]
    mask = alive[:, None] & (j < H)[None, :]
    dh = tl.load(pointer(table, slots.DHIDDEN, ACC, ALIGNED) + at, mask=mask, other=0.0)
    past = ()
    if ZONES_H & OPTIONS:
        if not PROJECT:
            past = (tl.load(pointer(table, slots.CARRY, ACC, ALIGNED) + at, mask=mask, other=0.0),)
    _d_cell(
        table, dh, past, row, alive, before, went, n, b, B, j,
        CELL, GATES, SAVED, REST, MIXES_H and not PROJECT, SPLIT, HAS_DSEQ, H, N, HAS_RESET, HAS_RESTART, STORAGE,
        ACC, ALIGNED, OPTIONS, SMALLS, PEEPS, NORM, STARTS,
    )  # fmt: skip
