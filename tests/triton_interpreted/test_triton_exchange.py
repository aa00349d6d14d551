"""What programs of a persistent launch hand to each other, alone; and errors in it that the scans' tests must see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from cooperative import Stuck, together
from scans import Case, compare, gradients_of, inputs_of, run
from test_triton_persistent import driven, of_the_sentinels_pattern

from rnnkern import dispatch
from rnnkern.backends.triton import drivers, exchange, persistent_kernels
from rnnkern.backends.triton.exchange import collect, hand_over
from rnnkern.backends.triton.launch import TYPES
from rnnkern.backends.triton.lost import LOST

SCAN = dispatch.backend("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def copy(source, target, waited, left, TYPE: tl.constexpr, WORD: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """[2, 2, 8] elements, of which those of the first two rows are waited for where `waited`."""
    c, b, w = tl.arange(0, 2)[:, None, None], tl.arange(0, 2)[None, :, None], tl.arange(0, 8 // EACH)[None, None, :]
    words = source.to(tl.pointer_type(WORD)) + (c * 16 + b * 8) // EACH + w
    waits = (b < 1) & (tl.load(waited) != 0) & (w >= 0) & (c >= 0)
    found, patience = collect(words, (b >= 0) & (w >= 0) & (c >= 0), waits, 3, TYPE, False)
    tl.store(target + c * 16 + b * 8 + tl.arange(0, 8)[None, None, :], found)
    tl.store(left, patience)


@triton.jit
def hand(source, target):  # type: ignore[no-untyped-def]
    k = tl.arange(0, 16)
    hand_over(target + k, tl.load(source + k), k < 12, False)


def integers(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int16 if t.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("width", WORDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_missing_element_is_seen(dtype: torch.dtype, width: int) -> None:
    if width < dtype.itemsize:
        pytest.skip("a word holds an element")
    each = width // dtype.itemsize
    source = torch.randn(32).to(dtype)
    source[5] = float("nan")

    def copied(x: torch.Tensor, waited: int) -> tuple[torch.Tensor, int]:
        target, left = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
        copy[(1,)](x, target, torch.tensor([waited], dtype=torch.int32), left, TYPES[dtype], WORDS[width], each)
        return target, int(left)

    found, left = copied(source, 1)
    assert torch.equal(integers(found), integers(source)) and left == 3
    for k in range(32):
        missing = source.clone()
        integers(missing)[k] = exchange.MISSING
        found, left = copied(missing, 1)
        assert left == (0 if k % 16 < 8 else 3), k
        assert torch.equal(integers(found), integers(missing))
    assert copied(missing, 0)[1] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_handed_over_is_never_the_sentinel(dtype: torch.dtype) -> None:
    source, target = torch.randn(16).to(dtype), torch.zeros(16, dtype=dtype)
    source[3:6] = torch.tensor([float("nan"), float("inf"), -0.0])
    integers(source)[6] = exchange.MISSING
    hand[(1,)](source, target)
    assert target[6].isnan() and integers(target)[6] != exchange.MISSING
    same = [k for k in range(12) if not source[k].isnan()]
    assert target[3].isnan()
    assert torch.equal(integers(target)[same], integers(source)[same])
    assert not target[12:].any()


@triton.jit
def nobody_waits(words, waits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.max(tl.ravel((waits & (waits == 0)).to(tl.int32)), axis=0)


_missing = exchange._missing
_part, _weights, _d_states = persistent_kernels._part, persistent_kernels._weights, persistent_kernels._d_states


@triton.jit
def looks_at_one_slice_only(words, waits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.arange(0, words.shape[0])[:, None, None] == 0
    return _missing(words, waits & first, TYPE)


@triton.jit
def takes_another_nan_for_the_sentinel(words, waits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return _missing(words + 1, waits, TYPE)


@triton.jit
def reads_every_part_from_the_first(  # type: ignore[no-untyped-def]
    rows, needed, waits, patience, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr,
    STORAGE: tl.constexpr, WORD: tl.constexpr, RELAXED: tl.constexpr,
):  # fmt: skip
    return _part(rows, needed, waits, patience, 0, SIZE, K, SLICES, STORAGE, WORD, RELAXED)


@triton.jit
def has_the_weights_of_the_next_unit(  # type: ignore[no-untyped-def]
    w, j, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SLICES: tl.constexpr,
    STEP_K: tl.constexpr, STEP_J: tl.constexpr,
):  # fmt: skip
    return _weights(w, j + 1, START, SIZE, K, H, SLICES, STEP_K, STEP_J)


@triton.jit
def forgets_resets(  # type: ignore[no-untyped-def]
    rows, came, held, carry, d_restart, was_reset, patience, PRODUCTS: tl.constexpr,
    K: tl.constexpr, STARTS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, HAS_RESET: tl.constexpr,
    STORAGE: tl.constexpr, WORD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, RELAXED: tl.constexpr,
):  # fmt: skip
    return _d_states(
        rows, came, held, carry, d_restart, was_reset & (was_reset == 0), patience, PRODUCTS,
        K, STARTS, PARTS, SLICES, HAS_RESET, STORAGE, WORD, ACC, PRECISION, RELAXED,
    )  # fmt: skip


@triton.jit
def stores_any_nan(p, value, mask, RELAXED: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(p, value, mask=mask)


def equals_the_reference(dtype: torch.dtype) -> None:
    case = Case("gru", dtype, T=3, B=3, H=24, reverse=(True,), layout="packed", reset="learned")
    inputs = inputs_of(case)
    with together(seed=1):
        compare(SCAN, inputs, gradients_of(case, inputs))


def nan_is_no_missing_value(dtype: torch.dtype) -> None:
    inputs, grads = of_the_sentinels_pattern(dtype)
    with together(seed=1):
        run(SCAN, inputs, grads)


MUTANTS: dict[str, tuple] = {
    "nobody_waits": (exchange, "_missing", nobody_waits, equals_the_reference),
    "looks_at_one_slice_only": (exchange, "_missing", looks_at_one_slice_only, equals_the_reference),
    "takes_another_nan": (exchange, "_missing", takes_another_nan_for_the_sentinel, equals_the_reference),
    "reads_every_part_from_the_first": (
        persistent_kernels, "_part", reads_every_part_from_the_first, equals_the_reference,
    ),
    "has_the_weights_of_the_next_unit": (
        persistent_kernels, "_weights", has_the_weights_of_the_next_unit, equals_the_reference,
    ),
    "forgets_resets": (persistent_kernels, "_d_states", forgets_resets, equals_the_reference),
    "stores_any_nan": (persistent_kernels, "hand_over", stores_any_nan, nan_is_no_missing_value),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, mutant, judge = MUTANTS[name]
    judge_on: Callable[[torch.dtype], None] = judge
    driven(monkeypatch)
    monkeypatch.setattr(drivers, "PATIENCE", 200)
    LOST.flags.clear()
    judge_on(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, mutant)
        with pytest.raises((AssertionError, RuntimeError), match=r"error|cosine|L2|truth|gave up waiting"):
            judge_on(torch.float32)
            LOST.check(torch.device("cpu"))
    LOST.flags.clear()


def test_a_wait_for_nobody_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tests, where a scan would have the patience of seconds."""
    driven(monkeypatch)
    inputs = inputs_of(Case("lstm", T=2, B=3, H=24, reverse=(False,)))
    with together(most=300, leave={1: 0}), pytest.raises(Stuck):
        SCAN.forward(inputs)
