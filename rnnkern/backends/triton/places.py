"""Where things lie: the device-side half of the contract's layouts, shared by both drivers.

A group walks its steps in its own order: step w of the walk is time w, or T-1-w for a reverse group. Rows take part
only in the steps that they have, so every question is asked as "which row is batch row b at step w, and is it there".
Row numbers are 64-bit, and so is every offset made from them.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
