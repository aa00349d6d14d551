"""The equations of slstm in plain torch, and their derivatives by hand."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from rnnkern.cells.functions import d_sigmoid, d_tanh
from rnnkern.cells.spec import Aux, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    (_, c0, n0, m0), keep = states, aux.noise.get("candidate", 1)
    ai, af, az, ao = (x + h for x, h in zip(gx, gh, strict=True))
    z = torch.tanh(az)
    o = torch.sigmoid(ao)
    r = torch.sigmoid(-af)
    b = logsigmoid(af) + m0
    d = torch.where(n0 == 0, -math.inf, b - ai)
    i, f = torch.exp(-torch.relu(d)), torch.exp(d.clamp(max=0))
    c = f * c0 + i * (z * keep)
    n = f * n0 + i
    m = torch.where(d > 0, b, torch.where(d <= 0, ai, d))
    return (o * (c / n), c, n, m), (z, o, r, d)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh, dc, dn, dm), (z, o, r, d) = dstates, planes
    (h0, c0, n0, _), keep = states, aux.noise.get("candidate", 1)
    i, f = torch.exp(-torch.relu(d)), torch.exp(d.clamp(max=0))
    n = f * n0 + i
    q = (f * c0 + i * (z * keep)) / n
    dq = dh * o / n
    dc = dc + dq
    dn = dn - dq * q
    di = dc * (z * keep) + dn
    df = dc * c0 + dn * n0
    db = torch.where(d > 0, dm - di * i, df * f)
    gates = (dm - db, db * r, dc * (i * keep) * d_tanh(z), dh * q * d_sigmoid(o))
    return gates, gates, (torch.zeros_like(h0), dc * f, dn * f, db), ()
