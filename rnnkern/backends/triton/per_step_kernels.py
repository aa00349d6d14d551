"""One step of a scan as one launch: a program has some rows, a tile of units and a group.

What a step leaves for the next lies in memory: h in y (or, where the row starts, in the states), c and whatever other
states the cell has, REST in all, in the final states, which the program that owns a tile updates in place. That costs
one more write of c than reading it back from `seq` would where seq is kept, and there is one way of finding c and not
four.

Between reading and writing what is updated in place lies a barrier: where a tile has fewer elements than the program
has threads, several threads read one element and one of them writes it.

With a projection a second launch follows. Under layer norm the product is a launch before (`product_step`), and what
follows it has programs that hold whole rows.

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
    NORM_H,
    NORMS,
    PROJ_CLIP,
    STAY_C,
    STAY_H,
    ZONES_C,
    ZONES_H,
    mixed,
    normalised,
)
from rnnkern.backends.triton.per_step_parts import (
    at_step,
    auxiliary_of,
    bias_tiles,
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
def _gates(  # type: ignore[no-untyped-def]
    table, source, read, at, own, n, j,
    GATES: tl.constexpr, H: tl.constexpr, P: tl.constexpr, HAS_BIAS: tl.constexpr, STORAGE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """h W_hh^T and its bias, a tile for each gate; or h times the weights of a diagonal recurrence."""
    gh = ()
    if DROPS & OPTIONS:
        for _ in tl.static_range(GATES):
            gh = gh + (tl.zeros((BLOCK_B, BLOCK_H), ACC),)
    else:
        gh = bias_tiles(table, n, j, BLOCK_B, BLOCK_H, GATES, H, HAS_BIAS, STORAGE, ACC, ALIGNED)
    if DIAGONAL:
        u = j % P  # of the units, where j goes over those of several gates
        there = read[:, None] & (j < H)[None, :]
        h = tl.load(source[:, None] + u[None, :], mask=there, other=0.0).to(ACC)
        if DROPS & OPTIONS:
            h = dropped_of(table, h, own, at, u, there, P, STORAGE, ACC, ALIGNED, OPTIONS)
        sums = ()
        for g in tl.static_range(GATES):
            wg = pointer(table, slots.W, STORAGE, ALIGNED) + (n * GATES + g) * H + j
            sums = sums + (gh[g] + h * tl.load(wg, mask=j < H, other=0.0).to(ACC)[None, :],)
        gh = sums
    else:
        weights = pointer(table, slots.W, STORAGE, ALIGNED) + n * (GATES * H * P)
        for k in range(0, P, BLOCK_K):
            kk = k + tl.arange(0, BLOCK_K)
            there = read[:, None] & (kk < P)[None, :]
            h = tl.load(source[:, None] + kk[None, :], mask=there, other=0.0)
            if DROPS & OPTIONS:
                h = dropped_of(table, h, own, at, kk, there, P, STORAGE, ACC, ALIGNED, OPTIONS).to(STORAGE)
            wk = weights + j[None, :] * P + kk[:, None]
            inside = (kk < P)[:, None] & (j < H)[None, :]
            sums = ()
            for g in tl.static_range(GATES):
                wg = tl.load(wk + g * H * P, mask=inside, other=0.0)
                sums = sums + (tl.dot(h, wg, gh[g], input_precision=PRECISION, out_dtype=ACC),)
            gh = sums
    if DROPS & OPTIONS:
        start = bias_tiles(table, n, j, BLOCK_B, BLOCK_H, GATES, H, HAS_BIAS, STORAGE, ACC, ALIGNED)
        scale = number_of(table, slots.SCALE_H, ACC)
        sums = ()
        for g in tl.static_range(GATES):
            sums = sums + (gh[g] * scale + start[g],)
        gh = sums
    return gh


@triton.jit
def _gates_of_product(  # type: ignore[no-untyped-def]
    table, n, own, j, mask,
    GATES: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """The same of whole rows, from what `product_step` has made."""
    at = pointer(table, slots.PRODUCT, ACC, ALIGNED) + (own * (GATES * H))[:, None] + j[None, :]
    gh = ()
    for g in tl.static_range(GATES):
        gh = gh + (tl.load(at + g * H, mask=mask, other=0.0),)
    if NORM_H & OPTIONS:
        eps = number_of(table, slots.EPS, ACC)
        normed = ()
        for k in tl.static_range(len(NORM)):
            normed = normed + normalised(gh, (j < H)[None, :], eps, STARTS[k], NORM[k], H)
        gh = ()
        for g in tl.static_range(GATES):
            gain = pointer(table, slots.GAIN_H, STORAGE, ALIGNED) + (n * GATES + g) * H + j
            gh = gh + (normed[g] * tl.load(gain, mask=j < H, other=0.0).to(ACC)[None, :],)
    if HAS_BIAS:
        sums = ()
        for g in tl.static_range(GATES):
            bias = pointer(table, slots.BIAS, STORAGE, ALIGNED) + (n * GATES + g) * H + j
            sums = sums + (gh[g] + tl.load(bias, mask=j < H, other=0.0).to(ACC)[None, :],)
        gh = sums
    return gh


@triton.jit(do_not_specialize=["i"])
def product_step(  # type: ignore[no-untyped-def]
    table, i,
    GATES: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr,
    REVERSE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """What comes before `forward_step` under layer norm, which is of whole rows: h W_hh^T, for all gates."""
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
    offsets = pointer(table, slots.OFFSETS, tl.int64, False)
    row, alive = locate(s, back, b, length, B, T, offsets, HAS_OFFSETS)
    if HAS_LENGTHS:
        if tl.max(alive.to(tl.int32)) == 0:
            return
    before, went = locate(s - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    source, read = entering_of(
        table, row, alive, before, went, n, b, B,
        P, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
    )  # fmt: skip
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    (product,) = _gates(
        table, source, read, row * N + n, n * B + b, n, j,
        1, GATES * H, P, False, STORAGE, ACC, PRECISION, ALIGNED, BLOCK_B, BLOCK_H, BLOCK_K, OPTIONS, DIAGONAL,
    )  # fmt: skip
    at = pointer(table, slots.PRODUCT, ACC, ALIGNED) + ((n * B + b) * (GATES * H))[:, None] + j[None, :]
    tl.store(at, product, mask=alive[:, None] & (j < GATES * H)[None, :])


@triton.jit(do_not_specialize=["i"])
def forward_step(  # type: ignore[no-untyped-def]
    table, i,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, REST: tl.constexpr, MIXES_H: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, PROJECT: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, GX_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr,
    PEEPS: tl.constexpr, NORM: tl.constexpr, STARTS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
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
    source, read = entering_of(
        table, row, alive, before, went, n, b, B,
        P, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
    )  # fmt: skip
    if NORMS & OPTIONS:
        gh = _gates_of_product(
            table, n, n * B + b, j, mask, GATES, H, NORM, STARTS, HAS_BIAS, STORAGE, ACC, ALIGNED, OPTIONS
        )
    else:
        gh = _gates(
            table, source, read, row * N + n, n * B + b, n, j,
            GATES, H, P, HAS_BIAS, STORAGE, ACC, PRECISION, ALIGNED, BLOCK_B, BLOCK_H, BLOCK_K, OPTIONS, DIAGONAL,
        )  # fmt: skip

    states = (tl.zeros((BLOCK_B, BLOCK_H), ACC),)
    if MIXES_H and not PROJECT:
        at = source[:, None] + j[None, :]
        states = (tl.load(at, mask=read[:, None] & (j < H)[None, :], other=0.0).to(ACC),)
    final = ((n * B + b) * H)[:, None] + j[None, :]
    for k in tl.static_range(REST):
        carry = pointer(table, slots.C_CARRY[k], ACC, ALIGNED) + final
        state = tl.load(carry, mask=mask, other=0.0)
        if HAS_RESET:
            restart = tl.zeros((BLOCK_B, BLOCK_H), ACC)
            if HAS_RESTART:
                restart = tl.load(pointer(table, slots.RESTART_C[k], ACC, ALIGNED) + final, mask=mask, other=0.0)
            state = tl.where(resets_of(table, row, n, alive, HAS_RESET)[:, None], restart, state)
        states = states + (state,)

    at = row * N + n
    aux = auxiliary_of(table, n, at, j, mask, SMALLS, PEEPS, H, STORAGE, ACC, ALIGNED, OPTIONS)
    new, planes = CELL(gx, gh, states, aux)

    h = new[0]
    if ZONES_H & OPTIONS:
        if not PROJECT:
            stay = staying_of(
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
    if REST:
        if ZONES_C & OPTIONS:
            stay = staying_of(
                table, at, j, mask, slots.STAY_C, slots.SHARE_C, STAY_C, H, STORAGE, ACC, ALIGNED, OPTIONS
            )
            new = (new[0], mixed(stay, states[1], new[1])) + new[2:]
        tl.debug_barrier()
    for k in tl.static_range(REST):
        if REST > 1:  # kept until here, the addresses of several would need registers
            carry = pointer(table, slots.C_CARRY[k], ACC, ALIGNED) + final
        tl.store(carry, new[1 + k], mask=mask)
        if SAVE_STATES:
            tl.store(pointer(table, slots.SEQ[k], ACC, ALIGNED) + own * H + j[None, :], new[1 + k], mask=mask)
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
    s, T, B, n, back, b, length = at_step(table, i, BLOCK_B, PERIOD, REVERSE, HAS_LENGTHS)
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
        total = bounded(total, number_of(table, slots.PROJ_CLIP, ACC))
    if ZONES_H & OPTIONS:
        before, went = locate(s - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        source, read = entering_of(
            table, row, alive, before, went, n, b, B,
            P, N, slots.H0, slots.RESTART_H, slots.Y, STORAGE, HAS_RESET, HAS_RESTART, ALIGNED,
        )  # fmt: skip
        old = tl.load(source[:, None] + p[None, :], mask=read[:, None] & (p < P)[None, :], other=0.0).to(ACC)
        stay = staying_of(
            table, row * N + n, p, mask, slots.STAY_H, slots.SHARE_H, STAY_H, P, STORAGE, ACC, ALIGNED, OPTIONS
        )
        total = mixed(stay, old, total)
    h = total.to(STORAGE)
    tl.store(pointer(table, slots.Y, STORAGE, ALIGNED) + ((row * N + n) * P)[:, None] + p[None, :], h, mask=mask)
    _, more = locate(s + 1, back, b, length, B, T, offsets, HAS_OFFSETS)
    last = pointer(table, slots.H_LAST, STORAGE, ALIGNED) + ((n * B + b) * P)[:, None] + p[None, :]
    tl.store(last, h, mask=mask & (more == 0)[:, None])
