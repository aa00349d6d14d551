"""The equations of lstm in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern.cells.functions import clip, d_clip, d_normalise, d_sigmoid, d_tanh, kept, normalise, t_d_sigmoid, t_d_tanh
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    p, c0 = aux.params, states[1]
    ai, af, ag, ao = (x + h for x, h in zip(gx, gh, strict=True))
    if "peephole_i" in p:
        ai, af = ai + p["peephole_i"] * c0, af + p["peephole_f"] * c0
    i = torch.sigmoid(ai)
    f = torch.sigmoid(af)
    g = torch.tanh(ag)
    c = clip(f * c0 + i * kept(g, aux), aux.cell_clip)
    o = torch.sigmoid(ao + p["peephole_o"] * c if "peephole_o" in p else ao)
    h = o * torch.tanh(_output(c, aux)[0])
    return (h, c), (i, f, g, o)


def step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    (dh, dc), (i, f, g, o) = dstates, planes
    p, c0, keep = aux.params, states[1], aux.noise.get("candidate", 1)
    raw = f * c0 + i * (g * keep)
    c = clip(raw, aux.cell_clip)
    v, normed, scale = _output(c, aux)
    u = torch.tanh(v)
    do = dh * u * d_sigmoid(o)
    dv = dh * o * d_tanh(u)
    dc = dc + (d_normalise(dv * p["ln_c"], normed, scale) if "ln_c" in p else dv)
    if "peephole_o" in p:
        dc = dc + do * p["peephole_o"]
    dc = d_clip(dc, raw, aux.cell_clip)
    di = dc * (g * keep) * d_sigmoid(i)
    df = dc * c0 * d_sigmoid(f)
    dg = dc * (i * keep) * d_tanh(g)
    dc0 = dc * f
    if "peephole_i" in p:
        dc0 = dc0 + di * p["peephole_i"] + df * p["peephole_f"]
    small = {
        "peephole_i": di * c0,
        "peephole_f": df * c0,
        "peephole_o": do * c,
        "ln_c": dv * normed,
        "ln_c_bias": dv,
    }
    gates = (di, df, dg, do)
    return gates, gates, (torch.zeros_like(states[0]), dc0), tuple(d for name, d in small.items() if name in p)


def jacobian(planes: Row, states: Row) -> Jacobian:
    (i, f, g, o), c0 = planes, states[1]
    u = torch.tanh(f * c0 + i * g)
    dc = o * d_tanh(u)
    ji, jf, jg = g * d_sigmoid(i), c0 * d_sigmoid(f), i * d_tanh(g)
    c = torch.stack((ji, jf, jg, torch.zeros_like(o)), -2)
    h = torch.stack((ji * dc, jf * dc, jg * dc, u * d_sigmoid(o)), -2)
    return Jacobian((h, c), (h, c), ((None, dc * f), (None, f)))


def planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    (ti, tf, tg, to), (i, f, g, o) = (x + h for x, h in zip(tgx, tgh, strict=True)), planes
    return ti * d_sigmoid(i), tf * d_sigmoid(f), tg * d_tanh(g), to * d_sigmoid(o)


def step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    (dh, dc), (i, f, g, o), (ti, tf, tg, to) = dstates, planes, tplanes
    c0, tc0 = states[1], tstates[1]
    u = torch.tanh(f * c0 + i * g)
    tu = d_tanh(u) * (tf * c0 + f * tc0 + ti * g + i * tg)
    tdo = dh * (tu * d_sigmoid(o) + u * t_d_sigmoid(o, to))
    dc = dc + dh * o * d_tanh(u)
    tdc = dh * (to * d_tanh(u) + o * t_d_tanh(u, tu))
    tdi = (tdc * g + dc * tg) * d_sigmoid(i) + dc * g * t_d_sigmoid(i, ti)
    tdf = (tdc * c0 + dc * tc0) * d_sigmoid(f) + dc * c0 * t_d_sigmoid(f, tf)
    tdg = (tdc * i + dc * ti) * d_tanh(g) + dc * i * t_d_tanh(g, tg)
    tdc0 = tdc * f + dc * tf
    gates = (tdi, tdf, tdg, tdo)
    return gates, gates, (torch.zeros_like(states[0]), tdc0)


def _output(c: Tensor, aux: Aux) -> tuple[Tensor, Tensor, Tensor]:
    """What tanh is applied to, and the two tensors that layer norm's derivative reads (c and c without it)."""
    if "ln_c" not in aux.params:
        return c, c, c
    normed, scale = normalise(c, aux.eps)
    return normed * aux.params["ln_c"] + aux.params["ln_c_bias"], normed, scale
