"""The equations of ligru on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import d_relu, d_sigmoid, kept, relu, sigmoid


@triton.jit
def step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    h0 = states[0]
    z = sigmoid(gx[0] + gh[0])
    n = relu(gx[1] + gh[1])
    m = kept(n, aux)
    h = m + z * (h0 - m)
    return (h,), (z, n)


@triton.jit
def step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    dh = dstates[0]
    z, n = planes
    h0 = states[0]
    dz = dh * (h0 - kept(n, aux)) * d_sigmoid(z)
    dn = d_relu(kept(dh * (1.0 - z), aux), n)
    dh0 = dh * z
    return (dz, dn), (dz, dn), (dh0,), ()
