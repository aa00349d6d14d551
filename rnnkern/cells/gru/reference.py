"""The equations of gru in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch

from rnnkern.cells.functions import d_sigmoid, d_tanh
from rnnkern.cells.spec import Aux, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    h0, keep = states[0], aux.noise.get("candidate", 1)
    r = torch.sigmoid(gx[0] + gh[0])
    z = torch.sigmoid(gx[1] + gh[1])
    hn = gh[2]
    n = torch.tanh(gx[2] + r * hn)
    h = n * keep + z * (h0 - n * keep)
    return (h,), (r, z, n, hn)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh,), (r, z, n, hn) = dstates, planes
    h0, keep = states[0], aux.noise.get("candidate", 1)
    dz = dh * (h0 - n * keep) * d_sigmoid(z)
    dn = dh * (1 - z) * keep * d_tanh(n)
    dr = dn * hn * d_sigmoid(r)
    dh0 = dh * z
    return (dr, dz, dn), (dr, dz, dn * r), (dh0,), ()
