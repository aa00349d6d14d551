"""The equations of ligru for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, sigmoid


@njit(**FAST)
def step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    H, zero = m.shape[0], m.dtype.type(0)
    xz, xn, hz, hn = gx[:H], gx[H:], gh[:H], gh[H:]
    pz, pn = planes[0], planes[1]
    for j in range(H):
        z = sigmoid(xz[j] + hz[j])
        n = xn[j] + hn[j]
        n = zero if n < zero else n  # this way round NaN stays
        kept = n if aux is None else n * aux.keep[j]
        m[j] = kept + z * (h[j] - kept)
        pz[j] = z
        pn[j] = n


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    H, one, zero = dm.shape[0], dm.dtype.type(1), dm.dtype.type(0)  # a bare 1 is an int64 and would make sums fp64
    pz, pn = planes[0], planes[1]
    dz, dn = dgx[:H], dgx[H:]
    for j in range(H):
        z, n, d = pz[j], pn[j], dm[j]
        keep = one if aux is None else aux.keep[j]
        dz[j] = d * (h[j] - n * keep) * (z * (one - z))
        dn[j] = zero if n <= zero else d * (one - z) * keep  # not times 0: as in torch, a NaN ends at a dead unit
        dh[j] = d * z
