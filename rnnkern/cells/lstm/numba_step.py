"""The equations of lstm for one row in Numba; they mirror reference.py line for line.

Without options (`aux` is None) a step is one loop; with them it is several, in which each option is a loop of its own.
The one loop is compiled in place: a second call within the step would cost as much as a row of some units.
"""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, clip, d_clip, d_normalise, moments, sigmoid, tanh


@njit(**FAST)
def step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    if aux is None:
        _plain_step(gx, gh, rest, m, planes)
    else:
        _optional_step(gx, gh, rest, m, planes, aux)


@njit(**FAST)
def step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    if aux is None:
        _plain_step_backward(dm, drest, planes, rest, dgx)
    else:
        _optional_step_backward(dm, drest, planes, rest, dgx, aux)


@njit(inline="always", **FAST)
def _plain_step(gx, gh, rest, m, planes):  # type: ignore[no-untyped-def]
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


@njit(inline="always", **FAST)
def _plain_step_backward(dm, drest, planes, rest, dgx):  # type: ignore[no-untyped-def]
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


@njit(**FAST)
def _optional_step(gx, gh, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    H, small = m.shape[0], aux.small
    xi, xf, xg, xo = gx[:H], gx[H : 2 * H], gx[2 * H : 3 * H], gx[3 * H :]
    hi, hf, hg, ho = gh[:H], gh[H : 2 * H], gh[2 * H : 3 * H], gh[3 * H :]
    c, pi, pf, pg, po = rest[0], planes[0], planes[1], planes[2], planes[3]
    if aux.peeps:
        for j in range(H):
            hi[j] += small[0, j] * c[j]
            hf[j] += small[1, j] * c[j]
    for j in range(H):
        i = sigmoid(xi[j] + hi[j])
        f = sigmoid(xf[j] + hf[j])
        g = tanh(xg[j] + hg[j])
        c[j] = f * c[j] + i * (g * aux.keep[j])
        pi[j] = i
        pf[j] = f
        pg[j] = g
    clip(c, aux.cell_clip)
    if aux.peeps:
        for j in range(H):
            ho[j] += small[2, j] * c[j]
    _output(c, m, aux)
    for j in range(H):
        o = sigmoid(xo[j] + ho[j])
        m[j] = o * tanh(m[j])
        po[j] = o


@njit(**FAST)
def _output(c, v, aux):  # type: ignore[no-untyped-def]
    """v: what of c goes through tanh."""
    if aux.norms:
        gain, shift = aux.small[3], aux.small[4]
        mean, scale = moments(c, aux.eps)
        for j in range(v.shape[0]):
            v[j] = (c[j] - mean) * scale * gain[j] + shift[j]
    else:
        for j in range(v.shape[0]):
            v[j] = c[j]


@njit(**FAST)
def _optional_step_backward(dm, drest, planes, rest, dgx, aux):  # type: ignore[no-untyped-def]
    H, one = dm.shape[0], dm.dtype.type(1)  # a bare 1 is an int64 and would make sums fp64
    pi, pf, pg, po = planes[0], planes[1], planes[2], planes[3]
    di, df, dg, do = dgx[:H], dgx[H : 2 * H], dgx[2 * H : 3 * H], dgx[3 * H :]
    c0, dc, keep, small, dsmall = rest[0], drest[0], aux.keep, aux.small, aux.dsmall
    raw, c, v = aux.work[0], aux.work[1], aux.work[2]
    for j in range(H):
        raw[j] = pf[j] * c0[j] + pi[j] * (pg[j] * keep[j])
        c[j] = raw[j]
    clip(c, aux.cell_clip)
    _output(c, v, aux)
    for j in range(H):
        o, u = po[j], tanh(v[j])
        do[j] = dm[j] * u * (o * (one - o))
        v[j] = dm[j] * o * (one - u * u)
    if aux.norms:
        for j in range(H):
            dsmall[4, j] += v[j]
        d_normalise(v, c, small[3], dsmall[3], aux.eps)
    for j in range(H):
        dc[j] += v[j]
    if aux.peeps:
        for j in range(H):
            dc[j] += do[j] * small[2, j]
            dsmall[2, j] += do[j] * c[j]
    d_clip(dc, raw, aux.cell_clip)
    for j in range(H):
        i, f, g, d = pi[j], pf[j], pg[j], dc[j]
        di[j] = d * (g * keep[j]) * (i * (one - i))
        df[j] = d * c0[j] * (f * (one - f))
        dg[j] = d * (i * keep[j]) * (one - g * g)
        dc[j] = d * f
    if aux.peeps:
        for j in range(H):
            dc[j] += di[j] * small[0, j] + df[j] * small[1, j]
            dsmall[0, j] += di[j] * c0[j]
            dsmall[1, j] += df[j] * c0[j]
