"""The equations of rnn_tanh and rnn_relu for one row in Numba; they mirror reference.py line for line."""

from __future__ import annotations

from numba import njit

from rnnkern.cells.numba_math import FAST, tanh


@njit(**FAST)
def tanh_step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    a = planes[0]
    for j in range(m.shape[0]):
        v = tanh(gx[j] + gh[j])
        a[j] = v
        m[j] = v


@njit(**FAST)
def relu_step(gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    a, zero = planes[0], m.dtype.type(0)
    for j in range(m.shape[0]):
        v = gx[j] + gh[j]
        v = zero if v < zero else v  # this way round NaN stays
        a[j] = v
        m[j] = v


@njit(**FAST)
def tanh_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    a, one = planes[0], dm.dtype.type(1)  # a bare 1 is an int64 and would make the sum fp64
    for j in range(dm.shape[0]):
        dgx[j] = dm[j] * (one - a[j] * a[j])


@njit(**FAST)
def relu_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    a, zero = planes[0], dm.dtype.type(0)
    for j in range(dm.shape[0]):
        dgx[j] = zero if a[j] <= zero else dm[j]  # not dm * 0: as in torch, a NaN ends at a dead unit
