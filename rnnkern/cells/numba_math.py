"""Sigmoid and tanh that LLVM can vectorise: libm calls would keep every loop over H scalar, ten times slower.

Both come from exp on (-inf, 0], so nothing overflows: ``x = n ln2 + r``, a Taylor series in r (|r| <= ln2 / 2; its last
term is below half an ulp, so no fitted constants), 2^n written into the exponent bits. NaN passes every select.
Errors against fp64 (fp32: exp 1, sigmoid 2, tanh 3 ulp) are below those of the product that feeds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

# Wrappers for callers in Python and C cost as much to compile as a small function: only what is CALLED has one.
_INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Contraction only: `reassoc` would fold the two-part ln2 and the rounding shifts away. Said explicitly, for a function
# without flags takes those of its caller.
EXACT: dict[str, Any] = {"fastmath": {"contract"}, **_INNER}
# NaN and Inf must survive, so neither nnan nor ninf.
FAST: dict[str, Any] = {"fastmath": {"contract", "reassoc", "arcp", "nsz"}, **_INNER}
CALLED: dict[str, Any] = {**FAST, "nogil": True, "no_cpython_wrapper": False}  # from Python


@njit(**EXACT)
def _scaled32(x):  # type: ignore[no-untyped-def]
    """(2^n, 2^n (e^r - 1)) of x <= 0; below -87, where 2^n would leave the normal range, as of -87."""
    z = np.float32(-87.0) if x < np.float32(-87.0) else x
    u = z * np.float32(1.4426950408889634) + np.float32(12582912.0)  # 1.5 * 2^23: the sum's low bits are n
    n = u - np.float32(12582912.0)
    r = z - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    bits = np.int32((np.float32(u).view(np.int32) + np.int32(127)) << np.int32(23))
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    scale = np.int32(bits).view(np.float32)
    return scale, scale * (p * r * r + r)


@njit(**EXACT)
def _scaled64(x):  # type: ignore[no-untyped-def]
    """The same in fp64; the limit is -708."""
    z = -708.0 if x < -708.0 else x
    u = z * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2^52
    n = u - 6755399441055744.0
    r = z - n * 6.93147180369123816490e-01
    r = r - n * 1.90821492927058770002e-10
    bits = np.int64((np.float64(u).view(np.int64) + np.int64(1023)) << np.int64(52))
    p = 1 / 6227020800
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    scale = np.int64(bits).view(np.float64)
    return scale, scale * (p * r * r + r)


def _scaled(x: Any) -> tuple[Any, Any]:
    """(2^n, 2^n (e^r - 1)); compiled code gets the version of its dtype."""
    return _scaled32(x) if isinstance(x, np.float32) else _scaled64(x)


@overload(_scaled, inline="always")
def _choose(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: _scaled32(x)
    return lambda x: _scaled64(x)


@njit(**EXACT)
def sigmoid(x):  # type: ignore[no-untyped-def]
    one, zero = type(x)(1), type(x)(0)
    scale, rest = _scaled(-abs(x))
    e = zero if x < type(x)(-708) else scale + rest  # exactly 0 at -inf, as inf * 0 downstream must be NaN
    s = one / (one + e)
    return e * s if x < zero else s


@njit(**EXACT)
def tanh(x):  # type: ignore[no-untyped-def]
    scale, rest = _scaled(type(x)(-2) * abs(x))
    e = rest + (scale - type(x)(1))  # expm1: no cancellation near 0
    t = e / (e + type(x)(2))
    return t if x < type(x)(0) else -t


@njit(**EXACT)
def exp_below(x):  # type: ignore[no-untyped-def]
    """exp(-|x|): 1 and less, and exactly 0 at an infinite x."""
    scale, rest = _scaled(-abs(x))
    return type(x)(0) if abs(x) > type(x)(708) else scale + rest


@njit(**EXACT)
def log1p(e):  # type: ignore[no-untyped-def]
    """log(1 + e) of 0 <= e <= 1, by the series of 2 artanh(s) with s = e / (e + 2), 1/3 at most."""
    s = e / (e + type(e)(2))
    w = s * s
    p = type(e)(1 / 31)
    p = p * w + type(e)(1 / 29)
    p = p * w + type(e)(1 / 27)
    p = p * w + type(e)(1 / 25)
    p = p * w + type(e)(1 / 23)
    p = p * w + type(e)(1 / 21)
    p = p * w + type(e)(1 / 19)
    p = p * w + type(e)(1 / 17)
    p = p * w + type(e)(1 / 15)
    p = p * w + type(e)(1 / 13)
    p = p * w + type(e)(1 / 11)
    p = p * w + type(e)(1 / 9)
    p = p * w + type(e)(1 / 7)
    p = p * w + type(e)(1 / 5)
    p = p * w + type(e)(1 / 3)
    p = p * w + type(e)(1)
    return type(e)(2) * s * p


@njit(**FAST)
def clip(row, bound):  # type: ignore[no-untyped-def]
    """The row within [-bound, bound], in place; a bound of 0 is none. NaN stays."""
    if bound > 0:
        for j in range(row.shape[0]):
            v = row[j]
            v = bound if v > bound else v
            row[j] = -bound if v < -bound else v


@njit(**FAST)
def d_clip(d, raw, bound):  # type: ignore[no-untyped-def]
    """d becomes the gradient at raw of ``clip(raw, bound)``; NaN lies outside of every bound."""
    if bound > 0:
        for j in range(d.shape[0]):
            d[j] = d[j] if abs(raw[j]) <= bound else d.dtype.type(0)


@njit(**FAST)
def moments(row, eps):  # type: ignore[no-untyped-def]
    """Mean and reciprocal deviation, of which layer norm is made."""
    size, total = row.dtype.type(row.shape[0]), row.dtype.type(0)
    for j in range(row.shape[0]):
        total += row[j]
    mean, square = total / size, row.dtype.type(0)
    for j in range(row.shape[0]):
        square += (row[j] - mean) * (row[j] - mean)
    return mean, row.dtype.type(1) / np.sqrt(square / size + eps)


@njit(**FAST)
def d_normalise(d, v, gain, dgain, eps):  # type: ignore[no-untyped-def]
    """d becomes the gradient at v of ``normalise(v) * gain``; that of gain is added to dgain.

    d times gain is kept in memory before its mean is taken off: fused with that, the two would not cancel.
    """
    mean, scale = moments(v, eps)
    size, total, slope = d.dtype.type(d.shape[0]), d.dtype.type(0), d.dtype.type(0)
    for j in range(d.shape[0]):
        dgain[j] += d[j] * ((v[j] - mean) * scale)
        d[j] *= gain[j]
    for j in range(d.shape[0]):
        total += d[j]
        slope += d[j] * ((v[j] - mean) * scale)
    total, slope = total / size, slope / size
    for j in range(d.shape[0]):
        d[j] = scale * (d[j] - total - (v[j] - mean) * scale * slope)
