"""One step of a scan as one launch: a program has some rows, a tile of units and a group.

What a step leaves for the next lies in memory: h in y (or, where the row starts, in the states), c in the final states,
which the program that owns a tile updates in place. That costs one more write of c than reading it back from `seq`
would where seq is kept, and there is one way of finding c and not four.

Between reading and writing what is updated in place lies a barrier: where a tile has fewer elements than the program
has threads, several threads read one element and one of them writes it.

Nothing about a call is an argument but the table's address and a step number, so that one recorded CUDA graph serves
every T, every tensor and every B of the same number of tiles (graphs.py).
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton import slots
from rnnkern.backends.triton.options import (
    DROPS,
    GRAD_CLIP,
    PROJ_CLIP,
    SMALL,
    STAY_C,
    STAY_H,
    ZONES_C,
    ZONES_H,
    auxiliary,
    dropped,
    mixed,
    number,
    staying,
)
from rnnkern.backends.triton.places import lengths_of, locate, walks_back
from rnnkern.backends.triton.slots import pointer, stride
from rnnkern.cells.triton_math import bounded


@triton.jit
def _start(table, i, BLOCK_B: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_LENGTHS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's step of the walk, group and rows: (s, T, B, n, back, b, length)."""
    T = tl.load(table + slots.STEPS)
    B = tl.load(table + slots.BATCH)
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    length = lengths_of(b, B, T, pointer(table, slots.LENGTHS, tl.int64, False), HAS_LENGTHS)
    return tl.load(table + slots.STEP) + i, T, B, n, walks_back(n, PERIOD, REVERSE), b, length


@triton.jit
def _resets(table, row, n, alive, HAS_RESET: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B] which rows' entering states are replaced."""
    if HAS_RESET:
        at = row * tl.load(table + slots.RESET_ROW) + n * tl.load(table + slots.RESET_GROUP)
        return tl.load(pointer(table, slots.RESET, tl.int32, False) + at, mask=alive, other=0) != 0
    else:
        return row < 0


@triton.jit
def _entering(  # type: ignore[no-untyped-def]
    table, row, alive, before, went, n, b, B,
    WIDTH: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, RESTART: tl.constexpr, WRITTEN: tl.constexpr,
    TYPE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """([BLOCK_B] pointers to the rows of the state that enters, [BLOCK_B] which are to be read; the others are 0).

    The row `before` where there was one (`went`), else the initial state, and after a reset the state for that.
    """
    own = (n * B + b) * WIDTH
    source = tl.where(
        went,
        pointer(table, WRITTEN, TYPE, ALIGNED) + (before * N + n) * WIDTH,
        pointer(table, FIRST, TYPE, ALIGNED) + own,
    )
    if HAS_RESET:
        reset = _resets(table, row, n, alive, HAS_RESET)
        if HAS_RESTART:
            source = tl.where(reset, pointer(table, RESTART, TYPE, ALIGNED) + own, source)
        else:
            alive = alive & (reset == 0)
    return source, alive


@triton.jit
def _number(table, SLOT: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    return number(tl.load(table + SLOT), ACC)


@triton.jit
def _dropped(  # type: ignore[no-untyped-def]
    table, h, own, at, j, mask,
    P: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """What recurrent dropout leaves of h, or of a gradient of it, not yet scaled."""
    keep_h = pointer(table, slots.KEEP_H, STORAGE, ALIGNED)
    keep_step = pointer(table, slots.KEEP_STEP, STORAGE, ALIGNED)
    return dropped(h, keep_h, keep_step, own, at, j, mask, P, ACC, OPTIONS)


@triton.jit
def _staying(  # type: ignore[no-untyped-def]
    table, at, j, mask,
    SLOT: tl.constexpr, SHARE: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    share = tl.load(table + SHARE)
    return staying(pointer(table, SLOT, STORAGE, ALIGNED), share, at, j, mask, WIDTH, ACC, MASKED, OPTIONS)


@triton.jit
def _auxiliary(  # type: ignore[no-untyped-def]
    table, n, at, j, mask, SMALLS: tl.constexpr, H: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    candidate = pointer(table, slots.CANDIDATE, STORAGE, ALIGNED)
    small = pointer(table, slots.SMALL, STORAGE, ALIGNED)
    scale = tl.load(table + slots.SCALE_CANDIDATE)
    clip = tl.load(table + slots.CELL_CLIP)
    return auxiliary(candidate, scale, small, clip, n, at, j, mask, SMALLS, H, ACC, OPTIONS)


@triton.jit
def _biases(  # type: ignore[no-untyped-def]
    table, n, j, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr,
    HAS_BIAS: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A tile for each gate."""
    found = ()
    for g in tl.static_range(GATES):
        if HAS_BIAS:
            bias = pointer(table, slots.BIAS, STORAGE, ALIGNED) + (n * GATES + g) * H + j
            bias = tl.load(bias, mask=j < H, other=0.0).to(ACC)
            found = found + (tl.zeros((BLOCK_B, BLOCK_H), ACC) + bias[None, :],)
        else:
            found = found + (tl.zeros((BLOCK_B, BLOCK_H), ACC),)
    return found


@triton.jit(do_not_specialize=["i"])
def forward_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, PROJECT: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, GX_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
):  # fmt: skip
    s, T, B, n, back, b, length = _start(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(s, back, b, length, B, T, offsets, HAS_OFFSETS)
    if HAS_LENGTHS:
        if tl.max(alive.to(tl.int32)) == 0:
            return
    before, went = locate(s - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = alive[:, None] & (j < H)[None, :]

    at = row * stride(table, slots.GX_ROW, GX_ALIGNED) + n * stride(table, slots.GX_GROUP, GX_ALIGNED)
    at = pointer(table, slots.GX, STORAGE, GX_ALIGNED) + at[:, None] + j[None, :]
    gx = ()
    for g in tl.static_range(GATES):
        gx = gx + (tl.load(at + g * H, mask=mask, other=0.0).to(ACC),)
    gh = ()
    if DROPS & OPTIONS:
        for _ in tl.static_range(GATES):
            gh = gh + (tl.zeros((BLOCK_B, BLOCK_H), ACC),)
    else:
        gh = _biases(table, n, j, BLOCK_B, BLOCK_H, GATES, H, HAS_BIAS, STORAGE, ACC, ALIGNED)

    source, read = _entering(
        table, row, alive, before, went, n, b, B,
        P, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
    )  # fmt: skip
    weights = pointer(table, slots.W, STORAGE, ALIGNED) + n * (GATES * H * P)
    for k in range(0, P, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        there = read[:, None] & (kk < P)[None, :]
        h = tl.load(source[:, None] + kk[None, :], mask=there, other=0.0)
        if DROPS & OPTIONS:
            h = _dropped(table, h, n * B + b, row * N + n, kk, there, P, STORAGE, ACC, ALIGNED, OPTIONS).to(STORAGE)
        wk = weights + j[None, :] * P + kk[:, None]
        inside = (kk < P)[:, None] & (j < H)[None, :]
        sums = ()
        for g in tl.static_range(GATES):
            wg = tl.load(wk + g * H * P, mask=inside, other=0.0)
            sums = sums + (tl.dot(h, wg, gh[g], input_precision=PRECISION, out_dtype=ACC),)
        gh = sums
    if DROPS & OPTIONS:
        start = _biases(table, n, j, BLOCK_B, BLOCK_H, GATES, H, HAS_BIAS, STORAGE, ACC, ALIGNED)
        scale = _number(table, slots.SCALE_H, ACC)
        sums = ()
        for g in tl.static_range(GATES):
            sums = sums + (gh[g] * scale + start[g],)
        gh = sums

    states = (tl.zeros((BLOCK_B, BLOCK_H), ACC),)
    if MIXES_H and not PROJECT:
        at = source[:, None] + j[None, :]
        states = (tl.load(at, mask=read[:, None] & (j < H)[None, :], other=0.0).to(ACC),)
    if HAS_C:
        own = ((n * B + b) * H)[:, None] + j[None, :]
        carry = pointer(table, slots.C_CARRY, ACC, ALIGNED) + own
        c = tl.load(carry, mask=mask, other=0.0)
        if HAS_RESET:
            restart = tl.zeros((BLOCK_B, BLOCK_H), ACC)
            if HAS_RESTART:
                restart = tl.load(pointer(table, slots.RESTART_C, ACC, ALIGNED) + own, mask=mask, other=0.0)
            c = tl.where(_resets(table, row, n, alive, HAS_RESET)[:, None], restart, c)
        states = states + (c,)

    at = row * N + n
    aux = _auxiliary(table, n, at, j, mask, SMALLS, H, STORAGE, ACC, ALIGNED, OPTIONS)
    new, planes = CELL(gx, gh, states, aux)

    h = new[0]
    if ZONES_H & OPTIONS:
        if not PROJECT:
            stay = _staying(
                table, at, j, mask, slots.STAY_H, slots.SHARE_H, STAY_H, H, STORAGE, ACC, ALIGNED, OPTIONS
            )
            h = mixed(stay, states[0], h)
    h = h.to(STORAGE)
    own = at[:, None]
    if PROJECT:
        # Only this step's projection reads it where it is not saved: there it has the place of its batch row.
        place = own if SAVE_STATES else (n * B + b)[:, None]
        tl.store(pointer(table, slots.HIDDEN, STORAGE, ALIGNED) + place * H + j[None, :], h, mask=mask)
    else:
        tl.store(pointer(table, slots.Y, STORAGE, ALIGNED) + own * H + j[None, :], h, mask=mask)
        _, more = locate(s + 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        last = pointer(table, slots.H_LAST, STORAGE, ALIGNED) + ((n * B + b) * H)[:, None] + j[None, :]
        tl.store(last, h, mask=mask & (more == 0)[:, None])
    if HAS_C:
        c = new[1]
        if ZONES_C & OPTIONS:
            stay = _staying(
                table, at, j, mask, slots.STAY_C, slots.SHARE_C, STAY_C, H, STORAGE, ACC, ALIGNED, OPTIONS
            )
            c = mixed(stay, states[1], c)
        tl.debug_barrier()
        tl.store(carry, c, mask=mask)
        if SAVE_STATES:
            tl.store(pointer(table, slots.SEQ, ACC, ALIGNED) + own * H + j[None, :], c, mask=mask)
    if SAVE_PLANES:
        at = pointer(table, slots.PLANES, STORAGE, ALIGNED) + own * (SAVED * H) + j[None, :]
        for q in tl.static_range(SAVED):
            tl.store(at + q * H, planes[q].to(STORAGE), mask=mask)


@triton.jit(do_not_specialize=["i"])
def project_step(  # type: ignore[no-untyped-def]
    table, i,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """What follows `forward_step` with a projection: y = hidden W_hr^T."""
    s, T, B, n, back, b, length = _start(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(s, back, b, length, B, T, offsets, HAS_OFFSETS)
    if HAS_LENGTHS:
        if tl.max(alive.to(tl.int32)) == 0:
            return
    p = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = alive[:, None] & (p < P)[None, :]
    place = row * N + n if SAVE_STATES else n * B + b
    source = pointer(table, slots.HIDDEN, STORAGE, ALIGNED) + place * H
    weights = pointer(table, slots.W_HR, STORAGE, ALIGNED) + n * (P * H)
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for k in range(0, H, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        m = tl.load(source[:, None] + kk[None, :], mask=alive[:, None] & (kk < H)[None, :], other=0.0)
        at = weights + p[None, :] * H + kk[:, None]
        w = tl.load(at, mask=(kk < H)[:, None] & (p < P)[None, :], other=0.0)
        total = tl.dot(m, w, total, input_precision=PRECISION, out_dtype=ACC)
    if PROJ_CLIP & OPTIONS:
        total = bounded(total, _number(table, slots.PROJ_CLIP, ACC))
    if ZONES_H & OPTIONS:
        before, went = locate(s - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        source, read = _entering(
            table, row, alive, before, went, n, b, B,
            P, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        old = tl.load(source[:, None] + p[None, :], mask=read[:, None] & (p < P)[None, :], other=0.0).to(ACC)
        stay = _staying(
            table, row * N + n, p, mask, slots.STAY_H, slots.SHARE_H, STAY_H, P, STORAGE, ACC, ALIGNED, OPTIONS
        )
        total = mixed(stay, old, total)
    h = total.to(STORAGE)
    tl.store(pointer(table, slots.Y, STORAGE, ALIGNED) + ((row * N + n) * P)[:, None] + p[None, :], h, mask=mask)
    _, more = locate(s + 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    last = pointer(table, slots.H_LAST, STORAGE, ALIGNED) + ((n * B + b) * P)[:, None] + p[None, :]
    tl.store(last, h, mask=mask & (more == 0)[:, None])


@triton.jit
def _d_recurrent(  # type: ignore[no-untyped-def]
    table, row, alive, after, came, n, b, B, p,
    GATES: tl.constexpr, MIXES_H: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """The whole gradient of h after this step, [BLOCK_B, BLOCK_H] at columns p.

    What the step `after` in the walk sends back, or the gradient of the final state where there is none, and dy. Where
    that later step was a reset, its share goes to the reset state; where this step is not there, to the initial state.
    """
    inside = (p < P)[None, :]
    weights = pointer(table, slots.W, STORAGE, ALIGNED) + n * (GATES * H * P)
    source = pointer(table, slots.DGH, STORAGE, ALIGNED) + (after * N + n) * (GATES * H)
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for k in range(0, GATES * H, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        d = tl.load(source[:, None] + kk[None, :], mask=came[:, None] & (kk < GATES * H)[None, :], other=0.0)
        w = tl.load(weights + kk[:, None] * P + p[None, :], mask=(kk < GATES * H)[:, None] & inside, other=0.0)
        total = tl.dot(d, w, total, input_precision=PRECISION, out_dtype=ACC)
    if DROPS & OPTIONS:
        there = came[:, None] & inside
        total = _dropped(table, total, n * B + b, after * N + n, p, there, P, STORAGE, ACC, ALIGNED, OPTIONS)
        total = total * _number(table, slots.SCALE_H, ACC)
    own = ((n * B + b) * P)[:, None] + p[None, :]
    if MIXES_H:
        total += tl.load(pointer(table, slots.CARRY, ACC, ALIGNED) + own, mask=came[:, None] & inside, other=0.0)
    if HAS_RESET:
        reset = _resets(table, after, n, came, HAS_RESET)
        if HAS_RESTART:
            at = pointer(table, slots.DRESTART_H, ACC, ALIGNED) + own
            through = (came & reset)[:, None] & inside
            sum_through = tl.load(at, mask=through, other=0.0) + total
            tl.debug_barrier()
            tl.store(at, sum_through, mask=through)
        total = tl.where(reset[:, None], 0.0, total)
    if GRAD_CLIP & OPTIONS:
        total = bounded(total, _number(table, slots.GRAD_CLIP, ACC))
    ends = pointer(table, slots.DH0, STORAGE, ALIGNED) + own
    tl.store(ends, total.to(STORAGE), mask=(came & (alive == 0))[:, None] & inside)
    end = tl.load(ends, mask=(alive & (came == 0))[:, None] & inside, other=0.0).to(ACC)
    at = row * stride(table, slots.DY_ROW, DY_ALIGNED) + n * stride(table, slots.DY_GROUP, DY_ALIGNED)
    at = pointer(table, slots.DY, STORAGE, DY_ALIGNED) + at[:, None] + p[None, :]
    dy = tl.load(at, mask=alive[:, None] & inside, other=0.0).to(ACC)
    return tl.where(came[:, None], total, end) + dy  # came: with NaN in W, the product of nothing is not 0


@triton.jit
def _d_cell(  # type: ignore[no-untyped-def]
    table, dh, past, row, alive, before, went, n, b, B, j,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
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
        source, read = _entering(
            table, row, alive, before, went, n, b, B,
            H, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        h = tl.load(source[:, None] + j[None, :], mask=read[:, None] & (j < H)[None, :], other=0.0)
        states = (h.to(ACC),)
    place = ((n * B + b) * H)[:, None] + j[None, :]
    dstates = (dh,)
    if HAS_C:
        source, read = _entering(
            table, row, alive, before, went, n, b, B,
            H, N, slots.C0, slots.RESTART_C, slots.SEQ, ACC, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        c = tl.load(source[:, None] + j[None, :], mask=read[:, None] & (j < H)[None, :], other=0.0)
        states = states + (c,)
        carry = pointer(table, slots.DC0, ACC, ALIGNED) + place
        dc = tl.load(carry, mask=mask, other=0.0)
        if HAS_DSEQ:
            dc += tl.load(pointer(table, slots.DSEQ, ACC, ALIGNED) + own * H + j[None, :], mask=mask, other=0.0)
        if ZONES_C & OPTIONS:
            stay = _staying(
                table, row * N + n, j, mask, slots.STAY_C, slots.SHARE_C, STAY_C, H, STORAGE, ACC, ALIGNED, OPTIONS
            )
            past_c = stay * dc
            dc = (1.0 - stay) * dc
        dstates = dstates + (dc,)

    aux = _auxiliary(table, n, row * N + n, j, mask, SMALLS, H, STORAGE, ACC, ALIGNED, OPTIONS)
    dgx, dgh, dentering, small = CELL(dstates, planes, states, aux)
    if HAS_C:
        dc = dentering[1]
        if ZONES_C & OPTIONS:
            dc += past_c
    if SMALL & OPTIONS:
        sums = pointer(table, slots.DSMALL, ACC, ALIGNED) + ((n * SMALLS * B + b) * H)[:, None] + j[None, :]
        totals = ()
        for k in tl.static_range(SMALLS):
            totals = totals + (tl.load(sums + k * B * H, mask=mask, other=0.0) + small[k],)
    if HAS_RESET:
        reset = _resets(table, row, n, alive, HAS_RESET)[:, None]
    if HAS_C and HAS_RESTART:
        restarts = pointer(table, slots.DRESTART_C, ACC, ALIGNED) + place
        through = tl.load(restarts, mask=mask & reset, other=0.0) + dc

    tl.debug_barrier()
    at = own * (GATES * H) + j[None, :]
    for g in tl.static_range(GATES):
        tl.store(pointer(table, slots.DGX, STORAGE, ALIGNED) + at + g * H, dgx[g].to(STORAGE), mask=mask)
        if SPLIT:
            tl.store(pointer(table, slots.DGH, STORAGE, ALIGNED) + at + g * H, dgh[g].to(STORAGE), mask=mask)
    if MIXES_H:
        left = dentering[0]
        if len(past):
            left += past[0]
        tl.store(pointer(table, slots.CARRY, ACC, ALIGNED) + place, left, mask=mask)
    if SMALL & OPTIONS:
        for k in tl.static_range(SMALLS):
            tl.store(sums + k * B * H, totals[k], mask=mask)
    if HAS_C:
        if HAS_RESTART:
            tl.store(restarts, through, mask=mask & reset)
        if HAS_RESET:
            dc = tl.where(reset, 0.0, dc)
        if GRAD_CLIP & OPTIONS:
            dc = bounded(dc, _number(table, slots.GRAD_CLIP, ACC))
        tl.store(carry, dc, mask=mask)


@triton.jit(do_not_specialize=["i"])
def backward_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr, PROJECT: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
):  # fmt: skip
    """Launched T + 1 times, from the walk's last step to the one before its first, where only dstates are left.

    With a projection it ends at dh, and `backward_cell_step` goes on from there.
    """
    s, T, B, n, back, b, length = _start(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
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
        BLOCK_B, BLOCK_H, BLOCK_K, OPTIONS,
    )  # fmt: skip
    past = ()
    mask = alive[:, None] & (p < P)[None, :]
    if ZONES_H & OPTIONS:
        stay = _staying(
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
        if ZONES_H & OPTIONS:
            tl.debug_barrier()
            carry = pointer(table, slots.CARRY, ACC, ALIGNED) + ((n * B + b) * P)[:, None] + p[None, :]
            tl.store(carry, past[0], mask=mask)
    else:
        before, went = locate(w - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        _d_cell(
            table, dh, past, row, alive, before, went, n, b, B, p,
            CELL, GATES, SAVED, HAS_C, MIXES_H, SPLIT, HAS_DSEQ, H, N, HAS_RESET, HAS_RESTART, STORAGE, ACC, ALIGNED,
            OPTIONS, SMALLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["i"])
def backward_cell_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
):  # fmt: skip
    """What follows `backward_step` with a projection: dm = dh W_hr, and the cell."""
    s, T, B, n, back, b, length = _start(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    w = T - 1 - s
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(w, back, b, length, B, T, offsets, HAS_OFFSETS)
    if tl.max(alive.to(tl.int32)) == 0:
        return
    before, went = locate(w - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
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
    _d_cell(
        table, dm, (), row, alive, before, went, n, b, B, j,
        CELL, GATES, SAVED, HAS_C, False, SPLIT, HAS_DSEQ, H, N, HAS_RESET, HAS_RESTART, STORAGE, ACC, ALIGNED,
        OPTIONS, SMALLS,
    )  # fmt: skip
