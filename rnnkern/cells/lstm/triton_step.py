"""The equations of lstm on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import d_sigmoid, d_tanh, sigmoid, tanh, zeros_like


@triton.jit
def step(gx, gh, states):  # type: ignore[no-untyped-def]
    c0 = states[1]
    i = sigmoid(gx[0] + gh[0])
    f = sigmoid(gx[1] + gh[1])
    g = tanh(gx[2] + gh[2])
    c = f * c0 + i * g
    o = sigmoid(gx[3] + gh[3])
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


@triton.jit
def step_backward(dstates, planes, states):  # type: ignore[no-untyped-def]
    dh, dc = dstates
    i, f, g, o = planes
    c0 = states[1]
    u = tanh(f * c0 + i * g)
    do = dh * u * d_sigmoid(o)
    dc = dc + dh * o * d_tanh(u)
    di = dc * g * d_sigmoid(i)
    df = dc * c0 * d_sigmoid(f)
    dg = dc * i * d_tanh(g)
    dc0 = dc * f
    gates = (di, df, dg, do)
    return gates, gates, (zeros_like(dh), dc0)
