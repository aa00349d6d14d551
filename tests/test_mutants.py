"""Tests of the tests: ten errors that are easy to make, each of which the checks must see.

A mutant changes one line of the reference, of a cell or of the layer. The check that passes on the code as it is must
fail on the mutant. Mutants of the backward leave the truth alone: torch's autograd of the reference's forward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import everything, gradients, random_call
from tolerance import check, check_grad
from torch.func import grad, vmap

from rnnkern import _fold, _tangents
from rnnkern.backends import reference
from rnnkern.cells import CELLS

NAMES = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")


def backward_is_the_derivative(call):
    """The heart of test_contract's test_everything_at_once."""
    truth = call.written_out()
    ours = call.run()
    check(list(ours), list(truth), list(truth))
    expected = gradients(truth, call.tensors)
    check_grad(gradients(ours, call.tensors), expected, expected)


def walks_as_torch(call):
    """The heart of test_contract's test_torch_nn: the one judge of a forward that is wrong in itself."""
    m = torch.nn.GRU(2, 4, bidirectional=True, dtype=torch.float64)
    parameters = [p for name in ("", "_reverse") for p in (getattr(m, f"{k}_l0{name}") for k in NAMES)]
    for p, mine in zip(parameters, [v for g in call.groups for v in (g.w_ih, g.b_ih, *g.params)], strict=True):
        p.data.copy_(mine)
    truth, final = m(call.x.view(call.T, call.B, 2), call.states[0])
    ours = call.run()
    check([ours[0].flatten(1), ours[1]], [truth.flatten(0, 1), final], [truth.flatten(0, 1), final])


def samples_stay_apart(call):
    """The heart of test_contract_transforms' test_vmapped_gradients."""
    xs = torch.randn(3, *call.x.shape, dtype=torch.float64)
    fixed = call.detached()
    f = grad(lambda x: replace(fixed, x=x).run()[0].pow(2).sum())
    truth = torch.stack([f(x) for x in xs])
    check_grad(vmap(f)(xs), truth, truth)


def gru_shares_its_gate_gradients(patch):
    gru = CELLS["gru"]

    def step_backward(*args):
        dgx, _, dentering, dsmall = gru.step_backward(*args)
        return dgx, dgx, dentering, dsmall

    patch.setitem(CELLS, "gru", replace(gru, step_backward=step_backward))


def mask_is_left_out_of_dh(patch):
    honest = reference.Group.d_product
    patch.setattr(reference.Group, "d_product", lambda self, dprod, keep: honest(self, dprod, None))


def gradient_leaks_through_a_reset(patch):
    honest = reference.Reference._d_enter

    def leaking(d, drestart, reset, step):
        return d, honest(d, drestart, reset, step)[1]

    patch.setattr(reference.Reference, "_d_enter", staticmethod(leaking))


def projection_gradient_is_scaled(patch):
    honest = reference.Group.d_project
    patch.setattr(reference.Group, "d_project", lambda self, dh, hidden: 0.5 * honest(self, dh, hidden))


def reverse_walks_forward(patch):
    honest = reference.Group.walk

    def walk(self):
        return sorted(honest(self), key=lambda step: step.rows[0].item())

    patch.setattr(reference.Group, "walk", walk)


def fold_puts_samples_on_the_wrong_side(patch):
    def put(self, v, dim, kind):
        if kind != "rows" or v.dim() - (dim is not None) == 1:
            return honest(self, v, dim, kind)
        n = self.n
        v = v.unsqueeze(0).expand(n, *v.shape) if dim is None else v.movedim(dim, 0)
        return v.flatten(0, 1)  # row = i * S + s, not s * n + i

    honest = _fold.Fold.put
    patch.setattr(_fold.Fold, "put", put)


def clip_is_left_out_of_the_gradient(patch):
    patch.setattr("rnnkern.cells.lstm.reference.d_clip", lambda d, v, bound: d)


def layer_norm_forgets_a_term(patch):
    patch.setattr(reference, "d_normalise", lambda d, y, scale: scale * (d - d.mean(-1, keepdim=True)))


def second_derivatives_are_right(call):
    """The heart of test_contract_transforms' test_second_derivatives."""
    found = []
    for outputs in (call.run(), call.written_out()):
        (first,) = torch.autograd.grad(sum(o.pow(2).sum() for o in outputs), call.x, create_graph=True)
        found.append(gradients((first,), call.tensors))
    check_grad(found[0], found[1], found[1])


def activations_are_held(patch):
    gru = CELLS["gru"]
    patch.setitem(
        CELLS, "gru", replace(gru, planes_jvp=lambda tgx, tgh, planes, _: tuple(map(torch.zeros_like, planes)))
    )


def factors_are_held(patch):
    honest = _tangents.layer_gradients

    def without(plan, inputs, x, w_ih, y, hidden, d, wanted, in_place):
        return honest(plan, inputs, x, w_ih, y * 0, hidden, d, wanted, in_place)

    patch.setattr(_tangents, "layer_gradients", without)


MUTANTS = {
    gru_shares_its_gate_gradients: (backward_is_the_derivative, lambda: random_call("gru")),
    mask_is_left_out_of_dh: (backward_is_the_derivative, lambda: everything("gru")),
    gradient_leaks_through_a_reset: (backward_is_the_derivative, lambda: everything("rnn_tanh")),
    projection_gradient_is_scaled: (backward_is_the_derivative, lambda: random_call("lstm", P=2)),
    reverse_walks_forward: (walks_as_torch, lambda: replace(random_call("gru"), lengths=torch.full((3,), 4))),
    fold_puts_samples_on_the_wrong_side: (samples_stay_apart, lambda: random_call("gru")),
    clip_is_left_out_of_the_gradient: (backward_is_the_derivative, lambda: everything("lstm")),
    activations_are_held: (second_derivatives_are_right, lambda: random_call("gru")),
    factors_are_held: (second_derivatives_are_right, lambda: random_call("lstm")),
    layer_norm_forgets_a_term: (backward_is_the_derivative, lambda: everything("rnn_tanh")),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    judge, make = MUTANTS[mutant]
    call = make()
    judge(call)
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"error|cosine|L2"):
        judge(call)
