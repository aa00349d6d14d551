"""The equations of rnn_tanh and rnn_relu on tiles in Triton; they mirror reference.py line for line."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the globals of every kernel

from rnnkern.cells.triton_math import d_relu, d_tanh, relu, tanh, zeros_like


@triton.jit
def tanh_step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    a = tanh(gx[0] + gh[0])
    return (a,), (a,)


@triton.jit
def tanh_step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    return _backward(dstates[0] * d_tanh(planes[0]))


@triton.jit
def relu_step(gx, gh, states, aux):  # type: ignore[no-untyped-def]
    a = relu(gx[0] + gh[0])
    return (a,), (a,)


@triton.jit
def relu_step_backward(dstates, planes, states, aux):  # type: ignore[no-untyped-def]
    return _backward(d_relu(dstates[0], planes[0]))


@triton.jit
def _backward(da):  # type: ignore[no-untyped-def]
    return (da,), (da,), (zeros_like(da),), ()
