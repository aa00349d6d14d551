"""The persistent scan in Gluon, whose weights stay in registers for all steps.

Plain Triton keeps them in shared memory and reads them anew at every step. The walk, its equations and how programs
wait is persistent_kernels.py, compiled as Gluon; here is only where tiles lie, and how their product is made. Every
warp makes a slice of it: it holds its part of the weights as tensor cores take them, reads its part of the rows that
programs hand to each other straight into the same places, and only the slices' sums meet in shared memory.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from rnnkern.backends.triton import persistent_kernels
from rnnkern.backends.triton.exchange import collect
from rnnkern.backends.triton.gluon_shim import constexpr_function, gl, jit, multiply
from rnnkern.backends.triton.persistent_kernels import NUMBERS


@constexpr_function
def _layout_of_tile(slices, units):  # type: ignore[no-untyped-def]
    """[slices, rows, units], where a thread has all slices' sums of its rows and units; less the slices, a tile's."""
    across = min(units, 32)
    return gl.BlockedLayout([slices, 1, 1], [1, 32 // across, across], [1, slices, 1], [2, 1, 0])


@constexpr_function
def _layout_of_sums(slices):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[slices, 1, 1], instr_shape=[1, 16, 8])


@constexpr_function
def _layout_of_operand(number, slices, neighbours):  # type: ignore[no-untyped-def]
    """`neighbours` of a row are one thread's, in both operands alike: in which order they are multiplied is all one."""
    return gl.DotOperandLayout(number, _layout_of_sums(slices), neighbours)


@constexpr_function
def _neighbours(storage, word):  # type: ignore[no-untyped-def]
    """Those of a word; at least those of a register."""
    return max(word.primitive_bitwidth, 32) // storage.primitive_bitwidth


@jit
def tile(BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, SLICES: gl.constexpr):  # type: ignore[no-untyped-def]
    LAYOUT: gl.constexpr = gl.SliceLayout(0, _layout_of_tile(SLICES, BLOCK_H))
    return gl.arange(0, BLOCK_B, gl.SliceLayout(1, LAYOUT)), gl.arange(0, BLOCK_H, gl.SliceLayout(0, LAYOUT))


@jit
def _along(LAYOUT: gl.constexpr, AXIS: gl.constexpr, SIZE: gl.constexpr):  # type: ignore[no-untyped-def]
    """0, 1, ... along one axis of three."""
    if AXIS == 0:
        return gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    elif AXIS == 1:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    else:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@jit
def weights(  # type: ignore[no-untyped-def]
    w, first, COUNT: gl.constexpr, STARTS: gl.constexpr, PARTS: gl.constexpr, K: gl.constexpr, H: gl.constexpr,
    STEP_K: gl.constexpr, STEP_J: gl.constexpr, BLOCK_H: gl.constexpr, SLICES: gl.constexpr,
    STORAGE: gl.constexpr, WORD: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = _layout_of_operand(1, SLICES, _neighbours(STORAGE, WORD))
    DEPTH: gl.constexpr = STARTS[-1] + PARTS[-1]
    j = first + _along(LAYOUT, 2, BLOCK_H)
    found = ()
    for p in gl.static_range(len(PARTS)):
        k = _along(LAYOUT, 0, SLICES) * DEPTH + STARTS[p] + _along(LAYOUT, 1, PARTS[p])
        for g in gl.static_range(COUNT):
            places = w + g * K * H + k * STEP_K + j * STEP_J
            found = found + (gl.load(places, mask=(k < K) & (j < H), other=0.0),)
    return found


@jit
def _at_words(rows, needed, waits, LAYOUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """The three where words are read: as one number, for each would take a trip through shared memory. The address of a
    row is even, and not 0."""
    one = gl.where(needed, rows.to(gl.int64) | waits.to(gl.int64), 0)
    one = gl.convert_layout(one, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    return one & -2, one != 0, (one & 1) != 0


@jit
def products(  # type: ignore[no-untyped-def]
    rows, needed, waits, patience, held, sums, STARTS: gl.constexpr, PARTS: gl.constexpr, K: gl.constexpr,
    SLICES: gl.constexpr, STORAGE: gl.constexpr, WORD: gl.constexpr, ACC: gl.constexpr, PRECISION: gl.constexpr,
    RELAXED: gl.constexpr,
):  # fmt: skip
    EACH: gl.constexpr = WORD.primitive_bitwidth // STORAGE.primitive_bitwidth
    NEIGHBOURS: gl.constexpr = _neighbours(STORAGE, WORD)
    OPERAND: gl.constexpr = _layout_of_operand(0, SLICES, NEIGHBOURS)
    WORDS: gl.constexpr = _layout_of_operand(0, SLICES, NEIGHBOURS // EACH)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    DEPTH: gl.constexpr = STARTS[-1] + PARTS[-1]
    BLOCK_B: gl.constexpr = sums[0].shape[0]
    BLOCK_H: gl.constexpr = sums[0].shape[1]
    rows, needed, waits = _at_words(rows, needed, waits, WORDS)
    slices = ()
    for _ in gl.static_range(len(sums)):
        slices = slices + (gl.zeros([SLICES, BLOCK_B, BLOCK_H], ACC, _layout_of_sums(SLICES)),)
    for p in gl.static_range(len(PARTS)):
        first = (_along(WORDS, 0, SLICES) * DEPTH + STARTS[p]) // EACH
        k = first + _along(WORDS, 2, PARTS[p] // EACH)
        inside = k < K // EACH
        words = rows.to(gl.pointer_type(WORD)) + k
        part, patience = collect(words, needed & inside, waits & inside, patience, STORAGE, RELAXED)
        part = gl.convert_layout(part, OPERAND, assert_trivial=True)
        larger = ()
        for g in gl.static_range(len(sums)):
            larger = larger + (multiply(part, held[p * len(sums) + g], slices[g], PRECISION),)
        slices = larger
    together = ()
    for g in gl.static_range(len(sums)):
        together = together + (gl.allocate_shared_memory(ACC, [SLICES, BLOCK_B, BLOCK_H], SHARED, slices[g]),)
    total = ()
    for g in gl.static_range(len(sums)):
        total = total + (sums[g] + gl.sum(together[g].load(_layout_of_tile(SLICES, BLOCK_H)), axis=0),)
    return total, patience


forward_together = jit(persistent_kernels.forward_together.fn, do_not_specialize=NUMBERS)
backward_together = jit(persistent_kernels.backward_together.fn, do_not_specialize=NUMBERS)
