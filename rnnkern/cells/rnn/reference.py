"""The equations of rnn_tanh and rnn_relu in plain torch, and their derivatives by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern.cells.functions import d_relu, d_tanh, t_d_tanh
from rnnkern.cells.spec import Aux, Jacobian, Row, StepGrads


def tanh_step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    a = torch.tanh(gx[0] + gh[0])
    return (a,), (a,)


def tanh_step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    return _backward(dstates[0] * d_tanh(planes[0]), states)


def tanh_jacobian(planes: Row, states: Row) -> Jacobian:
    return _jacobian(d_tanh(planes[0]))


def tanh_planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    return ((tgx[0] + tgh[0]) * d_tanh(planes[0]),)


def tanh_step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    tda = dstates[0] * t_d_tanh(planes[0], tplanes[0])
    return (tda,), (tda,), (torch.zeros_like(states[0]),)


def relu_step(gx: Row, gh: Row, states: Row, aux: Aux) -> tuple[Row, Row]:
    a = torch.relu(gx[0] + gh[0])
    return (a,), (a,)


def relu_step_backward(dstates: Row, planes: Row, states: Row, aux: Aux) -> StepGrads:
    return _backward(d_relu(dstates[0], planes[0]), states)


def relu_jacobian(planes: Row, states: Row) -> Jacobian:
    return _jacobian(d_relu(torch.ones_like(planes[0]), planes[0]))


def relu_planes_jvp(tgx: Row, tgh: Row, planes: Row, tstates: Row) -> Row:
    return (d_relu(tgx[0] + tgh[0], planes[0]),)


def relu_step_backward_jvp(dstates: Row, planes: Row, tplanes: Row, states: Row, tstates: Row) -> tuple[Row, Row, Row]:
    none = torch.zeros_like(planes[0])
    return (none,), (none,), (torch.zeros_like(states[0]),)


def _backward(da: Tensor, states: Row) -> StepGrads:
    return (da,), (da,), (torch.zeros_like(states[0]),), ()


def _jacobian(da: Tensor) -> Jacobian:
    rows = (da.unsqueeze(-2),)
    return Jacobian(rows, rows, ((None,),))
