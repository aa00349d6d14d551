"""The tangent pass: scan by scan against the reference differentiated, call by call against finite differences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import Call, D, everything, gradients, random_call
from scans import REFERENCE, Case, drawn, existing, gradients_of, inputs_of, jumps, wide
from stacks import KINDS, example, flat
from tolerance import check, check_grad
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jvp
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern import _backward, autograd
from rnnkern._tangent_scan import Direction, Gradients, TangentScan
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs
from rnnkern.cells import CELLS

AXES: dict[str, list] = {
    "T": [1, 2, 5],
    "B": [1, 4],
    "H": [1, 6],
    "layout": ["dense", "packed", "padded", "padded"],
    "reverse": [(False,), (True,), (False, True), (False, True, True, False)],
    "bias": [True, False],
    "project": [False, True],
    "strided": [False, True],
    "dseq": [True, False],
    "reset": ["", "zero", "learned"],
}
# relu's derivative jumps: where rounding moves a unit past 0, no bound holds. Of 16 bits a layer's test is below: few
# saturated units are no fair sample, for the reference moves them by activations that were not rounded.
CASES = [c for c in drawn(12, AXES) if c.dtype == D or (c.dtype == torch.float32 and not jumps(c.cell))]


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Each decision whether the tangent pass serves a call."""
    seen: list[bool] = []
    with monkeypatch.context() as patch:
        for module in (autograd, _backward):
            honest = module.serves
            patch.setattr(module, "serves", lambda *a, honest=honest: (seen.append(honest(*a)), seen[-1])[1])
        yield seen


# ---- scans -----------------------------------------------------------------------------------------------------------


class Scan:
    """A case with a direction: what moves as flat lists of tensors, in which nothing lies past a length but NaN."""

    def __init__(self, case: Case) -> None:
        self.inputs, d = inputs_of(case), gradients_of(case, inputs_of(case))
        self.d = (d[0], *d[1], *d[2])
        torch.manual_seed(case.seed)
        self.moving = [self.inputs.gx, *self.inputs.states, *(p for group in self.inputs.params for p in group)]
        self.moving += [*self.inputs.reset_states, *self.d]
        self.tangents = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in self.moving]
        past, first_d = ~existing(self.inputs), len(self.moving) - len(self.d)
        for t in (self.tangents[0], self.tangents[first_d], *self.tangents[first_d + 1 + len(d[1]) :]):
            if t.dim() > 1:
                t[past] = float("nan")

    def taken(self, tensors: list[Tensor]) -> tuple[ScanInputs, tuple[Any, Any, Any]]:
        rest, K = iter(tensors), len(self.inputs.states)
        take = lambda count: tuple(next(rest) for _ in range(count))  # noqa: E731
        (gx,), states = take(1), take(K)
        params = tuple(take(len(self.inputs.spec.params)) for _ in self.inputs.params)
        inputs = replace(
            self.inputs, gx=gx, states=states, params=params, reset_states=take(len(self.inputs.reset_states))
        )
        return inputs, (*take(1), take(K), take(K - 1))

    def reference(self, *tensors: Tensor) -> list[Tensor]:
        inputs, d = self.taken(list(tensors))
        out = REFERENCE.forward(inputs)
        return results(out, REFERENCE.backward(inputs, out, *d))

    def differentiated(self, exact: bool) -> list[Tensor]:
        primals, tangents = (tuple((wide(t) if exact else t).clone() for t in v) for v in (self.moving, self.tangents))
        return list(jvp(self.reference, primals, tangents)[1])

    def passed(self) -> list[Tensor]:
        along, td = self.taken(self.tangents)
        direction = Direction(along.gx, along.states, along.params, along.reset_states)
        scan = TangentScan(self.inputs, replace(REFERENCE.forward(self.inputs), final=()))
        moved = scan.forward(direction)
        _, d = self.taken(self.moving)
        back = scan.backward_jvp(scan.backward(Gradients(*d)), Gradients(*td), moved, direction)
        return results(moved.outputs, scan.gradients(back))


def results(out: ScanOutputs, grads: ScanGrads) -> list[Tensor]:
    return [
        out.y,
        *out.final,
        *out.seq,
        out.hidden,
        grads.dgx,
        grads.dgh,
        grads.dh,
        *grads.dstates,
        *grads.dreset_states,
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_against_the_reference_differentiated(case):
    scan = Scan(case)
    ours = scan.passed()
    check_grad(ours, scan.differentiated(exact=False), scan.differentiated(exact=True), str(case), case.dtype)
    assert all(t.isfinite().all() for t in ours)


# ---- layers ----------------------------------------------------------------------------------------------------------


def second(call: Call, run: str, wrt: list[int], loss: str = "all") -> list[Tensor]:
    """First and second derivatives with respect to some of the call's tensors."""
    outputs = call.run("cpp" if run == "ours" else "reference") if run != "truth" else call.written_out()
    outputs = outputs if loss == "all" else outputs[:1]
    leaves = [call.tensors[i] for i in wrt]
    first = torch.autograd.grad(sum(o.pow(2).sum() for o in outputs), leaves, create_graph=True, allow_unused=True)
    there = [d for d in first if d is not None]
    return [*there, *gradients(tuple(there), leaves)]


@pytest.mark.parametrize("layout", ["dense", "padded", "reset"])
@pytest.mark.parametrize("cell", CELLS)
def test_subsets_of_the_inputs(cell, layout, monkeypatch):
    """Gradient penalties on x, on the states, on weights alone: what does not move is not asked for either."""
    call = random_call(cell, P=2 if cell == "lstm" else None)
    if layout == "padded":
        call = replace(call, lengths=torch.tensor([4, 0, 2]))
    if layout == "reset":
        restart = tuple(torch.randn_like(s).requires_grad_() for s in call.states)
        call = replace(call, reset=torch.rand(call.T * call.B, 2) < 0.4, reset_states=restart)
    count, K = len(call.tensors), len(call.states)
    weights = 1 + K + len(call.reset_states)
    for wrt in ([0], list(range(1, 1 + K)), [weights], list(range(weights, count)), list(range(count))):
        fixed = call.detached()
        tensors = [t.requires_grad_(i in wrt) for i, t in enumerate(fixed.tensors)]
        part = fixed.with_tensors(*tensors)
        with watched(monkeypatch) as seen:
            ours = second(part, "ours", wrt, "y")
        assert seen == [True]
        truth = second(part, "truth", wrt, "y")
        check_grad(ours, truth, truth, f"{cell} {wrt}")


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_served_goes_through_the_reference(cell, monkeypatch):
    """Options beyond torch's, and no rows at all."""
    for call in (everything(cell, T=2, B=2, H=2), random_call(cell, B=0)):
        with watched(monkeypatch) as seen:
            gradients(tuple(torch.autograd.grad(call.run()[0].sum(), call.tensors, create_graph=True)), call.tensors)
        assert seen == [False]


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_differentiated_once_more(cell, monkeypatch):
    """Third derivatives, and gradients of what forward mode gives: the reference's, made when they are asked for."""
    call = random_call(cell)
    v = torch.randn_like(call.x)
    found = []
    for served in (True, False):
        with watched(monkeypatch) as seen, monkeypatch.context() as patch:
            if not served:
                patch.setattr(autograd, "serves", lambda *_: False)
                patch.setattr(_backward, "serves", lambda *_: False)
            (first,) = torch.autograd.grad(call.run()[0].pow(3).sum(), call.x, create_graph=True)
            second = torch.autograd.grad(first, call.tensors, v, create_graph=True, allow_unused=True)
            with forward_ad.dual_level():
                dual = call.with_tensors(forward_ad.make_dual(call.x, v), *call.tensors[1:])
                moved = forward_ad.unpack_dual(dual.run()[0]).tangent
            there = [d for d in (*second, moved) if d is not None]
            found.append([*there, *gradients(tuple(there), call.tensors)])
        assert all(seen) and len(seen) == (3 if served else 0)
    check_grad(found[0], found[1], found[1], cell)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_reaches_no_second_derivative(cell):
    lengths, T, B = torch.tensor([4, 0, 2]), 4, 3
    past = (torch.arange(T)[:, None] >= lengths).reshape(-1)
    call = replace(random_call(cell, T=T, B=B), lengths=lengths)
    found = []
    for bad in (float("nan"), 0.0):
        x = call.x.detach().clone()
        x[past] = bad
        given = replace(call, x=x.requires_grad_())
        y = given.run()[0]
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        found.append([first, *torch.autograd.grad(first[~past].pow(2).sum(), given.tensors, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not jumps(cell)])  # there no bound holds, as above
def test_low_precision(cell, dtype, backend, monkeypatch):
    """Second derivatives on every backend's own activations; the yardstick is the reference differentiated."""
    exact = random_call(cell, T=6, B=5, I=8, H=17)
    low = [t.detach().to(dtype) for t in exact.tensors]
    low[2 : 1 + len(exact.states)] = [t.float() for t in low[2 : 1 + len(exact.states)]]
    found = []
    for tensors, name in ((low, backend), (low, "reference"), ([t.double() for t in low], None)):
        call = exact.with_tensors(*(t.clone().requires_grad_() for t in tensors))
        outputs = call.skip_if_refused(name).run(name) if name else call.written_out()
        (first,) = torch.autograd.grad(outputs[0].double().pow(2).sum(), call.x, create_graph=True)
        with monkeypatch.context() as patch:
            if name == "reference":
                patch.setattr(_backward, "serves", lambda *_: False)
            second = torch.autograd.grad(first.double().pow(2).sum(), call.tensors, allow_unused=True)
        found.append([d for d in second if d is not None])
    check_grad(*found, f"{cell} {backend}", dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("where", ["x", "h", "v"])
def test_nan_goes_where_the_reference_sends_it(cell, where):
    call = random_call(cell, reverse=(False,))
    v = torch.randn_like(call.x)
    with torch.no_grad():
        {"x": call.x, "h": call.states[0], "v": v}[where].flatten()[3] = float("nan")
    found = []
    for run in ("ours", "truth"):
        outputs = call.run() if run == "ours" else call.written_out()
        (first,) = torch.autograd.grad(outputs[0].pow(2).sum(), call.x, create_graph=True)
        found.append(torch.autograd.grad(first, [call.x, *call.groups[0].params], v))
    if jumps(cell) and where == "v":  # there it goes further: zero times NaN at a unit that is off
        found[0] = [torch.where(b.isfinite(), b, a) for a, b in zip(*found, strict=True)]
    check(*found, found[1], f"{cell} {where}")


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "unsorted"])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, layers, bidirectional, layout):
    """First and second derivatives and forward mode, in evaluation mode too; only the judge is fast."""
    options = {"proj_size": 1} if "proj" in kind else KINDS[kind]
    module = getattr(rnnkern, kind.split()[0])(2, 2, layers, bidirectional=bidirectional, dtype=D, **options)
    module.train(layers == 1)
    _, _, leaves = example(module, "dense", T=2, B=2)
    names, weights = zip(*module.named_parameters(), strict=True)
    numbered = torch.arange(4).view(2, 2, 1)  # torch's own packing knows no forward mode
    packed = pack_padded_sequence(numbered, torch.tensor([1, 2]), enforce_sorted=False)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states, parameters = tensors[: len(leaves) - 1], dict(zip(names, tensors[len(leaves) - 1 :], strict=True))
        given = x if layout == "dense" else PackedSequence(x.flatten(0, 1)[packed.data[:, 0]], *packed[1:])
        return tuple(flat(functional_call(module, parameters, (given, states if len(states) > 1 else states[0]))))

    tensors = (*leaves, *weights)
    assert gradcheck(run, tensors, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(run, tensors, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_vector_products(kind):
    """Forward over reverse by torch.func and by dual numbers, reverse over reverse, and rows of a Jacobian."""
    options = {"proj_size": 1} if "proj" in kind else KINDS[kind]
    module = getattr(rnnkern, kind.split()[0])(2, 3, bidirectional=True, dtype=D, **options)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    x = torch.randn(3, 2, 2, dtype=D)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (x,))[0].pow(3).sum()

    forward = jvp(grad(loss), (parameters,), (along,))[1]
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    reverse = torch.autograd.grad(first, list(leaves.values()), list(along.values()))
    check_grad(list(forward.values()), reverse, reverse, kind)

    output = lambda x: functional_call(module, parameters, (x,))[0]  # noqa: E731
    jacobian, v = jacfwd(output)(x), torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))[0]).tangent
    truth = torch.einsum("abcdef,def->abc", jacobian, v)
    check_grad(moved, truth, truth, kind)
