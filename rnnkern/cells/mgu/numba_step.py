"""The equations of mgu for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, sigmoid, tanh


@njit(**FAST)
def step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    H = m.shape[0]
    xf, xn, hf, hn = gx[:H], gx[H:], gh[:H], gh[H:]
    pf, pn, ph = planes[0], planes[1], planes[2]
    for j in range(H):
        f = sigmoid(xf[j] + hf[j])
        n = tanh(xn[j] + f * hn[j])
        kept = n if aux is None else n * aux.keep[j]
        m[j] = h[j] + f * (kept - h[j])
        pf[j] = f
        pn[j] = n
        ph[j] = hn[j]


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    H, one = dm.shape[0], dm.dtype.type(1)  # a bare 1 is an int64 and would make sums fp64
    pf, pn, ph = planes[0], planes[1], planes[2]
    xf, xn, hf, hn = dgx[:H], dgx[H:], dgh[:H], dgh[H:]
    for j in range(H):
        f, n, d = pf[j], pn[j], dm[j]
        keep = one if aux is None else aux.keep[j]
        dn = d * f * keep * (one - n * n)
        df = (d * (n * keep - h[j]) + dn * ph[j]) * (f * (one - f))
        xf[j] = df
        xn[j] = dn
        hf[j] = df
        hn[j] = dn * f
        dh[j] = d * (one - f)
