"""The equations of mgu on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import d_sigmoid, d_tanh, kept, sigmoid, tanh


@triton.jit
def step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    h0 = states[0]
    f = sigmoid(gx[0] + gh[0])
    hn = gh[1]
    n = tanh(gx[1] + f * hn)
    h = h0 + f * (kept(n, aux) - h0)
    return (h,), (f, n, hn)


@triton.jit
def step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dh = dstates[0]
    f, n, hn = planes
    h0 = states[0]
    dn = kept(dh * f, aux) * d_tanh(n)
    df = (dh * (kept(n, aux) - h0) + dn * hn) * d_sigmoid(f)
    dh0 = dh * (1.0 - f)
    return (df, dn), (df, dn * f), (dh0,), ()
