"""The equations of slstm for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

import numpy as np
from numba import njit

from rnnkern.cells.numba_math import FAST, exp_below, log1p, sigmoid, tanh


@njit(**FAST)
def step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    H, one, zero = m.shape[0], m.dtype.type(1), m.dtype.type(0)
    xi, xf, xz, xo = gx[:H], gx[H : 2 * H], gx[2 * H : 3 * H], gx[3 * H :]
    hi, hf, hz, ho = gh[:H], gh[H : 2 * H], gh[2 * H : 3 * H], gh[3 * H :]
    c, n, scale = rest[0], rest[1], rest[2]
    pz, po, pr, pd = planes[0], planes[1], planes[2], planes[3]
    for j in range(H):
        ai = xi[j] + hi[j]
        af = xf[j] + hf[j]
        z = tanh(xz[j] + hz[j])
        kept = z if aux is None else z * aux.keep[j]
        o = sigmoid(xo[j] + ho[j])
        e = exp_below(af)
        s = one / (one + e)
        r = e * s if af > zero else s
        b = (zero if af > zero else af) - log1p(e) + scale[j]
        d = m.dtype.type(-np.inf) if n[j] == zero else b - ai
        w = exp_below(d)
        i = one if d <= zero else w
        f = one if d > zero else w
        cell = f * c[j] + i * kept
        norm = f * n[j] + i
        c[j] = cell
        n[j] = norm
        scale[j] = b if d > zero else (ai if d <= zero else d)
        m[j] = o * (cell / norm)
        pz[j] = z
        po[j] = o
        pr[j] = r
        pd[j] = d


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    H, one, zero = dm.shape[0], dm.dtype.type(1), dm.dtype.type(0)
    pz, po, pr, pd = planes[0], planes[1], planes[2], planes[3]
    gi, gf, gz, go = dgx[:H], dgx[H : 2 * H], dgx[2 * H : 3 * H], dgx[3 * H :]
    c, n, dc, dn, dscale = rest[0], rest[1], drest[0], drest[1], drest[2]
    for j in range(H):
        z, o, r, d = pz[j], po[j], pr[j], pd[j]
        keep = one if aux is None else aux.keep[j]
        kept = z * keep
        w = exp_below(d)
        i = one if d <= zero else w
        f = one if d > zero else w
        norm = f * n[j] + i
        q = (f * c[j] + i * kept) / norm
        dq = dm[j] * o / norm
        to_c = dc[j] + dq
        to_n = dn[j] - dq * q
        to_i = to_c * kept + to_n
        to_f = to_c * c[j] + to_n * n[j]
        to_b = dscale[j] - to_i * i if d > zero else to_f * f
        gi[j] = dscale[j] - to_b
        gf[j] = to_b * r
        gz[j] = to_c * (i * keep) * (one - z * z)
        go[j] = dm[j] * q * (o * (one - o))
        dc[j] = to_c * f
        dn[j] = to_n * f
        dscale[j] = to_b
