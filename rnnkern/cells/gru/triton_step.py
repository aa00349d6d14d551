"""The equations of gru on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import d_sigmoid, d_tanh, kept, sigmoid, tanh


@triton.jit
def step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    h0 = states[0]
    r = sigmoid(gx[0] + gh[0])
    z = sigmoid(gx[1] + gh[1])
    hn = gh[2]
    n = tanh(gx[2] + r * hn)
    m = kept(n, aux)
    h = m + z * (h0 - m)
    return (h,), (r, z, n, hn)


@triton.jit
def step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dh = dstates[0]
    r, z, n, hn = planes
    h0 = states[0]
    dz = dh * (h0 - kept(n, aux)) * d_sigmoid(z)
    dn = kept(dh * (1.0 - z), aux) * d_tanh(n)
    dr = dn * hn * d_sigmoid(r)
    dh0 = dh * z
    return (dr, dz, dn), (dr, dz, dn * r), (dh0,), ()
