"""The equations of gru for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, sigmoid, tanh


@njit(**FAST)
def step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    H = m.shape[0]
    xr, xz, xn = gx[:H], gx[H : 2 * H], gx[2 * H :]
    hr, hz, hn = gh[:H], gh[H : 2 * H], gh[2 * H :]
    pr, pz, pn, ph = planes[0], planes[1], planes[2], planes[3]
    for j in range(H):
        r = sigmoid(xr[j] + hr[j])
        z = sigmoid(xz[j] + hz[j])
        n = tanh(xn[j] + r * hn[j])
        kept = n if aux is None else n * aux.keep[j]
        m[j] = kept + z * (h[j] - kept)
        pr[j] = r
        pz[j] = z
        pn[j] = n
        ph[j] = hn[j]


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    H, one = dm.shape[0], dm.dtype.type(1)  # a bare 1 is an int64 and would make sums fp64
    pr, pz, pn, ph = planes[0], planes[1], planes[2], planes[3]
    xr, xz, xn = dgx[:H], dgx[H : 2 * H], dgx[2 * H :]
    hr, hz, hn = dgh[:H], dgh[H : 2 * H], dgh[2 * H :]
    for j in range(H):
        r, z, n, d = pr[j], pz[j], pn[j], dm[j]
        keep = one if aux is None else aux.keep[j]
        dz = d * (h[j] - n * keep) * (z * (one - z))
        dn = d * (one - z) * keep * (one - n * n)
        dr = dn * ph[j] * (r * (one - r))
        xr[j] = dr
        xz[j] = dz
        xn[j] = dn
        hr[j] = dr
        hz[j] = dz
        hn[j] = dn * r
        dh[j] = d * z
