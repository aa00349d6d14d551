"""The equations of ligru in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch

from rnnkern.cells.functions import d_relu, d_sigmoid, kept, t_d_sigmoid
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    h0 = states[0]
    z = torch.sigmoid(gx[0] + gh[0])
    n = torch.relu(gx[1] + gh[1])
    m = kept(n, aux)
    h = m + z * (h0 - m)
    return (h,), (z, n)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh,), (z, n) = dstates, planes
    h0, keep = states[0], aux.noise.get("candidate", 1)
    dz = dh * (h0 - n * keep) * d_sigmoid(z)
    dn = d_relu(dh * (1 - z) * keep, n)
    dh0 = dh * z
    return (dz, dn), (dz, dn), (dh0,), ()


def jacobian(planes: Row, states: Row) -> Jacobian:
    (z, n), h0 = planes, states[0]
    h = (torch.stack(((h0 - n) * d_sigmoid(z), d_relu(1 - z, n)), -2),)
    return Jacobian(h, h, ((z,),))


def planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    z, n = planes
    return (tgx[0] + tgh[0]) * d_sigmoid(z), d_relu(tgx[1] + tgh[1], n)


def step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    (dh,), (z, n), (tz, tn) = dstates, planes, tplanes
    h0, th0 = states[0], tstates[0]
    tdz = dh * ((th0 - tn) * d_sigmoid(z) + (h0 - n) * t_d_sigmoid(z, tz))
    tdn = d_relu(-dh * tz, n)
    return (tdz, tdn), (tdz, tdn), (dh * tz,)
