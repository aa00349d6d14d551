"""Activations and their derivatives on tiles in Triton, for fp32 and fp64; the derivatives mirror functions.py.

Plain Triton throughout: what a vendor's library would add (libdevice) Triton's interpreter does not run. NaN stays NaN,
and nothing overflows into one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """By exp where that is exact enough; near 0, where 1 - e cancels, by x + x^3 P(x^2), P fitted on |x| <= 0.6.

    In fp64 the fit would be the larger error: there what is lost near 0 does not matter.
    """
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0.0, -far, far)
    if x.dtype == tl.float32:
        q = x * x
        p = ((-0.00627639015 * q + 0.021116216) * q - 0.0538751388) * q + 0.13332924
        p = p * q - 0.333333304
        y = tl.where(size < 0.6, x + x * q * p, y)
    return y


@triton.jit
def log_sigmoid(x):  # type: ignore[no-untyped-def]
    """The logarithm of sigmoid(x), and its derivative, which is sigmoid(-x).

    Of log(1 + e), what rounding takes from the sum is given back, over the sum.
    """
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    s = 1.0 / u
    log1p = tl.log(u) + (e - (u - 1.0)) * s
    return tl.where(x > 0.0, 0.0, x) - log1p, tl.where(x > 0.0, e * s, s)


@triton.jit
def relu(x):  # type: ignore[no-untyped-def]
    return tl.where(x < 0.0, 0.0, x)  # this way round NaN stays


@triton.jit
def d_sigmoid(y):  # type: ignore[no-untyped-def]
    return y * (1.0 - y)


@triton.jit
def d_tanh(y):  # type: ignore[no-untyped-def]
    return 1.0 - y * y


@triton.jit
def d_relu(d, y):  # type: ignore[no-untyped-def]
    return tl.where(y <= 0.0, 0.0, d)  # not d * 0: as in torch, a NaN ends at a dead unit


@triton.jit
def zeros_like(x):  # type: ignore[no-untyped-def]
    """Zeros laid out as x; tl.zeros_like knows no layouts, which are part of a tile's type in Gluon."""
    return tl.where(x == x, 0.0, 0.0).to(x.dtype)


# ---- what a step does beyond the plain one ---------------------------------------------------------------------------
#
# `aux` is a tuple of tuples, each empty where there is nothing of it, so that a plain step is the plain equations:
#   0  (what the candidate is multiplied by,)
#   1  (the peepholes in the cell's order)
#   2  (the bound of c,)
#   3  (gain and shift of c's layer norm, which columns there are, their number, eps)


@triton.jit
def bounded(x, bound):  # type: ignore[no-untyped-def]
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))  # this way round NaN stays


@triton.jit
def d_bounded(d, x, bound):  # type: ignore[no-untyped-def]
    """The gradient at x of bounded(x, bound); NaN lies outside of every bound."""
    return tl.where(tl.abs(x) <= bound, d, 0.0)


@triton.jit
def kept(candidate, aux):  # type: ignore[no-untyped-def]
    return candidate * aux[0][0] if len(aux[0]) else candidate


@triton.jit
def peeped(gate, aux, k: tl.constexpr, c):  # type: ignore[no-untyped-def]
    """`gate` as it sees c through the k-th peephole."""
    return gate + aux[1][k] * c if len(aux[1]) else gate


@triton.jit
def d_peeped(d, aux, k: tl.constexpr, d_gate):  # type: ignore[no-untyped-def]
    """The gradient at c, from `d` of its other ways and that of the gate."""
    return d + aux[1][k] * d_gate if len(aux[1]) else d


@triton.jit
def normalise(v, inside, count, eps):  # type: ignore[no-untyped-def]
    """Layer norm of rows without its gain, of the `count` columns that are `inside`; and what it multiplied by."""
    mean = tl.sum(tl.where(inside, v, 0.0), 1)[:, None] / count
    centred = tl.where(inside, v - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / count + eps)
    return centred * scale, scale


@triton.jit
def normed(c, aux):  # type: ignore[no-untyped-def]
    if len(aux[3]):
        return normalise(c, aux[3][2], aux[3][3], aux[3][4])[0] * aux[3][0] + aux[3][1]
    else:
        return c


@triton.jit
def d_normed(d, c, aux):  # type: ignore[no-untyped-def]
    """The gradient at c from that at normed(c), and those of gain and shift in a tuple."""
    if len(aux[3]):
        y, scale = normalise(c, aux[3][2], aux[3][3], aux[3][4])
        gained = tl.where(aux[3][2], d * aux[3][0], 0.0)
        mean = tl.sum(gained, 1)[:, None] / aux[3][3]
        slope = tl.sum(gained * y, 1)[:, None] / aux[3][3]
        return scale * (gained - mean - y * slope), (d * y, d)
    else:
        return d, ()


@triton.jit
def clipped(c, aux):  # type: ignore[no-untyped-def]
    return bounded(c, aux[2][0]) if len(aux[2]) else c


@triton.jit
def d_clipped(d, raw, aux):  # type: ignore[no-untyped-def]
    return d_bounded(d, raw, aux[2][0]) if len(aux[2]) else d
