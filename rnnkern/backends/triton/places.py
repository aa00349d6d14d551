"""Where things lie: the device-side half of the contract's layouts, shared by both drivers.

A group walks its steps in its own order: step w of the walk is time w, or T-1-w for a reverse group. Rows take part
only in the steps that they have, so every question is asked as "which row is batch row b at step w, and is it there".
Row numbers are 64-bit, and so is every offset made from them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The table of a per-step scan: addresses and sizes, a 64-bit word each. "step" is 0 at first and moved on by every graph
# of steps; a kernel's own step is that plus its launch argument.
NAMES = (
    "step", "T", "B",
    "gx", "gx_row", "gx_group", "w", "bias", "w_hr",
    "h0", "c0", "restart_h", "restart_c", "reset", "reset_row", "reset_group", "lengths", "offsets",
    "y", "h_last", "c_last", "seq", "planes", "hidden",
    "dy", "dy_row", "dy_group", "dseq", "dgx", "dgh", "dh", "carry", "dh0", "dc0", "drestart_h", "drestart_c",
)  # fmt: skip
(
    STEP, STEPS, BATCH,
    GX, GX_ROW, GX_GROUP, W, BIAS, W_HR,
    H0, C0, RESTART_H, RESTART_C, RESET, RESET_ROW, RESET_GROUP, LENGTHS, OFFSETS,
    Y, H_LAST, C_CARRY, SEQ, PLANES, HIDDEN,
    DY, DY_ROW, DY_GROUP, DSEQ, DGX, DGH, DH, CARRY, DH0, DC0, DRESTART_H, DRESTART_C,
) = (tl.constexpr(k) for k in range(len(NAMES)))  # fmt: skip


@triton.jit
def walks_back(n, PERIOD: tl.constexpr, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether group n walks from the end: bit n % PERIOD of REVERSE."""
    return ((REVERSE >> (n % PERIOD)) & 1) == 1


@triton.jit
def lengths_of(b, B, T, lengths, HAS_LENGTHS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_B] how many steps each batch row has; rows past B have none."""
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths + b, mask=b < B, other=0), T)
    else:
        return tl.where(b < B, T, 0)


@triton.jit
def locate(w, back, b, length, B, T, offsets, HAS_OFFSETS: tl.constexpr):  # type: ignore[no-untyped-def]
    """([BLOCK_B] rows of step w of the walk, [BLOCK_B] whether they are there); w may be -1 or T."""
    t = tl.where(back, T - 1 - w, w)
    if HAS_OFFSETS:
        start = tl.load(offsets + t, mask=(t >= 0) & (t < T), other=0)
    else:
        start = t * B
    return start + b, (t < length) & (length * 0 <= t)


@triton.jit
def pointer(table, SLOT: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address in a slot of the table as a pointer; ALIGNED promises 16 bytes, which loads need to be wide."""
    found = tl.load(table + SLOT).to(tl.pointer_type(TYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found  # said of the pointer: of the number it would be lost


@triton.jit
def stride(table, SLOT: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    size = tl.load(table + SLOT)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit(do_not_specialize=["words"])
def write_table(table, words, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses as launch arguments and not as memory of the host, so that a caller's CUDA graph may record it."""
    for k in tl.static_range(COUNT):
        tl.store(table + k, (words[k] - (1 << 62)) >> 1)


def word(value: int) -> int:
    """A word as `write_table` takes it. Triton compiles anew for 1, for multiples of 16 and for what fits 32 bits, in
    tuples whatever is asked: this is none of them."""
    return (value << 1) + 1 + (1 << 62)


@triton.jit(do_not_specialize=["count"])
def advance(table, count):  # type: ignore[no-untyped-def]
    """The end of a run of `count` steps."""
    tl.store(table + STEP, tl.load(table + STEP) + count)
