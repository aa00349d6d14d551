"""Values that are their own flags: how programs of one launch hand rows to each other through memory.

Memory that is to be handed over holds SENTINEL, a NaN, in every element before the launch. A consumer reads what it
needs again and again until no sentinel is left, so there is no counter, no fence and no order of stores to rely on. A
producer replaces a NaN of just that pattern by another, for else its consumers would wait for ever.

Reads and writes are relaxed and at the GPU's scope: never served by a stale first-level cache, never elided, whole for
every element. In PTX that is inline assembly; elsewhere (HIP, Triton's interpreter) volatile loads and plain stores.
Rows are read by words of up to eight bytes, for assembly takes one element at a time.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

SENTINEL = tl.constexpr(-1)  # all bits set, in integers of the elements' width
MISSING = -1  # the same for the host
_NAN_16, _NAN_32 = tl.constexpr(0x7FFF), tl.constexpr(0x7FFFFFFF)  # what a GPU makes itself: NaN in fp32, fp16 and bf16


@triton.jit
def _read(words, mask, RELAXED: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 where not `mask`."""
    BYTES: tl.constexpr = words.dtype.element_ty.primitive_bitwidth // 8
    if RELAXED and BYTES == 8:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b64 $0, 0; @p ld.relaxed.gpu.global.b64 $0, [$1];}",
            "=&l,l,r", [words, mask.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    elif RELAXED and BYTES == 4:
        return tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.gpu.global.b32 $0, [$1];}",
            "=&r,l,r", [words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # rows of an odd number of 16-bit elements, too: in PTX volatile is relaxed at a wider scope
        return tl.load(words, mask=mask, other=0, volatile=True)


@triton.jit
def _integer(TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.int16 if TYPE.primitive_bitwidth == 16 else tl.int32


@triton.jit
def _elements(words, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[..., W] words as a tuple of [..., W] integers of the elements' width, in memory's order (little-endian)."""
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    EACH: tl.constexpr = words.dtype.primitive_bitwidth // BITS
    INT: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    found = ()
    for e in tl.static_range(EACH):
        found = found + ((words >> (e * BITS)).to(INT),)
    return found


@triton.jit
def _missing(words, waits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether one of the elements that are waited for has not come, as a number."""
    # A word at once, which needs fewer registers than to take it apart. Elements of ones only are zeros of its
    # complement; with one less in each of these, such a zero (of several, the lowest) turns the element's highest bit.
    ONES: tl.constexpr = ((1 << words.dtype.primitive_bitwidth) - 1) // ((1 << TYPE.primitive_bitwidth) - 1)
    HIGHEST: tl.constexpr = (ONES << (TYPE.primitive_bitwidth - 1)) - (1 << words.dtype.primitive_bitwidth)
    found = ((-1 - ONES - words) & words & HIGHEST) != 0
    return tl.max(tl.ravel((found & waits).to(tl.int32)), axis=0)


@triton.jit
def _together(words, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[C, B, W] words as [C, B, W * elements of a word] values."""
    each = _elements(words, TYPE)
    EACH: tl.constexpr = words.dtype.primitive_bitwidth // TYPE.primitive_bitwidth
    if EACH == 4:
        found = tl.join(tl.join(each[0], each[2]), tl.join(each[1], each[3]))
    elif EACH == 2:
        found = tl.join(each[0], each[1])
    else:
        found = each[0]
    wide = found.reshape([words.shape[0], words.shape[1], words.shape[2] * EACH])
    return wide.to(TYPE, bitcast=True)


@triton.jit
def collect(words, mask, waits, patience, TYPE: tl.constexpr, RELAXED: tl.constexpr):  # type: ignore[no-untyped-def]
    """([C, B, W * elements of a word] values, patience): waits for elements where `waits`, 0 where not `mask`.

    After `patience` reads in vain it gives up, for this time and all others: the patience that comes back is 0, and
    what did not come is NaN.
    """
    found = _read(words, mask, RELAXED)
    left = patience
    while (_missing(found, waits, TYPE) != 0) & (left > 0):
        left -= 1
        found = _read(words, mask, RELAXED)
    return _together(found, TYPE), tl.where(left > 0, patience, 0)


@triton.jit
def hand_over(p, value, mask, RELAXED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores values that partners wait for."""
    TYPE: tl.constexpr = value.dtype
    if TYPE.primitive_bitwidth == 16:
        bits = value.to(tl.int16, bitcast=True)
        bits = tl.where(bits == SENTINEL, _NAN_16, bits).to(tl.int16)
        if RELAXED:
            tl.inline_asm_elementwise(
                "{.reg .pred p; .reg .b16 v; setp.ne.b32 p, $3, 0; cvt.u16.u32 v, $2;"
                " @p st.relaxed.gpu.global.b16 [$1], v; mov.b32 $0, 0;}",
                "=r,l,r,r", [p, bits.to(tl.int32), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.store(p, bits.to(TYPE, bitcast=True), mask=mask)
    else:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(bits == SENTINEL, _NAN_32, bits).to(tl.int32)
        if RELAXED:
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0;}",
                "=r,l,r,r", [p, bits, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.store(p, bits.to(TYPE, bitcast=True), mask=mask)
