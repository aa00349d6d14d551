"""The equations of gru in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch

from rnnkern.cells.functions import d_sigmoid, d_tanh, kept, t_d_sigmoid, t_d_tanh
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    h0 = states[0]
    r = torch.sigmoid(gx[0] + gh[0])
    z = torch.sigmoid(gx[1] + gh[1])
    hn = gh[2]
    n = torch.tanh(gx[2] + r * hn)
    m = kept(n, aux)
    h = m + z * (h0 - m)
    return (h,), (r, z, n, hn)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh,), (r, z, n, hn) = dstates, planes
    h0, keep = states[0], aux.noise.get("candidate", 1)
    dz = dh * (h0 - n * keep) * d_sigmoid(z)
    dn = dh * (1 - z) * keep * d_tanh(n)
    dr = dn * hn * d_sigmoid(r)
    dh0 = dh * z
    return (dr, dz, dn), (dr, dz, dn * r), (dh0,), ()


def jacobian(planes: Row, states: Row) -> Jacobian:
    (r, z, n, hn), h0 = planes, states[0]
    jn = (1 - z) * d_tanh(n)
    jr = jn * hn * d_sigmoid(r)
    jz = (h0 - n) * d_sigmoid(z)
    return Jacobian((torch.stack((jr, jz, jn), -2),), (torch.stack((jr, jz, jn * r), -2),), ((z,),))


def planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    (r, z, n, hn), thn = planes, tgh[2]
    tr = (tgx[0] + tgh[0]) * d_sigmoid(r)
    tz = (tgx[1] + tgh[1]) * d_sigmoid(z)
    tn = (tgx[2] + tr * hn + r * thn) * d_tanh(n)
    return tr, tz, tn, thn


def step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    (dh,), (r, z, n, hn), (tr, tz, tn, thn) = dstates, planes, tplanes
    h0, th0 = states[0], tstates[0]
    tdz = dh * ((th0 - tn) * d_sigmoid(z) + (h0 - n) * t_d_sigmoid(z, tz))
    dn = dh * (1 - z) * d_tanh(n)
    tdn = dh * ((1 - z) * t_d_tanh(n, tn) - tz * d_tanh(n))
    tdr = (tdn * hn + dn * thn) * d_sigmoid(r) + dn * hn * t_d_sigmoid(r, tr)
    return (tdr, tdz, tdn), (tdr, tdz, tdn * r + dn * tr), (dh * tz,)
