"""The layer under torch's transforms: higher derivatives, forward mode, vmap, per-sample gradients, ensembles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import D, everything, gradients, random_call
from tolerance import check, check_grad
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from rnnkern import autograd
from rnnkern.cells import CELLS


def small(cell, **kw):
    return random_call(cell, T=2, B=2, I=2, H=2, **kw)


def loss(outputs):
    return sum(o.pow(2).sum() for o in outputs)


@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell):
    call = replace(small(cell), lengths=torch.tensor([2, 1]))
    assert torch.autograd.gradgradcheck(lambda *v: call.with_tensors(*v).run(), tuple(call.tensors))


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell, backend):
    """First derivatives are the backend's own, second ones the reference's: together they are those of the forward."""
    call = replace(random_call(cell), lengths=torch.tensor([4, 0, 2])).skip_if_refused(backend)
    results = []
    for run in (lambda: call.run(backend), call.written_out):
        first = torch.autograd.grad(loss(run()), call.tensors, create_graph=True)
        results.append([*first, *gradients(tuple(first), call.tensors)])
    ours, truth = results
    check_grad(ours, truth, truth, cell)


@pytest.mark.parametrize("cell, P", [("rnn_tanh", None), ("gru", None), ("lstm", None), ("lstm", 1)])
def test_second_derivatives_of_everything(cell, P):
    call = everything(cell, P, T=3, B=3, H=2)
    results = []
    for run in (lambda: call.run("reference"), call.written_out):
        first = torch.autograd.grad(loss(run()), call.tensors, create_graph=True)
        results.append([*first, *gradients(tuple(first), call.tensors)])
    ours, truth = results
    check_grad(ours, truth, truth, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_of_a_clipped_gradient(cell):
    """With grad_clip the backward is not the forward's gradient: what is differentiated again is the backward itself.

    The loss is linear, because through a dy that depends on y the second derivative would be clipped as well.
    """
    call = replace(random_call(cell, T=3, B=2, I=2, H=3), options={"grad_clip": 0.05})

    def first(x):
        outputs = replace(call, x=x).run()
        return torch.autograd.grad(outputs, x, [torch.ones_like(o) for o in outputs], create_graph=True)[0]

    free = torch.autograd.grad(replace(call, options={}).run()[0].sum(), call.x)[0]
    assert not torch.equal(free, torch.autograd.grad(call.run()[0].sum(), call.x)[0])
    assert torch.autograd.gradcheck(first, call.x)


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivatives(cell):
    call = small(cell, reverse=(False,))
    results = []
    for run in (lambda: call.run(), call.written_out):
        first = torch.autograd.grad(loss(run()), call.x, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), call.x, create_graph=True)[0]
        results.append(torch.autograd.grad(second.pow(2).sum(), call.tensors))
    check_grad(*results, results[1], cell)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_with_dual_numbers(cell, backend):
    call = random_call(cell).skip_if_refused(backend)
    values = [t.detach() for t in call.tensors]
    tangents = [torch.randn_like(v) for v in values]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        found = [forward_ad.unpack_dual(o) for o in call.with_tensors(*duals).run(backend)]
        primal = [f.primal.clone() for f in found]
        moved = [f.tangent.clone() for f in found]
    truth = jvp(lambda *v: call.with_tensors(*v).written_out(), tuple(values), tuple(tangents))
    check(primal, truth[0], truth[0], cell)
    check_grad(moved, truth[1], truth[1], cell)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_along_one_tensor(cell):
    """Tensors without a tangent do not move."""
    call = random_call(cell).detached()
    direction = torch.randn_like(call.x)
    _, ours = jvp(lambda x: replace(call, x=x).run(), (call.x,), (direction,))
    _, truth = jvp(lambda x: replace(call, x=x).written_out(), (call.x,), (direction,))
    check_grad(list(ours), list(truth), list(truth), cell)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_forward_mode(cell):
    call = small(cell)
    run = lambda *v: call.with_tensors(*v).run()  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(call.tensors), check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradcheck(run, tuple(call.tensors), check_batched_grad=True)


def batched(call, which, n=3):
    """The call's tensors, those that `which` selects stacked n times with other values; and the dims for vmap."""
    tensors, dims = [], []
    first_weight = 1 + len(call.states) + len(call.reset_states)
    for k, t in enumerate(call.detached().tensors):
        mapped = which == "both" or (k < first_weight) == (which == "inputs")
        tensors.append(t + 0.3 * torch.randn(n, *t.shape, dtype=D) if mapped else t)
        dims.append(0 if mapped else None)
    return tensors, tuple(dims)


def each(f, tensors, dims, n=3):
    parts = [f(*(t if d is None else t[i] for t, d in zip(tensors, dims, strict=True))) for i in range(n)]
    return [torch.stack(column) for column in zip(*parts, strict=True)]


CALLS = {
    **{cell: lambda cell=cell: random_call(cell) for cell in CELLS},
    "lstm_projected": lambda: random_call("lstm", P=2),
    "padded": lambda: replace(random_call("gru"), lengths=torch.tensor([2, 0, 4])),
    "packed": lambda: packed("lstm"),
    "everything gru": lambda: everything("gru"),
    "everything lstm": lambda: everything("lstm", 2),
}


def packed(cell):
    """Lengths 4, 3, 1: 8 rows."""
    call = random_call(cell, T=4, B=3)
    x = torch.randn(8, 1, 2, dtype=D, requires_grad=True)
    return replace(call, x=x, offsets=torch.tensor([0, 3, 5, 7]), lengths=torch.tensor([4, 3, 1]))


@pytest.mark.parametrize("which", ["inputs", "weights", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_vmap(name, which, backend):
    call = CALLS[name]().skip_if_refused(backend)
    tensors, dims = batched(call, which)

    def run(*v):
        return call.with_tensors(*v).run(backend)

    ours = vmap(run, dims)(*tensors)
    truth = each(run, tensors, dims)
    check(list(ours), truth, truth, f"{name} {which}")


def by_the_rule_for_functions(monkeypatch):
    """What torch would do: bring the Function itself through vmap."""
    monkeypatch.setattr(autograd, "beneath_vmap", lambda run, *arguments: run(*arguments))


def not_by_the_rule_for_functions(monkeypatch):
    def refuse(*_):
        raise AssertionError("the rule for functions")

    monkeypatch.setattr(autograd.LayerWithTangents, "vmap", refuse)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("which", ["inputs", "weights", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_alone_needs_no_rule_for_functions(name, which, gradient, monkeypatch):
    """One vmap and one within another, with a gradient to come outside of them and without: the same bits."""
    call = CALLS[name]()
    tensors, dims = batched(call, which)
    twice = [t if d is None else torch.stack((t, t + 0.1)) for t, d in zip(tensors, dims, strict=True)]
    run = vmap(lambda *v: call.with_tensors(*v).run(), dims)

    def results():
        found = []
        for f, values in ((run, tensors), (vmap(run, dims), twice)):
            values = [t.clone().requires_grad_(gradient) for t in values]
            outputs = f(*values)
            assert all(o.requires_grad == gradient for o in outputs)
            found += [*outputs, *(gradients(outputs, values) if gradient else ())]
        return found

    with monkeypatch.context() as patch:
        not_by_the_rule_for_functions(patch)
        ours = results()
    by_the_rule_for_functions(monkeypatch)
    assert all(map(torch.equal, ours, results()))


def test_vmap_among_other_transforms(monkeypatch):
    """Where the rule is left out and where it is not: forward mode outside, grad outside, a leaked tensor within."""
    call, leaked = random_call("gru").detached(), []
    xs, w = torch.randn(3, *call.x.shape, dtype=D), call.groups[0].w_ih
    grad(lambda x: (leaked.append(x * 1), x.sum())[1])(call.states[0])

    def run(x, w=w, state=call.states[0]):
        groups = (call.groups[0]._replace(w_ih=w), *call.groups[1:])
        return replace(call, x=x, groups=groups, states=(state,)).run()

    def dual():
        with forward_ad.dual_level():
            outputs = vmap(run)(forward_ad.make_dual(xs, torch.cos(xs)))
            return [t.clone() for o in outputs for t in forward_ad.unpack_dual(o)]

    cases = {
        "forward mode": dual,
        "a gradient outside": lambda: [grad(lambda w: loss(vmap(lambda x: run(x, w))(xs)))(w)],
        "a gradient between": lambda: [vmap(grad(lambda w: loss(vmap(lambda x: run(x, w))(xs))))(torch.stack((w, -w)))],
        "jvp outside": lambda: jvp(vmap(run), (xs,), (torch.cos(xs),))[1],
        "leaked": lambda: vmap(lambda x: run(x, state=leaked[0]))(xs),
        "nothing of the call is mapped": lambda: vmap(lambda k: run(xs[0])[0] * k)(torch.arange(3)),
    }
    ours = {name: case() for name, case in cases.items()}
    by_the_rule_for_functions(monkeypatch)
    for name, case in cases.items():
        truth = case()
        assert len(ours[name]) == len(truth) and all(map(torch.equal, ours[name], truth)), name


@pytest.mark.parametrize("which", ["inputs", "weights", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_vmapped_gradients(name, which, backend):
    """Per-sample gradients (inputs), and those of an ensemble (weights)."""
    call = CALLS[name]().skip_if_refused(backend)
    tensors, dims = batched(call, which)
    every = tuple(range(len(tensors)))

    def gradient(*v):
        return grad(lambda *u: loss(call.with_tensors(*u).run(backend)), every)(*v)

    ours = vmap(gradient, dims)(*tensors)
    truth = each(gradient, tensors, dims)
    check_grad(list(ours), truth, truth, f"{name} {which}")


@pytest.mark.parametrize("which", ["inputs", "weights"])
def test_vmap_over_other_axes(which):
    call = random_call("lstm", P=2).detached()
    tensors, dims = batched(call, which)
    turned = [t if d is None else t.movedim(0, -1) for t, d in zip(tensors, dims, strict=True)]
    run = lambda *v: call.with_tensors(*v).run()  # noqa: E731
    ours = vmap(run, tuple(None if d is None else -1 for d in dims))(*turned)
    truth = each(run, tensors, dims)
    check(list(ours), truth, truth, which)


@pytest.mark.parametrize("weights", [False, True])
def test_vmap_over_lengths(weights):
    """Folded into the rows with the inputs; with weights of their own as well, sample by sample."""
    call = random_call("gru").detached()
    tensors, dims = batched(call, "both" if weights else "inputs")
    lengths = torch.tensor([[4, 0, 2], [1, 2, 3], [4, 4, 4]])

    def gradient(lengths, *v):
        first = lambda x: loss(replace(call.with_tensors(x, *v[1:]), lengths=lengths).run())  # noqa: E731
        return grad(first)(v[0]), *replace(call.with_tensors(*v), lengths=lengths).run()

    ours = vmap(gradient, (0, *dims))(lengths, *tensors)
    truth = each(gradient, [lengths, *tensors], [0, *dims])
    check(list(ours), truth, truth, "lengths")


def test_vmap_over_masks():
    call = everything("lstm", 2).detached()
    reset = torch.rand(3, *call.reset.shape) < 0.4
    keep = torch.rand(3, *call.noise["h"][0].shape) < 0.6

    def run(reset, keep):
        return replace(call, reset=reset, noise=call.noise | {"h": (keep, 1.4)}).run()

    truth = each(run, [reset, keep], [0, 0])
    check(list(vmap(run)(reset, keep)), truth, truth, "masks")


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_within_vmap(cell):
    """Per-sample gradients of a batch of batches, and of an ensemble's members."""
    call = random_call(cell).detached()
    xs = torch.randn(2, 3, *call.x.shape, dtype=D)
    w = call.groups[0].params[0]
    ws = torch.stack([w, w + 0.3])

    def gradient(w, x):
        first, *others = call.groups
        changed = first._replace(params=(w, *first.params[1:]))
        return grad(
            lambda w, x: loss(
                replace(call, x=x, groups=(changed._replace(params=(w, *first.params[1:])), *others)).run()
            )
        )(w, x)

    inner = vmap(gradient, (None, 0))
    truth = torch.stack([torch.stack([gradient(w, x) for x in row]) for row in xs])
    check_grad(vmap(inner, (None, 0))(w, xs), truth, truth, "inputs twice")
    truth = torch.stack([torch.stack([gradient(w, x) for x in row]) for w, row in zip(ws, xs, strict=True)])
    check_grad(vmap(inner)(ws, xs), truth, truth, "weights, then inputs")


@pytest.mark.parametrize("cell", CELLS)
def test_jacobians_and_hessian(cell):
    call = small(cell, reverse=(False,)).detached()
    w = call.groups[0].params[0]

    def output(run):
        def f(w):
            group = call.groups[0]
            changed = replace(call, groups=(group._replace(params=(w, *group.params[1:])),))
            return changed.run()[0] if run == "ours" else changed.written_out()[0]

        return f

    truth = jacrev(output("truth"))(w)
    check_grad(jacrev(output("ours"))(w), truth, truth, "jacrev")
    check_grad(jacfwd(output("ours"))(w), truth, truth, "jacfwd")
    square = lambda f: lambda w: f(w).pow(2).sum()  # noqa: E731
    truth = hessian(square(output("truth")))(w)
    ours = square(output("ours"))
    for name, found in (
        ("forward over reverse", hessian(ours)),
        ("reverse over reverse", jacrev(jacrev(ours))),
        ("reverse over forward", jacrev(jacfwd(ours))),
        ("forward over forward", jacfwd(jacfwd(ours))),
    ):
        check_grad(found(w), truth, truth, name)


def test_vjp_of_a_vmapped_loss_differentiates_per_sample_gradients():
    """The norm of per-sample gradients as a penalty: second derivatives through the folded backward."""
    call = random_call("gru", T=2, B=2, H=3).detached()
    xs = torch.randn(3, *call.x.shape, dtype=D)

    def penalty(run):
        def f(w):
            def single(w, x):
                group = call.groups[0]._replace(w_ih=w)
                changed = replace(call, x=x, groups=(group, *call.groups[1:]))
                return loss(changed.run() if run == "ours" else changed.written_out())

            return vmap(grad(single), (None, 0))(w, xs).pow(2).sum()

        return f

    w = call.groups[0].w_ih
    found, truth = (vjp(penalty(run), w)[1](torch.ones((), dtype=D))[0] for run in ("ours", "truth"))
    check_grad(found, truth, truth, "penalty")


def test_tensor_that_leaked_out_of_a_transform(backend):
    """It is still wrapped, though its transform is over, and has no memory that a kernel could be given."""
    call, leaked = random_call("gru").skip_if_refused(backend), []
    grad(lambda x: (leaked.append(x * 1), x.sum())[1])(call.x.detach())
    expected = call.run(backend)
    for source in (call, call.detached()):
        found = replace(source, x=leaked[0]).run(backend)
        check(list(found), list(expected), list(expected), "leaked")
