"""A whole scan in one launch, for small H: a program has some rows of a group, all its units and all its steps.

The weights are read once, states stay in registers, and no program waits for another. Sizes that are no powers of two
are padded in the tiles and not in memory. With a diagonal recurrence, where units do not see each other, a program has
some of the units, and H may be any.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton.options import (
    DROPS,
    GRAD_CLIP,
    NUMBERS,
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
from rnnkern.backends.triton.whole_scan import (
    after_resets,
    biases,
    d_leave,
    end,
    gate_inputs,
    initial,
    leave,
    read,
    resets,
    saved_activations,
    saved_states,
    through,
    wide,
)
from rnnkern.cells.triton_math import bounded

_NUMBERS = ["T", "B", "reset_row", "reset_group", *NUMBERS]


@triton.jit
def _units(BLOCK_H: tl.constexpr, DIAGONAL: tl.constexpr):  # type: ignore[no-untyped-def]
    j = tl.arange(0, BLOCK_H)
    if DIAGONAL:
        j += tl.program_id(1) * BLOCK_H
    return j


@triton.jit
def _diagonal(w, n, j, GATES: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of these units, [1, BLOCK_H] for each gate."""
    found = ()
    for g in tl.static_range(GATES):
        values = tl.load(w + (n * GATES + g) * H + j, mask=j < H, other=0.0).to(ACC)
        found = found + (values[None, :],)
    return found


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    left, weights, start, ACC: tl.constexpr, PRECISION: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    if DIAGONAL:
        return start + left.to(ACC) * weights
    else:
        return tl.dot(left, weights, start, input_precision=PRECISION, out_dtype=ACC)


@triton.jit(do_not_specialize=[*_NUMBERS, "gx_row", "gx_group"])
def forward_scan(  # type: ignore[no-untyped-def]
    gx, w, bias, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, h_last, c_last, seq, planes,
    keep_h, keep_step, candidate, stay_h, stay_c, small,
    T, B, gx_row, gx_group, reset_row, reset_group, scale_h, scale_candidate, share_h, share_c, cell_clip,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, GX_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    gx_row = wide(gx_row, GX_ALIGNED)
    gx_group = wide(gx_group, GX_ALIGNED)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    j = _units(BLOCK_H, DIAGONAL)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside

    weights = ()
    if DIAGONAL:
        weights = _diagonal(w, n, j, GATES, H, ACC)
    else:
        for g in tl.static_range(GATES):
            square = w + (n * GATES + g) * H * H + j[None, :] * H + j[:, None]
            weights = weights + (tl.load(square, mask=(j < H)[:, None] & inside, other=0.0),)
    gate_bias = biases(bias, n, j, batch, GATES, HAS_BIAS, ACC, H)
    states = initial(h0, c0, own, j, batch, HAS_C, ACC, H)

    # A tile's rows may all end early: its walk has only the steps that one of them has.
    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    for s in range(0, steps):
        row, alive = locate(first + s, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        x = gate_inputs(gx, row * gx_row + n * gx_group, j, mask, GATES, ACC, H)
        replaced = resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)
        entering = after_resets(
            states, replaced, restart_h, restart_c, own, j, batch, HAS_C, HAS_RESET, HAS_RESTART, ACC, H
        )
        at = row * N + n
        h = entering[0]
        gh = ()
        if DROPS & OPTIONS:
            h = dropped(h, keep_h, keep_step, own, at, j, mask, H, ACC, OPTIONS).to(STORAGE)
            scale = number(scale_h, ACC)
            zero = tl.zeros((BLOCK_B, BLOCK_H), ACC)
            for g in tl.static_range(GATES):
                product = _product(h, weights[g], zero, ACC, PRECISION, DIAGONAL)
                gh = gh + (product * scale + gate_bias[g],)
        else:
            h = h.to(STORAGE)
            for g in tl.static_range(GATES):
                gh = gh + (_product(h, weights[g], gate_bias[g], ACC, PRECISION, DIAGONAL),)

        aux = auxiliary(
            candidate, scale_candidate, small, cell_clip, 0, n, at, j, mask, SMALLS, SMALLS, H, ACC, OPTIONS
        )
        new, activations = CELL(x, gh, entering, aux)
        if ZONES_H & OPTIONS:
            stay = staying(stay_h, share_h, at, j, mask, H, ACC, STAY_H, OPTIONS)
            new = (mixed(stay, entering[0], new[0]),) + new[1:]
        if ZONES_C & OPTIONS:
            stay = staying(stay_c, share_c, at, j, mask, H, ACC, STAY_C, OPTIONS)
            new = (new[0], mixed(stay, entering[1], new[1]))

        h = new[0].to(STORAGE)
        tl.store(y + (at * H)[:, None] + j[None, :], h, mask=mask)
        states = leave(
            h, new, activations, states, seq, planes, at, j, mask,
            SAVED, HAS_C, SAVE_STATES, SAVE_PLANES, STORAGE, ACC, H,
        )  # fmt: skip

    end(h_last, c_last, states, own, j, batch, HAS_C, STORAGE, H)


@triton.jit
def _d_states(  # type: ignore[no-untyped-def]
    pending, weights, carry, d_restart, came, was_reset, factor, bound,
    GATES: tl.constexpr, HAS_RESET: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """(dh as it leaves the step before, what goes to the reset state) from a step's gate gradients and its carry.

    `factor` is what that step's h was multiplied by before its product, and `bound` that of gradients; each in a tuple
    that may be empty.
    """
    total = carry
    if len(factor):
        total = tl.zeros(carry.shape, ACC)
    for g in tl.static_range(GATES):
        total = _product(pending[g], weights[g], total, ACC, PRECISION, DIAGONAL)
    if len(factor):
        total = total * factor[0] + carry
    total, d_restart = through(total, carry, d_restart, came, was_reset, HAS_RESET)
    if len(bound):
        total = tl.where(came[:, None], bounded(total, bound[0]), total)
    return total, d_restart


@triton.jit(do_not_specialize=[*_NUMBERS, "dy_row", "dy_group"])
def backward_scan(  # type: ignore[no-untyped-def]
    w, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, seq, planes, dy, dseq,
    dgx, dgh, dh0, dc0, drestart_h, drestart_c,
    keep_h, keep_step, candidate, stay_h, stay_c, small, dsmall,
    T, B, dy_row, dy_group, reset_row, reset_group, scale_h, scale_candidate, share_h, share_c, cell_clip, grad_clip,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, OPTIONS: tl.constexpr, SMALLS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    dy_row = wide(dy_row, DY_ALIGNED)
    dy_group = wide(dy_group, DY_ALIGNED)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    j = _units(BLOCK_H, DIAGONAL)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside

    weights = ()
    pending = ()  # the gate gradients of the step before in this loop; their product is made while its loads run
    for g in tl.static_range(GATES):
        if not DIAGONAL:
            square = w + (n * GATES + g) * H * H + j[:, None] * H + j[None, :]
            weights = weights + (tl.load(square, mask=(j < H)[:, None] & inside, other=0.0),)
        pending = pending + (tl.zeros((BLOCK_B, BLOCK_H), STORAGE),)
    if DIAGONAL:
        weights = _diagonal(w, n, j, GATES, H, ACC)
    zero = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    # They come holding the gradients of the final states.
    carry = read(dh0, own, j, batch, ACC, H)
    dc = zero
    if HAS_C:
        dc = read(dc0, own, j, batch, ACC, H)
    d_restart_h = zero
    d_restart_c = zero
    came = b < 0
    was_reset = b < 0
    factor = ()
    if DROPS & OPTIONS:
        scale = number(scale_h, ACC)
        factor = (zero,)
    bound = ()
    if GRAD_CLIP & OPTIONS:
        bound = (number(grad_clip, ACC),)
    sums = ()
    for _ in tl.static_range(SMALLS):
        sums = sums + (zero,)

    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    for s in range(0, steps):
        step = first + (steps - 1 - s)
        row, alive = locate(step, back, b, length, B, T, offsets, HAS_OFFSETS)
        before, went = locate(step - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        at = row * N + n
        activations = saved_activations(planes, at, j, mask, SAVED, ACC, H)
        d = tl.load(dy + (row * dy_row + n * dy_group)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
        replaced = resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)
        entering = saved_states(
            y, seq, h0, c0, restart_h, restart_c, before * N + n, own, j, inside, alive, went, replaced, zero,
            MIXES_H, HAS_C, HAS_RESTART, ACC, H,
        )  # fmt: skip
        if HAS_DSEQ:
            dc += read(dseq, at, j, mask, ACC, H)

        total, d_restart_h = _d_states(
            pending, weights, carry, d_restart_h, came, was_reset, factor, bound,
            GATES, HAS_RESET, ACC, PRECISION, DIAGONAL,
        )  # fmt: skip
        d += total
        if ZONES_H & OPTIONS:
            stay = staying(stay_h, share_h, at, j, mask, H, ACC, STAY_H, OPTIONS)
            past_h = stay * d
            d = (1.0 - stay) * d
        dstates = (d,)
        if HAS_C:
            d_cell = dc
            if ZONES_C & OPTIONS:
                stay = staying(stay_c, share_c, at, j, mask, H, ACC, STAY_C, OPTIONS)
                past_c = stay * dc
                d_cell = (1.0 - stay) * dc
            dstates = dstates + (d_cell,)
        aux = auxiliary(
            candidate, scale_candidate, small, cell_clip, 0, n, at, j, mask, SMALLS, SMALLS, H, ACC, OPTIONS
        )
        gates_x, gates_h, dentering, d_parameters = CELL(dstates, activations, entering, aux)
        if ZONES_H & OPTIONS:
            dentering = (dentering[0] + past_h,) + dentering[1:]
        if ZONES_C & OPTIONS:
            dentering = (dentering[0], dentering[1] + past_c)
        if SMALL & OPTIONS:
            added = ()
            for k in tl.static_range(SMALLS):
                added = added + (sums[k] + tl.where(mask, d_parameters[k], 0.0),)
            sums = added

        place = (at * (GATES * H))[:, None] + j[None, :]
        now = ()
        for g in tl.static_range(GATES):
            tl.store(dgx + place + g * H, gates_x[g].to(STORAGE), mask=mask)
            rounded = gates_h[g].to(STORAGE)
            if SPLIT:
                tl.store(dgh + place + g * H, rounded, mask=mask)
            now = now + (tl.where(mask, rounded, pending[g]),)
        pending = now
        carry, dc, d_restart_c = d_leave(
            dentering, total, dc, d_restart_c, replaced, mask, zero, bound, MIXES_H, HAS_C, HAS_RESET
        )
        if DROPS & OPTIONS:
            factor = (dropped(zero + scale, keep_h, keep_step, own, at, j, mask, H, ACC, OPTIONS),)
        came = alive
        was_reset = replaced

    total, d_restart_h = _d_states(
        pending, weights, carry, d_restart_h, came, was_reset, factor, bound,
        GATES, HAS_RESET, ACC, PRECISION, DIAGONAL,
    )  # fmt: skip
    for k in tl.static_range(SMALLS):
        tl.store(dsmall + (((n * SMALLS + k) * B + b) * H)[:, None] + j[None, :], sums[k], mask=batch)
    end(dh0, dc0, (total, dc), own, j, batch, HAS_C, STORAGE, H)
    if HAS_RESTART:
        end(drestart_h, drestart_c, (d_restart_h, d_restart_c), own, j, batch, HAS_C, STORAGE, H)
