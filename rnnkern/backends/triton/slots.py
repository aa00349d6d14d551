"""The table that a per-step scan's kernels find everything in: addresses and sizes, a 64-bit word each.

"step" is 0 at first and moved on by every graph of steps; a kernel's own step is that plus its launch argument.

Of what there is for each state beyond h, SEQ[k] is the word of the k-th. A table is as long as the states of its cell
need: the words of a second state beyond h, and of others, are its last.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from rnnkern.cells import CELLS

_NAMES = (
    "step", "T", "B",
    "gx", "gx_row", "gx_group", "w", "bias", "w_hr",
    "h0", "c0", "restart_h", "restart_c", "reset", "reset_row", "reset_group", "lengths", "offsets",
    "y", "h_last", "c_last", "seq", "planes", "hidden",
    "dy", "dy_row", "dy_group", "dseq", "dgx", "dgh", "dh", "carry", "dh0", "dc0", "drestart_h", "drestart_c",
    "keep_h", "keep_step", "candidate", "stay_h", "stay_c", "small", "dsmall", "within",
    "gain_h", "product", "normed", "norm_scales", "dprod", "dhidden",
    "scale_h", "scale_candidate", "share_h", "share_c", "cell_clip", "proj_clip", "grad_clip", "eps",
)  # fmt: skip
_OF_STATES = ("c0", "restart_c", "c_last", "seq", "dseq", "dc0", "drestart_c")
_MOST = max(len(cell.states) for cell in CELLS.values()) - 1


@cache
def each(name: str) -> tuple[str, ...]:
    """The names of a word that there is for each state beyond h."""
    return name, *(f"{name}_{k}" for k in range(1, _MOST))


@cache
def names_of(states: int) -> tuple[str, ...]:
    """The words of a table for a cell with so many states beyond h."""
    return _NAMES + tuple(each(name)[k] for k in range(1, states) for name in _OF_STATES)


NAMES = names_of(_MOST)
# What a kernel was compiled to is looked up by its source and by the constants that its functions name. Words that they
# take from this module, as slots.Y, are none of these: without the order kernels of another one would be found.
_ORDER = tl.constexpr(NAMES)


def _place(name: str) -> tl.constexpr:
    return tl.constexpr(tuple(map(NAMES.index, each(name))) if name in _OF_STATES else NAMES.index(name))


(
    STEP, STEPS, BATCH,
    GX, GX_ROW, GX_GROUP, W, BIAS, W_HR,
    H0, C0, RESTART_H, RESTART_C, RESET, RESET_ROW, RESET_GROUP, LENGTHS, OFFSETS,
    Y, H_LAST, C_CARRY, SEQ, PLANES, HIDDEN,
    DY, DY_ROW, DY_GROUP, DSEQ, DGX, DGH, DH, CARRY, DH0, DC0, DRESTART_H, DRESTART_C,
    KEEP_H, KEEP_STEP, CANDIDATE, STAY_H, STAY_C, SMALL, DSMALL, WITHIN,
    GAIN_H, PRODUCT, NORMED, NORM_SCALES, DPROD, DHIDDEN,
    SCALE_H, SCALE_CANDIDATE, SHARE_H, SHARE_C, CELL_CLIP, PROJ_CLIP, GRAD_CLIP, EPS,
) = map(_place, _NAMES)  # fmt: skip


@triton.jit
def pointer(table, SLOT: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address in a slot of the table as a pointer; ALIGNED promises 16 bytes, which loads need to be wide."""
    tl.static_assert(_ORDER[SLOT] != "step")  # no address
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
