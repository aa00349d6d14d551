"""The one tolerance rule of this library; no test has bounds of its own.

Results are compared with the truth, the same computation in fp64. Their error may be four times what the yardstick
makes, torch's own kernel at the same dtype on the same inputs or, where torch has none, the reference scan in that
dtype, plus 8 eps of the largest true value; results in fp64 agree with the truth to 1e-10 of it. Gradients are held to
the same in relative L2 norm and in direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

FACTOR, FLOOR = 4, 8
EXACT = 1e-10  # fp64: the truth has the same precision, and sums in another order

Tensors = Tensor | Sequence[Tensor]


def check(ours: Tensors, yardstick: Tensors, truth: Tensors, what: str = "", dtype: torch.dtype | None = None) -> None:
    """Largest error of `ours` against `truth`; `dtype` is the precision to expect where it is not that of `ours`."""
    for label, a, b, c, floor in _together(ours, yardstick, truth, what, dtype):
        if not c.numel():
            continue
        bound = FACTOR * _largest(b - c) + floor * _largest(c)
        error = _largest(a - c)
        assert error <= bound, f"{label}: error {error:.3e} exceeds {bound:.3e} (yardstick {_largest(b - c):.3e})"


def check_grad(
    ours: Tensors, yardstick: Tensors, truth: Tensors, what: str = "", dtype: torch.dtype | None = None
) -> None:
    """`check`, and the same rule for the relative L2 error and for the angle to the truth."""
    check(ours, yardstick, truth, what, dtype)
    for label, a, b, c, floor in _together(ours, yardstick, truth, what, dtype):
        if not c.numel() or not c.norm():
            continue
        for name, measure in (("relative L2 error", _relative), ("1 - cosine", _turn)):
            error, bound = measure(a, c), FACTOR * measure(b, c) + floor
            assert error <= bound, f"{label}: {name} {error:.3e} exceeds {bound:.3e}"


def _together(ours: Tensors, yardstick: Tensors, truth: Tensors, what: str, dtype: torch.dtype | None):  # type: ignore[no-untyped-def]
    """Each triple in fp64 and its floor, where truth and yardstick are finite; ours has the truth's NaN and Inf."""
    lists = ([v] if isinstance(v, Tensor) else list(v) for v in (ours, yardstick, truth))
    for k, (a, b, c) in enumerate(zip_longest(*lists)):
        label = f"{what}[{k}]"
        assert a is not None and b is not None and c is not None, f"{label}: not as many tensors on every side"
        assert a.shape == b.shape == c.shape, f"{label}: shapes {a.shape}, {b.shape}, {c.shape}"
        precision = dtype or a.dtype
        floor = EXACT if precision == torch.float64 else FLOOR * torch.finfo(precision).eps
        a, b, c = (v.detach().to("cpu", torch.float64) for v in (a, b, c))
        strange = ~c.isfinite()
        if strange.any():
            same = (a == c) | (a.isnan() & c.isnan())
            assert same[strange].all(), f"{label}: the truth has NaN or Inf where this has something else"
        fair = c.isfinite() & b.isfinite()
        yield label, a[fair], b[fair], c[fair], floor


def _largest(v: Tensor) -> float:
    found = v.abs().max().item()
    return found if found == found else float("inf")  # NaN must not pass a comparison


def _relative(v: Tensor, truth: Tensor) -> float:
    return ((v - truth).norm() / truth.norm()).item()


def _turn(v: Tensor, truth: Tensor) -> float:
    """1 - cosine, by the chord between the unit vectors: the cosine itself would round it away."""
    return ((v / v.norm() - truth / truth.norm()).square().sum() / 2).item() if v.norm() else 1.0
