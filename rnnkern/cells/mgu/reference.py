"""The equations of mgu in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch

from rnnkern.cells.functions import d_sigmoid, d_tanh, kept, t_d_sigmoid, t_d_tanh
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    h0 = states[0]
    f = torch.sigmoid(gx[0] + gh[0])
    hn = gh[1]
    n = torch.tanh(gx[1] + f * hn)
    h = h0 + f * (kept(n, aux) - h0)
    return (h,), (f, n, hn)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh,), (f, n, hn) = dstates, planes
    h0, keep = states[0], aux.noise.get("candidate", 1)
    dn = dh * f * keep * d_tanh(n)
    df = (dh * (n * keep - h0) + dn * hn) * d_sigmoid(f)
    dh0 = dh * (1 - f)
    return (df, dn), (df, dn * f), (dh0,), ()


def jacobian(planes: Row, states: Row) -> Jacobian:
    (f, n, hn), h0 = planes, states[0]
    jn = f * d_tanh(n)
    jf = (n - h0 + jn * hn) * d_sigmoid(f)
    return Jacobian((torch.stack((jf, jn), -2),), (torch.stack((jf, jn * f), -2),), ((1 - f,),))


def planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    f, n, hn = planes
    tf = (tgx[0] + tgh[0]) * d_sigmoid(f)
    return tf, (tgx[1] + tf * hn + f * tgh[1]) * d_tanh(n), tgh[1]


def step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    (dh,), (f, n, hn), (tf, tn, thn) = dstates, planes, tplanes
    h0, th0 = states[0], tstates[0]
    dn = dh * f * d_tanh(n)
    tdn = dh * (tf * d_tanh(n) + f * t_d_tanh(n, tn))
    df, tdf = dh * (n - h0) + dn * hn, dh * (tn - th0) + tdn * hn + dn * thn
    tdf = tdf * d_sigmoid(f) + df * t_d_sigmoid(f, tf)
    return (tdf, tdn), (tdf, tdn * f + dn * tf), (-dh * tf,)
