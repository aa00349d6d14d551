"""A whole scan in one launch whose programs keep their weights on the chip and hand states to each other.

A program has BLOCK_H units of BLOCK_B rows of a group for all steps. What it needs of other programs' units (forward h,
backward the gate gradients) it reads from memory when it has come (exchange.py); programs of other rows or groups it
never waits for. All programs of the same rows walk the same steps, so whoever is waited for does come.

What is handed over is read, and its product made, in PARTS of powers of two, H = 768 as 512 + 256 and not as 1024; and
each part in SLICES beside each other, one for a warp, whose sums are added up in the end.

Where the elements of a tile lie is Triton's choice here. TILE, WEIGHTS and PRODUCTS are what knows of it, so that the
same walk can be compiled as Gluon, where it is the kernel's (gluon_kernels.py).
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton.exchange import collect, hand_over
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
from rnnkern.cells.triton_math import zeros_like

# No kernel is compiled anew for these.
NUMBERS = ["T", "B", "gx_row", "gx_group", "dy_row", "dy_group", "reset_row", "reset_group", "patience"]


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    w, j, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SLICES: tl.constexpr,
    STEP_K: tl.constexpr, STEP_J: tl.constexpr,
):  # fmt: skip
    """[slices, width, BLOCK_H] of the part of W from START on."""
    WIDTH: tl.constexpr = max(16, SIZE // SLICES)
    k = START + tl.arange(0, SIZE // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    j = j[None, None, :]
    return tl.load(w + k * STEP_K + j * STEP_J, mask=(k < K) & (j < H), other=0.0)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    rows, needed, waits, patience, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr,
    STORAGE: tl.constexpr, WORD: tl.constexpr, RELAXED: tl.constexpr,
):  # fmt: skip
    """([slices, BLOCK_B, width] of rows from START on, patience)"""
    WIDTH: tl.constexpr = max(16, SIZE // SLICES)
    EACH: tl.constexpr = WORD.primitive_bitwidth // STORAGE.primitive_bitwidth
    first = (START + tl.arange(0, SIZE // WIDTH) * WIDTH) // EACH
    k = first[:, None, None] + tl.arange(0, WIDTH // EACH)[None, None, :]
    words = rows.to(tl.pointer_type(WORD))[None, :, None] + k
    inside = k < K // EACH
    return collect(words, needed[None, :, None] & inside, waits[None, :, None] & inside, patience, STORAGE, RELAXED)


@triton.jit
def tile(BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and units of a tile, counted from its first."""
    return tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_H)


@triton.jit
def weights(  # type: ignore[no-untyped-def]
    w, first, COUNT: tl.constexpr, STARTS: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    STEP_K: tl.constexpr, STEP_J: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr, STORAGE: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """What every part is multiplied with for each of COUNT sums, parts first; for units from `first` on."""
    j = first + tl.arange(0, BLOCK_H)
    found = ()
    for p in tl.static_range(len(PARTS)):
        for g in tl.static_range(COUNT):
            found = found + (_weights(w + g * K * H, j, STARTS[p], PARTS[p], K, H, SLICES, STEP_K, STEP_J),)
    return found


@triton.jit
def products(  # type: ignore[no-untyped-def]
    rows, needed, waits, patience, held, sums, STARTS: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr,
    SLICES: tl.constexpr, STORAGE: tl.constexpr, WORD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    RELAXED: tl.constexpr,
):  # fmt: skip
    """(`sums` and what rows, as far as they are `needed`, give with the weights that are held, patience)"""
    for p in tl.static_range(len(PARTS)):
        part, patience = _part(rows, needed, waits, patience, STARTS[p], PARTS[p], K, SLICES, STORAGE, WORD, RELAXED)
        larger = ()
        for g in tl.static_range(len(sums)):
            product = tl.dot(part, held[p * len(sums) + g], input_precision=PRECISION, out_dtype=ACC)
            larger = larger + (sums[g] + tl.sum(product, axis=0),)
        sums = larger
    return sums, patience


@triton.jit
def _spoil(base, rows, j, mask, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """NaN in whole rows."""
    for first in range(0, WIDTH, BLOCK_H):
        k = (first + j % BLOCK_H)[None, :]
        there = mask[:, None] & (k < WIDTH)
        nan = tl.where(there, float("nan"), 0.0).to(base.dtype.element_ty)
        tl.store(base + (rows * WIDTH)[:, None] + k, nan, mask=there)


@triton.jit(do_not_specialize=NUMBERS)
def forward_together(  # type: ignore[no-untyped-def]
    gx, w, bias, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, h_last, c_last, seq, planes, lost,
    T, B, gx_row, gx_group, reset_row, reset_group, patience,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, SAVE_STATES: tl.constexpr, SAVE_PLANES: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, GX_ALIGNED: tl.constexpr,
    STARTS: tl.constexpr, PARTS: tl.constexpr, WORD: tl.constexpr, RELAXED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr,
    TILE: tl.constexpr, WEIGHTS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b, j = TILE(BLOCK_B, BLOCK_H, SLICES)
    b += tl.program_id(1).to(tl.int64) * BLOCK_B
    j += tl.program_id(0) * BLOCK_H
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    gx_row = wide(gx_row, GX_ALIGNED)
    gx_group = wide(gx_group, GX_ALIGNED)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside

    held = WEIGHTS(
        w + n * GATES * H * H, tl.program_id(0) * BLOCK_H, GATES,
        STARTS, PARTS, H, H, 1, H, BLOCK_H, SLICES, STORAGE, WORD,
    )  # fmt: skip
    gate_bias = biases(bias, n, j, batch, GATES, HAS_BIAS, ACC, H)
    states = initial(h0, c0, own, j, batch, HAS_C, ACC, H)

    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    before = b
    went = b < 0
    s = steps * 0
    while (s < steps) & (patience > 0):
        row, alive = locate(first + s, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        x = gate_inputs(gx, row * gx_row + n * gx_group, j, mask, GATES, ACC, H)
        replaced = resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)
        entering = after_resets(
            states, replaced, restart_h, restart_c, own, j, batch, HAS_C, HAS_RESET, HAS_RESTART, ACC, H
        )
        # Rows of h as the product takes them: of the step before, or of the states that a row begins with.
        rows = tl.where(went, y + (before * N + n) * H, h0 + own * H)
        needed = alive
        if HAS_RESTART:
            rows = tl.where(replaced, restart_h + own * H, rows)
        elif HAS_RESET:
            needed = alive & (replaced == 0)
        waits = alive & went & (replaced == 0)
        gh, patience = PRODUCTS(
            rows, needed, waits, patience, held, gate_bias,
            STARTS, PARTS, H, SLICES, STORAGE, WORD, ACC, PRECISION, RELAXED,
        )  # fmt: skip

        new, activations = CELL(x, gh, entering, ((), (), (), ()))

        h = new[0].to(STORAGE)
        at = row * N + n
        hand_over(y + (at * H)[:, None] + j[None, :], h, mask, RELAXED)
        states = leave(
            h, new, activations, states, seq, planes, at, j, mask,
            SAVED, HAS_C, SAVE_STATES, SAVE_PLANES, STORAGE, ACC, H,
        )  # fmt: skip
        before = row
        went = alive
        s += 1

    if patience > 0:
        end(h_last, c_last, states, own, j, batch, HAS_C, STORAGE, H)
    else:  # a partner was lost: its units, too, become NaN from the step on that it did not come to
        tl.store(lost, 1)
        for late in range(tl.maximum(s - 2, 0), steps):
            row, alive = locate(first + late, back, b, length, B, T, offsets, HAS_OFFSETS)
            _spoil(y, row * N + n, j, alive, H, BLOCK_H)
            if HAS_C and SAVE_STATES:
                _spoil(seq, row * N + n, j, alive, H, BLOCK_H)
            if SAVE_PLANES:
                _spoil(planes, row * N + n, j, alive, SAVED * H, BLOCK_H)
        _spoil(h_last, own, j, b < B, H, BLOCK_H)
        if HAS_C:
            _spoil(c_last, own, j, b < B, H, BLOCK_H)


@triton.jit
def _d_states(  # type: ignore[no-untyped-def]
    rows, came, held, carry, d_restart, was_reset, patience, PRODUCTS: tl.constexpr,
    K: tl.constexpr, STARTS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, HAS_RESET: tl.constexpr,
    STORAGE: tl.constexpr, WORD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, RELAXED: tl.constexpr,
):  # fmt: skip
    """(dh as it leaves the step before, what goes to the reset state, patience) from a step's gate gradients and its
    carry."""
    sums, patience = PRODUCTS(
        rows, came, came, patience, held, (carry,), STARTS, PARTS, K, SLICES, STORAGE, WORD, ACC, PRECISION, RELAXED
    )
    total, d_restart = through(sums[0], carry, d_restart, came, was_reset, HAS_RESET)
    return total, d_restart, patience


@triton.jit(do_not_specialize=NUMBERS)
def backward_together(  # type: ignore[no-untyped-def]
    w, h0, c0, restart_h, restart_c, reset, lengths, offsets, y, seq, planes, dy, dseq,
    dgx, dgh, dh0, dc0, drestart_h, drestart_c, lost,
    T, B, dy_row, dy_group, reset_row, reset_group, patience,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HAS_C: tl.constexpr, MIXES_H: tl.constexpr,
    SPLIT: tl.constexpr, HAS_DSEQ: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    PERIOD: tl.constexpr, REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_RESTART: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DY_ALIGNED: tl.constexpr,
    STARTS: tl.constexpr, PARTS: tl.constexpr, WORD: tl.constexpr, RELAXED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SLICES: tl.constexpr,
    TILE: tl.constexpr, WEIGHTS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b, j = TILE(BLOCK_B, BLOCK_H, SLICES)
    b += tl.program_id(1).to(tl.int64) * BLOCK_B
    j += tl.program_id(0) * BLOCK_H
    T = T.to(tl.int64)
    B = B.to(tl.int64)
    dy_row = wide(dy_row, DY_ALIGNED)
    dy_group = wide(dy_group, DY_ALIGNED)
    back = walks_back(n, PERIOD, REVERSE)
    length = lengths_of(b, B, T, lengths, HAS_LENGTHS)
    inside = (j < H)[None, :]
    own = n * B + b
    batch = (b < B)[:, None] & inside
    K: tl.constexpr = GATES * H  # dgh is as wide, and W as high

    held = WEIGHTS(
        w + n * K * H, tl.program_id(0) * BLOCK_H, 1, STARTS, PARTS, K, H, H, 1, BLOCK_H, SLICES, STORAGE, WORD
    )
    zero = zeros_like(batch).to(ACC)
    # They come holding the gradients of the final states.
    carry = read(dh0, own, j, batch, ACC, H)
    dc = zero
    if HAS_C:
        dc = read(dc0, own, j, batch, ACC, H)
    d_restart_h = zero
    d_restart_c = zero
    came = b < 0
    was_reset = b < 0
    after = b  # rows of the step before in this loop, which is the step after

    steps = tl.max(length)
    first = tl.where(back, T - steps, 0)
    s = steps
    while (s > 0) & (patience > 0):
        s -= 1
        row, alive = locate(first + s, back, b, length, B, T, offsets, HAS_OFFSETS)
        before, went = locate(first + s - 1, back, b, length, B, T, offsets, HAS_OFFSETS)
        mask = alive[:, None] & inside
        at = row * N + n
        activations = saved_activations(planes, at, j, mask, SAVED, ACC, H)
        given = tl.load(dy + (row * dy_row + n * dy_group)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
        replaced = resets(reset, reset_row, reset_group, row, n, alive, HAS_RESET)
        entering = saved_states(
            y, seq, h0, c0, restart_h, restart_c, before * N + n, own, j, inside, alive, went, replaced, zero,
            MIXES_H, HAS_C, HAS_RESTART, ACC, H,
        )  # fmt: skip
        if HAS_DSEQ:
            dc += read(dseq, at, j, mask, ACC, H)

        total, d_restart_h, patience = _d_states(
            dgh + (after * N + n) * K, came, held, carry, d_restart_h, was_reset, patience, PRODUCTS,
            K, STARTS, PARTS, SLICES, HAS_RESET, STORAGE, WORD, ACC, PRECISION, RELAXED,
        )  # fmt: skip
        dstates = (total + given,)
        if HAS_C:
            dstates = dstates + (dc,)
        gates_x, gates_h, dentering, _ = CELL(dstates, activations, entering, ((), (), (), ()))

        place = (at * K)[:, None] + j[None, :]
        for g in tl.static_range(GATES):
            hand_over(dgh + place + g * H, gates_h[g].to(STORAGE), mask, RELAXED)
            if SPLIT:
                tl.store(dgx + place + g * H, gates_x[g].to(STORAGE), mask=mask)
        carry, dc, d_restart_c = d_leave(
            dentering, total, dc, d_restart_c, replaced, mask, zero, (), MIXES_H, HAS_C, HAS_RESET
        )
        came = alive
        was_reset = replaced
        after = row

    total, d_restart_h, patience = _d_states(
        dgh + (after * N + n) * K, came, held, carry, d_restart_h, was_reset, patience, PRODUCTS,
        K, STARTS, PARTS, SLICES, HAS_RESET, STORAGE, WORD, ACC, PRECISION, RELAXED,
    )  # fmt: skip
    if patience > 0:
        end(dh0, dc0, (total, dc), own, j, batch, HAS_C, STORAGE, H)
        if HAS_RESTART:
            end(drestart_h, drestart_c, (d_restart_h, d_restart_c), own, j, batch, HAS_C, STORAGE, H)
    else:
        tl.store(lost, 1)
        for late in range(0, tl.minimum(s + 2, steps)):
            row, alive = locate(first + late, back, b, length, B, T, offsets, HAS_OFFSETS)
            _spoil(dgh, row * N + n, j, alive, K, BLOCK_H)
            if SPLIT:
                _spoil(dgx, row * N + n, j, alive, K, BLOCK_H)
        _spoil(dh0, own, j, b < B, H, BLOCK_H)
        if HAS_RESTART:
            _spoil(drestart_h, own, j, b < B, H, BLOCK_H)
        if HAS_C:
            _spoil(dc0, own, j, b < B, H, BLOCK_H)
            if HAS_RESTART:
                _spoil(drestart_c, own, j, b < B, H, BLOCK_H)
