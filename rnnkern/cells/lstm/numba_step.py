"""The equations of lstm for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, sigmoid, tanh


@njit(**FAST)
def step(gx, gh, h, rest, m, planes):  # type: ignore[no-untyped-def]
    H = m.shape[0]
    xi, xf, xg, xo = gx[:H], gx[H : 2 * H], gx[2 * H : 3 * H], gx[3 * H :]
    hi, hf, hg, ho = gh[:H], gh[H : 2 * H], gh[2 * H : 3 * H], gh[3 * H :]
    c, pi, pf, pg, po = rest[0], planes[0], planes[1], planes[2], planes[3]
    for j in range(H):
        i = sigmoid(xi[j] + hi[j])
        f = sigmoid(xf[j] + hf[j])
        g = tanh(xg[j] + hg[j])
        o = sigmoid(xo[j] + ho[j])
        cell = f * c[j] + i * g
        c[j] = cell
        m[j] = o * tanh(cell)
        pi[j] = i
        pf[j] = f
        pg[j] = g
        po[j] = o


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh):  # type: ignore[no-untyped-def]
    H, one = dm.shape[0], dm.dtype.type(1)  # a bare 1 is an int64 and would make sums fp64
    pi, pf, pg, po = planes[0], planes[1], planes[2], planes[3]
    di, df, dg, do = dgx[:H], dgx[H : 2 * H], dgx[2 * H : 3 * H], dgx[3 * H :]
    c, dc = rest[0], drest[0]
    for j in range(H):
        i, f, g, o = pi[j], pf[j], pg[j], po[j]
        u = tanh(f * c[j] + i * g)
        d = dc[j] + dm[j] * o * (one - u * u)
        di[j] = d * g * (i * (one - i))
        df[j] = d * c[j] * (f * (one - f))
        dg[j] = d * i * (one - g * g)
        do[j] = dm[j] * u * (o * (one - o))
        dc[j] = d * f
