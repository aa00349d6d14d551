"""The hand-written step_backward of every cell against autograd of its step, in fp64, with every option it has."""

from __future__ import annotations

import itertools

import pytest
import torch
from states import natural
from tolerance import check, check_grad
from torch.func import jvp

from rnnkern.cells import CELLS, Aux, CellSpec
from rnnkern.cells.functions import (
    clip,
    d_clip,
    d_normalise,
    d_relu,
    d_sigmoid,
    d_tanh,
    normalise,
    t_d_sigmoid,
    t_d_tanh,
)

D = torch.float64
ROWS, H = 5, 7


def option_sets(cell: CellSpec) -> list[tuple[str, ...]]:
    """None, each alone, and all together; peepholes come as three."""
    each = [("candidate",)] if "candidate" in cell.masks else []
    peepholes = tuple(name for name in cell.small if name.startswith("peephole"))
    norms = tuple(name for name in cell.small if name.startswith("ln_"))
    each += [names for names in (peepholes, norms) if names]
    if cell.has_c:
        each.append(("cell_clip",))
    return [(), *each, tuple(itertools.chain(*each))]


CASES = [
    pytest.param(cell, names, id="-".join((cell.name, *names)))
    for cell in CELLS.values()
    for names in dict.fromkeys(option_sets(cell))
]


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=D, requires_grad=True)


@pytest.mark.parametrize("cell, names", CASES)
def test_step_backward_is_the_derivative_of_step(cell, names):
    gx, gh = (tuple(draw(ROWS, H) for _ in cell.gates) for _ in range(2))
    states = natural(cell, [draw(ROWS, H) for _ in cell.states])
    params = {name: draw(H) for name in cell.small if name in names}
    noise = {name: (torch.rand(ROWS, H) > 0.4) * 1.7 for name in cell.masks if name in names}
    aux = Aux(params, {k: v.to(D) for k, v in noise.items()}, 0.9 if "cell_clip" in names else 0.0)
    new, planes = cell.step(gx, gh, states, aux)
    dnew = tuple(torch.randn_like(v) for v in new)
    wrt = [*gx, *gh, *states, *params.values()]
    truth = [
        torch.zeros_like(v) if d is None else d
        for d, v in zip(torch.autograd.grad(new, wrt, dnew, allow_unused=True), wrt, strict=True)
    ]
    dgx, dgh, dentering, dsmall = cell.step_backward(dnew, planes, states, aux)
    summed = [d.sum(0) for d in dsmall]
    check_grad([*dgx, *dgh, *dentering, *summed], truth, truth, cell.name)
    assert len(planes) == len(cell.planes) and len(new) == len(cell.states)


@pytest.mark.parametrize("cell", [cell for cell in CELLS.values() if cell.jacobian], ids=lambda cell: cell.name)
def test_jacobian_and_tangents_are_those_of_step_and_step_backward(cell):
    def rows(names):
        return tuple(torch.randn(ROWS, H, dtype=D) for _ in names)

    plain = Aux({}, {}, 0.0)
    primals = rows(cell.gates), rows(cell.gates), natural(cell, rows(cell.states))
    moved = tuple(rows(names) for names in (cell.gates, cell.gates, cell.states))
    (_, planes), truth = jvp(lambda *v: cell.step(*v, plain), primals, moved)
    jacobian, tplanes = cell.jacobian(planes, primals[2]), cell.planes_jvp(*moved[:2], planes, moved[2])
    new = []
    for gx, gh, states in zip(*jacobian, strict=True):
        terms = [gx * torch.stack(moved[0], -2), gh * torch.stack(moved[1], -2)]
        through = [j * t for j, t in zip(states, moved[2], strict=True) if j is not None]
        new.append(sum((term.sum(-2) for term in terms), sum(through, torch.zeros(ROWS, H, dtype=D))))
    check_grad([*new, *tplanes], [*truth[0], *truth[1]], [*truth[0], *truth[1]], cell.name)

    dstates = rows(cell.states)
    back = lambda *v: cell.step_backward(dstates, *v, plain)[:3]  # noqa: E731
    _, truth = jvp(back, (planes, primals[2]), (tplanes, moved[2]))
    ours = cell.step_backward_jvp(dstates, planes, tplanes, primals[2], moved[2])
    flat, expected = ([v for row in result for v in row] for result in (ours, truth))
    check_grad(flat, expected, expected, f"{cell.name}, backward")


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_split_names_the_gates_whose_gradients_differ(cell):
    gx, gh = (tuple(draw(ROWS, H) for _ in cell.gates) for _ in range(2))
    states = natural(cell, [draw(ROWS, H) for _ in cell.states])
    aux = Aux({}, {}, 0.0)
    _, planes = cell.step(gx, gh, states, aux)
    dgx, dgh, _, _ = cell.step_backward(tuple(torch.ones_like(s) for s in states), planes, states, aux)
    differ = tuple(g for g, a, b in zip(cell.gates, dgx, dgh, strict=True) if not torch.equal(a, b))
    assert differ == cell.split


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_step_is_torchs_cell(cell):
    modules = {
        "rnn_tanh": torch.nn.RNNCell(3, H, dtype=D),
        "rnn_relu": torch.nn.RNNCell(3, H, nonlinearity="relu", dtype=D),
        "lstm": torch.nn.LSTMCell(3, H, dtype=D),
        "gru": torch.nn.GRUCell(3, H, dtype=D),
    }
    if cell.name not in modules:
        pytest.skip(f"torch.nn has no {cell.name} cell")
    m, x = modules[cell.name], draw(ROWS, 3)
    states = natural(cell, [draw(ROWS, H) for _ in cell.states])
    gx = (x @ m.weight_ih.T + m.bias_ih).chunk(len(cell.gates), -1)
    gh = (states[0] @ m.weight_hh.T + m.bias_hh).chunk(len(cell.gates), -1)
    new, _ = cell.step(gx, gh, states, Aux({}, {}, 0.0))
    theirs = m(x, states if len(states) > 1 else states[0])
    theirs = list(theirs) if len(states) > 1 else [theirs]
    check(list(new), theirs, theirs, cell.name)


def test_shared_derivatives():
    v = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=D, requires_grad=True)
    for act, of_output in ((torch.sigmoid, d_sigmoid), (torch.tanh, d_tanh)):
        truth = torch.autograd.grad(act(v).sum(), v)
        check([of_output(act(v))], truth, truth, act.__name__)
    y, t = torch.rand(5, dtype=D), torch.randn(5, dtype=D)
    for of_output, moving in ((d_sigmoid, t_d_sigmoid), (d_tanh, t_d_tanh)):
        truth = jvp(of_output, (y,), (t,))[1]
        check([moving(y, t)], truth, truth, of_output.__name__)
    strange = torch.tensor([float("nan"), 1.0, float("nan"), float("nan"), float("inf")], dtype=D)
    for at, d in ((v, torch.randn(5, dtype=D)), (v, strange), (strange.clone().requires_grad_(), strange)):
        truth = torch.autograd.grad(at.relu(), at, d)
        check([d_relu(d, at.relu())], truth, truth, "relu")
    truth = torch.autograd.grad(clip(v, 0.7).sum(), v)
    check([d_clip(torch.ones_like(v), v, 0.7)], truth, truth, "clip")
    assert clip(v, 0.0) is v
    d = torch.randn(5, dtype=D)
    y, scale = normalise(v, 1e-5)
    truth = torch.autograd.grad(y, v, d)
    check([d_normalise(d, y, scale)], truth, truth, "layer norm")
    check(y, torch.layer_norm(v, (5,)), torch.layer_norm(v, (5,)), "layer norm")


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_go_through(cell, bad):
    gx, gh = (tuple(torch.zeros(1, 2, dtype=D) for _ in cell.gates) for _ in range(2))
    gx[0][0, 0] = bad
    for v in gx:
        v.requires_grad_()
    states = tuple(torch.ones(1, 2, dtype=D) for _ in cell.states)
    new, planes = cell.step(gx, gh, states, Aux({}, {}, 0.0))
    assert new[0][0, 1].isfinite()
    if bad != bad:
        assert all(v[0, 0].isnan() for v in new)
        ones = tuple(torch.ones_like(v) for v in new)
        dgx, *_ = cell.step_backward(ones, planes, states, Aux({}, {}, 0.0))
        truth = torch.autograd.grad(new, gx, ones)
        check(list(dgx), truth, truth, cell.name)
