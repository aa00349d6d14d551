"""The equations of lstm on tiles in Triton; they mirror reference.py line for line."""

# mypy: disable-error-code="assignment"
# (tuples grow here, and change their type)

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import (
    clipped,
    d_clipped,
    d_normed,
    d_peeped,
    d_sigmoid,
    d_tanh,
    kept,
    normed,
    peeped,
    sigmoid,
    tanh,
    zeros_like,
)


@triton.jit
def step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    c0 = states[1]
    i = sigmoid(peeped(gx[0] + gh[0], aux, 0, c0))
    f = sigmoid(peeped(gx[1] + gh[1], aux, 1, c0))
    g = tanh(gx[2] + gh[2])
    c = clipped(f * c0 + i * kept(g, aux), aux)
    o = sigmoid(peeped(gx[3] + gh[3], aux, 2, c))
    h = o * tanh(normed(c, aux))
    return (h, c), (i, f, g, o)


@triton.jit
def step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dh, dc = dstates
    i, f, g, o = planes
    c0 = states[1]
    raw = f * c0 + i * kept(g, aux)
    c = clipped(raw, aux)
    u = tanh(normed(c, aux))
    do = dh * u * d_sigmoid(o)
    dv, d_norm = d_normed(dh * o * d_tanh(u), c, aux)
    dc = d_peeped(dc + dv, aux, 2, do)
    dc = d_clipped(dc, raw, aux)
    di = dc * kept(g, aux) * d_sigmoid(i)
    df = dc * c0 * d_sigmoid(f)
    dg = kept(dc * i, aux) * d_tanh(g)
    dc0 = d_peeped(d_peeped(dc * f, aux, 0, di), aux, 1, df)
    small = ()
    if len(aux[1]):
        small = (di * c0, df * c0, do * c)
    small = small + d_norm
    gates = (di, df, dg, do)
    return gates, gates, (zeros_like(dh), dc0), small
