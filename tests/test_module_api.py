"""What surrounds a module's forward: state dicts, pickles, copies, hooks, parametrizations, swapped weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, D, call_backends, draw, flat, gradients, pair
from tolerance import check
from torch import nn

import rnnkern

everything = pytest.mark.parametrize("kind", [*KINDS, *CELLS])
X = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def same(a: Any, b: Any, what: str = "") -> None:
    theirs = flat(b(X))
    check(flat(a(X)), theirs, theirs, what)


@everything
def test_is_torch_s(kind: str) -> None:
    both = pair(kind, 3, 5)
    assert isinstance(both.ours, type(both.theirs))
    assert repr(both.ours) == repr(both.theirs)
    assert list(both.ours.state_dict()) == list(both.theirs.state_dict())
    for p, q in zip(both.ours.parameters(), both.theirs.parameters(), strict=True):
        assert p.shape == q.shape and p.dtype == q.dtype
    keyword_only = [
        p.name for p in inspect.signature(type(both.ours).forward).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    assert keyword_only == ([] if "Cell" in kind else ["lengths", "reset", "reset_state", "return_states"])


@everything
def test_one_seed_one_initialisation(kind: str) -> None:
    made = []
    for namespace in (torch.nn, rnnkern):
        torch.manual_seed(4)
        made.append(getattr(namespace, kind.split()[0])(3, 5, **{**KINDS, **CELLS}[kind]))
    for p, q in zip(*(m.parameters() for m in made), strict=True):
        assert torch.equal(p, q)


@everything
def test_state_dicts_both_ways(kind: str) -> None:
    both, other = pair(kind, 3, 5), pair(kind, 3, 5)
    both.theirs.load_state_dict(other.ours.state_dict())
    both.ours.load_state_dict(other.theirs.state_dict())
    same(both.ours, both.theirs)


@everything
def test_pickle_copy_and_save(kind: str) -> None:
    module = pair(kind, 3, 5).ours
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(twin) is type(module)
        same(twin, module)
        for p, q in zip(twin.parameters(), module.parameters(), strict=True):
            assert p is not q
    shallow = copy.copy(module)
    same(shallow, module)


@everything
def test_moves_and_casts(kind: str) -> None:
    module = pair(kind, 3, 5).ours
    assert all(t.dtype == torch.float32 for t in flat(module.float()(X.float())))
    assert all(t.dtype == torch.bfloat16 for t in flat(module.bfloat16()(X.bfloat16())))
    assert module.to("meta").weight_hh_l0.is_meta if "Cell" not in kind else module.to("meta").weight_hh.is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert all(t.isfinite().all() for t in flat(module(X.bfloat16())))


@everything
def test_hooks(kind: str) -> None:
    module, seen = pair(kind, 3, 5).ours, []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    sum(o.sum() for o in flat(module(X.clone().requires_grad_()))).backward()
    assert seen == ["before", "after", "backward"]


def test_keywords_reach_hooks() -> None:
    module, seen = rnnkern.GRU(3, 5), []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    module(torch.zeros(4, 2, 3), lengths=[1, 2])
    assert seen == [{"lengths": [1, 2]}]


@pytest.mark.parametrize("backend", call_backends())
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_at_each_call(kind: str, backend: str) -> None:
    """Replaced, changed in place past autograd's notice, dropped, normed (both forms), swapped by functional_call."""
    both = pair(kind, 3, 5, bidirectional=True, backend=backend)

    def compare(what: str) -> None:
        theirs = flat(both.theirs(X))
        check(flat(both.run_ours(X)), theirs, theirs, what)

    for m in (both.theirs, both.ours):
        m.weight_hh_l0.data.mul_(1.5)
    compare("in place")
    new = torch.randn_like(both.ours.weight_ih_l0)
    for m in (both.theirs, both.ours):
        m.weight_ih_l0 = nn.Parameter(new.clone())
    compare("replaced")
    swapped = {n: torch.randn_like(p) for n, p in both.ours.named_parameters()}
    with rnnkern.use_backend(backend):
        ours = flat(torch.func.functional_call(both.ours, swapped, (X,)))
    theirs = flat(torch.func.functional_call(both.theirs, swapped, (X,)))
    check(ours, theirs, theirs, "functional_call")
    compare("after functional_call")
    for m in (both.theirs, both.ours):  # weight drop as it is commonly written: a tensor where the parameter was
        raw = m.weight_hh_l0
        del m.weight_hh_l0
        m.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        torch.manual_seed(1)
        m.weight_hh_l0 = torch.dropout(m.weight_hh_l0_raw, 0.5, True)
    compare("weight drop")
    wrt = [m.weight_hh_l0_raw for m in (both.ours, both.theirs)]
    expected = gradients(flat(both.theirs(X)), wrt[1:])
    check(gradients(flat(both.run_ours(X)), wrt[:1]), expected, expected, "gradient of a dropped weight")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("backend", call_backends())
def test_weight_norm_of_both_forms(backend: str) -> None:
    for norm in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        both = pair("LSTM", 3, 5, backend=backend)
        for m in (both.theirs, both.ours):
            torch.manual_seed(0)
            norm(m, "weight_hh_l0")
        both.compare(X, None, [], norm.__name__)
        for m in (both.theirs, both.ours):
            with torch.no_grad():
                for p in m.parameters():
                    p.mul_(0.7)
        both.compare(X, None, [], f"{norm.__name__} after a step")


@everything
def test_tied_weights(kind: str) -> None:
    """One parameter in two modules: its gradients add up."""
    first, second = pair(kind, 3, 5), pair(kind, 3, 5)
    name = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    for a, b in ((first.ours, second.ours), (first.theirs, second.theirs)):
        setattr(b, name, getattr(a, name))
    ours, theirs = (
        [*flat(first_m(X)), *flat(second_m(X))]
        for first_m, second_m in ((first.ours, second.ours), (first.theirs, second.theirs))
    )
    expected = gradients(theirs, [getattr(first.theirs, name)])
    check(gradients(ours, [getattr(first.ours, name)]), expected, expected, "tied")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@everything
def test_a_traced_module_needs_no_rnnkern(kind: str) -> None:
    """torch.jit.trace records torch's own ops; other inputs of the same rank give the right results."""
    module = pair(kind, 3, 5).ours
    traced = torch.jit.trace(module, (X,))
    graph = str(traced.inlined_graph)
    assert "rnnkern::" not in graph and "^" not in graph  # neither an op nor a Function of ours
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for x in (X, X[:2] * 2):
        theirs = flat(module(x))
        check(flat(torch.jit.load(file)(x)), theirs, theirs, "loaded")
        file.seek(0)


def test_exports() -> None:
    """torch.export records the scan op once."""
    module, x = rnnkern.GRU(3, 5, 2).double().eval(), torch.randn(4, 2, 3, dtype=D)
    with torch._dynamo.config.patch(allow_rnn=True):
        program = torch.export.export(module, (x,), strict=False)
    theirs = flat(module(2 * x))
    check(flat(program.module()(2 * x)), theirs, theirs, "exported")


def test_autograd_tools(backend: str) -> None:
    """Checkpointing, saved-tensor hooks, retain_graph, anomaly mode and inference mode."""
    both = pair("LSTM", 3, 5, 2, backend=backend)
    x = draw(4, 2, 3)
    wrt = [x, *both.ours.parameters()]
    out = flat(both.run_ours(x))
    expected = gradients(out, wrt)
    check(gradients(out, wrt), expected, expected, "twice")
    with rnnkern.use_backend(backend):
        again = flat(torch.utils.checkpoint.checkpoint(both.ours, x, use_reentrant=False))
        check(gradients(again, wrt), expected, expected, "checkpoint")
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        check(gradients(flat(both.run_ours(x)), wrt), expected, expected, "hooks of saved tensors")
    with torch.inference_mode():
        check(flat(both.run_ours(x)), out, out, "inference mode")
        assert both.run_ours(x)[0].is_inference()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y = both.run_ours(x)[0]
        with torch.no_grad():
            both.ours.weight_hh_l0.mul_(2)
        y.sum().backward()


def test_training_learns(backend: str) -> None:
    """A step or two of an optimizer gives torch.nn's weights."""
    both = pair("GRU", 3, 5, 2, backend=backend)
    x = torch.randn(4, 2, 3, dtype=D)
    for module, run in ((both.ours, both.run_ours), (both.theirs, both.theirs)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (run(x)[0] - 1).square().mean().backward()
            optimizer.step()
    expected = list(both.theirs.parameters())
    check(list(both.ours.parameters()), expected, expected, "weights")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
def test_a_bias_set_to_none_is_zero_as_in_torch(missing: str, grad: bool) -> None:
    ours, theirs = rnnkern.GRUCell(3, 4).double(), torch.nn.GRUCell(3, 4).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for cell in (ours, theirs):
            setattr(cell, missing, None)
        truth = theirs(x)
        check(ours(x), truth, truth, missing)


@pytest.mark.parametrize("grad", [True, False])
def test_memory_that_does_not_hold_the_numbers(grad: bool) -> None:
    """A view that is negated when read, what leaked out of a transform, and a stand-in for zeros without memory."""
    leaked: list[torch.Tensor] = []
    torch.func.grad(lambda v: (leaked.append(v * 1), v.sum())[1])(torch.randn(4, 2, 3, dtype=torch.float64))
    plain = torch.randn(4, 2, 3, dtype=torch.float64)
    tiny = torch.randn(1, 1, 1, dtype=torch.complex128).conj().imag
    assert tiny.is_neg() and tiny.is_contiguous()
    with torch.set_grad_enabled(grad):
        zeros = torch._efficientzerotensor((4, 2, 3), dtype=torch.float64)
        for x, width in ((leaked[0], 3), (torch._neg_view(plain), 3), (tiny, 1), (zeros, 3)):
            ours, theirs = rnnkern.LSTM(width, 4).double(), torch.nn.LSTM(width, 4).double()
            theirs.load_state_dict(ours.state_dict())
            truth = theirs(x)[0]
            check(ours(x)[0] * 1, truth * 1, truth * 1, "input")
            h, c = torch._neg_view(torch.randn(2, 1, x.shape[1], 4, dtype=torch.float64))
            truth = theirs(x, (h, c))[0]
            check(ours(x, (h, c))[0], truth, truth, "states")
    if grad:
        x = plain.clone().requires_grad_()
        ours = rnnkern.LSTM(3, 4).double()
        dy = torch.randn(4, 2, 4, dtype=torch.float64)
        negated = torch.autograd.grad(ours(x)[0], x, torch._neg_view(dy))
        truth = torch.autograd.grad(ours(x)[0], x, -dy)
        check(negated, truth, truth, "dy")
        none = torch.autograd.grad(ours(x)[0], x, torch._efficientzerotensor((4, 2, 4), dtype=torch.float64))
        assert not none[0].any()
