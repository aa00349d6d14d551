"""The equations of slstm in plain torch, and their derivatives by hand."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from rnnkern.cells.functions import d_sigmoid, d_tanh, kept, t_d_sigmoid, t_d_tanh
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    _, c0, n0, m0 = states
    ai, af, az, ao = (x + h for x, h in zip(gx, gh, strict=True))
    z = torch.tanh(az)
    o = torch.sigmoid(ao)
    r = torch.sigmoid(-af)
    b = logsigmoid(af) + m0
    d = torch.where(n0 == 0, -math.inf, b - ai)
    i, f = torch.exp(-torch.relu(d)), torch.exp(d.clamp(max=0))
    c = f * c0 + i * kept(z, aux)
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


def jacobian(planes: Row, states: Row) -> Jacobian:
    (z, o, r, d), (_, c0, n0, _) = planes, states
    i, f, none = torch.exp(-torch.relu(d)), torch.exp(d.clamp(max=0)), torch.zeros_like(z)
    di, df, dm = (v.to(z.dtype) for v in (torch.where(d > 0, -i, 0), torch.where(d > 0, 0, f), d > 0))
    n = f * n0 + i
    q = (f * c0 + i * z) / n
    c_d, n_d, c_z = df * c0 + di * z, df * n0 + di, i * d_tanh(z)
    h_d, h_c = o * (c_d - q * n_d) / n, o / n
    c = torch.stack((-c_d, r * c_d, c_z, none), -2)
    n = torch.stack((-n_d, r * n_d, none, none), -2)
    m = torch.stack((1 - dm, r * dm, none, none), -2)
    h = torch.stack((-h_d, r * h_d, h_c * c_z, q * d_sigmoid(o)), -2)
    new = (h, c, n, m)
    through = ((None, h_c * f, -h_c * q * f, h_d), (None, f, None, c_d), (None, None, f, n_d), (None, None, None, dm))
    return Jacobian(new, new, through)


def planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    (ti, tf, tz, to), (z, o, r, _) = (x + h for x, h in zip(tgx, tgh, strict=True)), planes
    return tz * d_tanh(z), to * d_sigmoid(o), -tf * d_sigmoid(r), r * tf + tstates[3] - ti


def step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    (dh, dc, dn, dm), (z, o, r, d), (tz, to, tr, td) = dstates, planes, tplanes
    (h0, c0, n0, _), (_, tc0, tn0, _) = states, tstates
    i, f = torch.exp(-torch.relu(d)), torch.exp(d.clamp(max=0))
    ti, tf = torch.where(d > 0, -i * td, 0), torch.where(d > 0, 0, f * td)
    n, tn = f * n0 + i, tf * n0 + f * tn0 + ti
    q = (f * c0 + i * z) / n
    tq = (tf * c0 + f * tc0 + ti * z + i * tz - q * tn) / n
    dq = dh * o / n
    tdq = (dh * to - dq * tn) / n
    dc, tdc = dc + dq, tdq
    dn, tdn = dn - dq * q, -tdq * q - dq * tq
    di, tdi = dc * z + dn, tdc * z + dc * tz + tdn
    df, tdf = dc * c0 + dn * n0, tdc * c0 + dc * tc0 + tdn * n0 + dn * tn0
    db = torch.where(d > 0, dm - di * i, df * f)
    tdb = torch.where(d > 0, -tdi * i - di * ti, tdf * f + df * tf)
    tdz = (tdc * i + dc * ti) * d_tanh(z) + dc * i * t_d_tanh(z, tz)
    tdo = dh * (tq * d_sigmoid(o) + q * t_d_sigmoid(o, to))
    gates = (-tdb, tdb * r + db * tr, tdz, tdo)
    return gates, gates, (torch.zeros_like(h0), tdc * f + dc * tf, tdn * f + dn * tf, tdb)
