"""A whole scan in one launch, for small H: a program has some rows of a group, all its units and all its steps.

The weights are read once, states stay in registers, and no program waits for another. Sizes that are no powers of two
are padded in the tiles and not in memory.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton.places import lengths_of, locate, walks_back


@triton.jit
def _resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS_RESET:
        return tl.load(reset + row * reset_row + n * reset_group, mask=alive, other=0) != 0
    else:
        return row < 0


@triton.jit
def _read(base, rows, j, mask, ACC: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B, BLOCK_H] rows of a tensor that is H wide."""
    return tl.load(base + (rows * H)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["T", "B", "gx_row", "gx_group", "reset_row", "reset_group"])
def forward_scan(  # type: ignore[no-untyped-def]
    gx, w, bias, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, h_last, c_last, seq, planes,
    T, B, gx_row, gx_group, reset_row, reset_group,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, GX_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    gx_row = gx_row.to(tl.int64)
    gx_group = gx_group.to(tl.int64)
    if GX_ALIGNED:
        gx_row = tl.multiple_of(gx_row, 16)
        gx_group = tl.multiple_of(gx_group, 16)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    j = tl.arange(0, BLOCK_H)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside

    weights = ()
    gate_bias = ()
    for g in tl.static_range(GATES):
        square = w + (n * GATES + g) * H * H + j[None, :] * H + j[:, None]
        weights = weights + (tl.load(square, mask=(j < H)[:, None] & inside, other=0.0),)
        start = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        if HAS_BIAS:
            start += tl.load(bias + (n * GATES + g) * H + j, mask=j < H, other=0.0).to(ACC)[None, :]
        gate_bias = gate_bias + (start,)
    states = (_read(h0, own, j, batch, ACC, H),)
    if HAS_C:
        states = states + (_read(c0, own, j, batch, ACC, H),)

    # A tile's rows may all end early: its walk has only the steps that one of them has.
    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    for s in range(0, steps):
        row, alive = locate(first + s, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        source = gx + (row * gx_row + n * gx_group)[:, None] + j[None, :]
        x = ()
        for g in tl.static_range(GATES):
            x = x + (tl.load(source + g * H, mask=mask, other=0.0).to(ACC),)
        entering = states
        if HAS_RESET:
            replaced = _resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)[:, None]
            if HAS_RESTART:
                entering = (tl.where(replaced, _read(restart_h, own, j, batch, ACC, H), states[0]),)
                if HAS_C:
                    entering = entering + (tl.where(replaced, _read(restart_c, own, j, batch, ACC, H), states[1]),)
            else:
                entering = (tl.where(replaced, 0.0, states[0]),)
                if HAS_C:
                    entering = entering + (tl.where(replaced, 0.0, states[1]),)
        h = entering[0].to(STORAGE)
        gh = ()
        for g in tl.static_range(GATES):
            gh = gh + (tl.dot(h, weights[g], gate_bias[g], input_precision=PRECISION, out_dtype=ACC),)

        new, activations = CELL(x, gh, entering)

        h = new[0].to(STORAGE)
        at = row * N + n
        tl.store(y + (at * H)[:, None] + j[None, :], h, mask=mask)
        states_now = (tl.where(mask, h.to(ACC), states[0]),)  # what is past H stays 0, whatever the cell makes of it
        if HAS_C:
            states_now = states_now + (tl.where(mask, new[1], states[1]),)
            if SAVE_STATES:
                tl.store(seq + (at * H)[:, None] + j[None, :], new[1], mask=mask)
        states = states_now
        if SAVE_PLANES:
            for q in tl.static_range(SAVED):
                place = planes + ((at * SAVED + q) * H)[:, None] + j[None, :]
                tl.store(place, activations[q].to(STORAGE), mask=mask)

    ends = (own * H)[:, None] + j[None, :]
    tl.store(h_last + ends, states[0].to(STORAGE), mask=batch)
    if HAS_C:
        tl.store(c_last + ends, states[1], mask=batch)


@triton.jit
def _d_states(  # type: ignore[no-untyped-def]
    pending, weights, carry, d_restart, came, was_reset,
    GATES: tl.constexpr, HAS_RESET: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dh as it leaves the step before, what goes to the reset state) from a step's gate gradients and its carry."""
    total = carry
    for g in tl.static_range(GATES):
        total = tl.dot(pending[g], weights[g], total, input_precision=PRECISION, out_dtype=ACC)
    total = tl.where(came[:, None], total, carry)  # with NaN in W, the product of nothing is not 0
    if HAS_RESET:
        d_restart = tl.where(was_reset[:, None], d_restart + total, d_restart)
        total = tl.where(was_reset[:, None], 0.0, total)
    return total, d_restart


@triton.jit(do_not_specialize=["T", "B", "dy_row", "dy_group", "reset_row", "reset_group"])
def backward_scan(  # type: ignore[no-untyped-def]
    w, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, seq, planes, dy, dseq,
    dgx, dgh, dh0, dc0, drestart_h, drestart_c,
    T, B, dy_row, dy_group, reset_row, reset_group,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DY_ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    dy_row = dy_row.to(tl.int64)
    dy_group = dy_group.to(tl.int64)
    if DY_ALIGNED:
        dy_row = tl.multiple_of(dy_row, 16)
        dy_group = tl.multiple_of(dy_group, 16)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    j = tl.arange(0, BLOCK_H)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside

    weights = ()
    pending = ()  # the gate gradients of the step before in this loop; their product is made while its loads run
    for g in tl.static_range(GATES):
        square = w + (n * GATES + g) * H * H + j[:, None] * H + j[None, :]
        weights = weights + (tl.load(square, mask=(j < H)[:, None] & inside, other=0.0),)
        pending = pending + (tl.zeros((BLOCK_B, BLOCK_H), STORAGE),)
    zero = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    # They come holding the gradients of the final states.
    carry = _read(dh0, own, j, batch, ACC, H)
    dc = zero
    if HAS_C:
        dc = _read(dc0, own, j, batch, ACC, H)
    d_restart_h = zero
    d_restart_c = zero
    came = b < 0
    was_reset = b < 0

    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    for s in range(0, steps):
        step = first + (steps - 1 - s)
        row, alive = locate(step, back, b, length, B, T, offsets, HAS_OFFSETS)
        before, went = locate(step - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        at = row * N + n
        activations = ()
        for q in tl.static_range(SAVED):
            place = planes + ((at * SAVED + q) * H)[:, None] + j[None, :]
            activations = activations + (tl.load(place, mask=mask, other=0.0).to(ACC),)
        d = tl.load(dy + (row * dy_row + n * dy_group)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
        replaced = _resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)
        there = went & (replaced == 0)
        start = alive & (went == 0) & (replaced == 0)
        entering = (zero,)
        if MIXES_H:
            h = _read(y, before * N + n, j, there[:, None] & inside, ACC, H)
            h += _read(h0, own, j, start[:, None] & inside, ACC, H)
            if HAS_RESTART:
                h += _read(restart_h, own, j, replaced[:, None] & inside, ACC, H)
            entering = (h,)
        dstates = (d,)
        if HAS_C:
            c = _read(seq, before * N + n, j, there[:, None] & inside, ACC, H)
            c += _read(c0, own, j, start[:, None] & inside, ACC, H)
            if HAS_RESTART:
                c += _read(restart_c, own, j, replaced[:, None] & inside, ACC, H)
            entering = entering + (c,)
            if HAS_DSEQ:
                dc += _read(dseq, at, j, mask, ACC, H)

        total, d_restart_h = _d_states(
            pending, weights, carry, d_restart_h, came, was_reset, GATES, HAS_RESET, ACC, PRECISION
        )
        dstates = (total + d,)
        if HAS_C:
            dstates = dstates + (dc,)
        gates_x, gates_h, dentering = CELL(dstates, activations, entering)

        place = (at * (GATES * H))[:, None] + j[None, :]
        now = ()
        for g in tl.static_range(GATES):
            tl.store(dgx + place + g * H, gates_x[g].to(STORAGE), mask=mask)
            rounded = gates_h[g].to(STORAGE)
            if SPLIT:
                tl.store(dgh + place + g * H, rounded, mask=mask)
            now = now + (tl.where(mask, rounded, pending[g]),)
        pending = now
        left = zero
        if MIXES_H:
            left = dentering[0]
        carry = tl.where(mask, left, total)
        came = alive
        was_reset = replaced
        if HAS_C:
            left = dentering[1]
            if HAS_RESET:
                d_restart_c = tl.where(replaced[:, None], d_restart_c + left, d_restart_c)
                left = tl.where(replaced[:, None], 0.0, left)
            dc = tl.where(mask, left, dc)

    total, d_restart_h = _d_states(
        pending, weights, carry, d_restart_h, came, was_reset, GATES, HAS_RESET, ACC, PRECISION
    )
    ends = (own * H)[:, None] + j[None, :]
    tl.store(dh0 + ends, total.to(STORAGE), mask=batch)
    if HAS_RESTART:
        tl.store(drestart_h + ends, d_restart_h.to(STORAGE), mask=batch)
    if HAS_C:
        tl.store(dc0 + ends, dc, mask=batch)
        if HAS_RESTART:
            tl.store(drestart_c + ends, d_restart_c, mask=batch)
