"""The equations of slstm on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl

from rnnkern.cells.triton_math import d_sigmoid, d_tanh, kept, log_sigmoid, sigmoid, tanh, zeros_like


@triton.jit
def _weights(d):  # type: ignore[no-untyped-def]
    """i and f, of which the larger is 1."""
    e = tl.exp(-tl.abs(d))
    return tl.where(d <= 0.0, 1.0, e), tl.where(d > 0.0, 1.0, e)


@triton.jit
def step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    c0, n0, m0 = states[1], states[2], states[3]
    ai = gx[0] + gh[0]
    af = gx[1] + gh[1]
    z = tanh(gx[2] + gh[2])
    o = sigmoid(gx[3] + gh[3])
    b, r = log_sigmoid(af)
    b = b + m0
    d = tl.where(n0 == 0.0, float("-inf"), b - ai)
    i, f = _weights(d)
    c = f * c0 + i * kept(z, aux)
    n = f * n0 + i
    m = tl.where(d > 0.0, b, tl.where(d <= 0.0, ai, d))
    return (o * (c / n), c, n, m), (z, o, r, d)


@triton.jit
def step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dh, dc, dn, dm = dstates
    z, o, r, d = planes
    c0, n0 = states[1], states[2]
    i, f = _weights(d)
    n = f * n0 + i
    q = (f * c0 + i * kept(z, aux)) / n
    dq = dh * o / n
    dc = dc + dq
    dn = dn - dq * q
    di = dc * kept(z, aux) + dn
    df = dc * c0 + dn * n0
    db = tl.where(d > 0.0, dm - di * i, df * f)
    gates = (dm - db, db * r, kept(dc * i, aux) * d_tanh(z), dh * q * d_sigmoid(o))
    return gates, gates, (zeros_like(dh), dc * f, dn * f, db), ()
