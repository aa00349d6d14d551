"""What the kernels of a step have in common: where they are, and what of the table they read."""

# mypy: disable-error-code="assignment, misc"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.backends.triton import slots
from rnnkern.backends.triton.options import auxiliary, dropped, number, staying
from rnnkern.backends.triton.places import lengths_of, walks_back
from rnnkern.backends.triton.slots import pointer


@triton.jit
def at_step(table, i, BLOCK_B: tl.constexpr, PERIOD: tl.constexpr, REVERSE: tl.constexpr, HAS_LENGTHS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's step of the walk, group and rows: (s, T, B, n, back, b, length)."""
    T = tl.load(table + slots.STEPS)
    B = tl.load(table + slots.BATCH)
    n = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    length = lengths_of(b, B, T, pointer(table, slots.LENGTHS, tl.int64, False), HAS_LENGTHS)
    return tl.load(table + slots.STEP) + i, T, B, n, walks_back(n, PERIOD, REVERSE), b, length


@triton.jit
def resets_of(table, row, n, alive, HAS_RESET: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B] which rows' entering states are replaced."""
    if HAS_RESET:
        at = row * tl.load(table + slots.RESET_ROW) + n * tl.load(table + slots.RESET_GROUP)
        return tl.load(pointer(table, slots.RESET, tl.int32, False) + at, mask=alive, other=0) != 0
    else:
        return row < 0


@triton.jit
def entering_of(  # type: ignore[no-untyped-def]
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
        reset = resets_of(table, row, n, alive, HAS_RESET)
        if HAS_RESTART:
            source = tl.where(reset, pointer(table, RESTART, TYPE, ALIGNED) + own, source)
        else:
            alive = alive & (reset == 0)
    return source, alive


@triton.jit
def number_of(table, SLOT: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    return number(tl.load(table + SLOT), ACC)


@triton.jit
def dropped_of(  # type: ignore[no-untyped-def]
    table, h, own, at, j, mask,
    P: tl.constexpr, STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """What recurrent dropout leaves of h, or of a gradient of it, not yet scaled."""
    keep_h = pointer(table, slots.KEEP_H, STORAGE, ALIGNED)
    keep_step = pointer(table, slots.KEEP_STEP, STORAGE, ALIGNED)
    return dropped(h, keep_h, keep_step, own, at, j, mask, P, ACC, OPTIONS)


@triton.jit
def staying_of(  # type: ignore[no-untyped-def]
    table, at, j, mask,
    SLOT: tl.constexpr, SHARE: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    share = tl.load(table + SHARE)
    return staying(pointer(table, SLOT, STORAGE, ALIGNED), share, at, j, mask, WIDTH, ACC, MASKED, OPTIONS)


@triton.jit
def auxiliary_of(  # type: ignore[no-untyped-def]
    table, n, at, j, mask, SMALLS: tl.constexpr, PEEPS: tl.constexpr, H: tl.constexpr,
    STORAGE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    candidate = pointer(table, slots.CANDIDATE, STORAGE, ALIGNED)
    small = pointer(table, slots.SMALL, STORAGE, ALIGNED)
    scale = tl.load(table + slots.SCALE_CANDIDATE)
    clip = tl.load(table + slots.CELL_CLIP)
    eps = tl.load(table + slots.EPS)
    return auxiliary(candidate, scale, small, clip, eps, n, at, j, mask, SMALLS, PEEPS, H, ACC, OPTIONS)


@triton.jit
def bias_tiles(  # type: ignore[no-untyped-def]
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
