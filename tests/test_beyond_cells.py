"""One step of the cells that torch.nn does not have: against loops in plain torch and the layers, and as modules."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from stacks import D, draw, flat, gradients
from states import natural
from tolerance import check, check_grad
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from written_out import KINDS, loop

import rnnkern

B, I, H = 4, 3, 6
each_kind = pytest.mark.parametrize("kind", KINDS)


def twins(kind: str, *sizes: int, **kwargs: Any) -> tuple[Any, Any]:
    """A cell, and a layer with its weights."""
    name, given, _ = KINDS[kind]
    kwargs = {"dtype": D} | given | kwargs
    cell, layer = (getattr(rnnkern, name + end)(*(sizes or (I, H)), **kwargs) for end in ("Cell", ""))
    for estimate in (value for name, value in layer.state_dict().items() if name.startswith(("bn_mean", "bn_var"))):
        estimate.uniform_(0.5, 2.0)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    return cell, layer


def states_of(cell: Any, *batch: int, dtype: torch.dtype = D) -> tuple[Tensor, ...]:
    spec = rnnkern.cells.CELLS[cell._cell]
    return natural(spec, [draw(*batch, cell.hidden_size, dtype=dtype) for _ in spec.states])


def bare(states: tuple[Tensor, ...]) -> Any:
    """As cells take them."""
    return states if len(states) > 1 else states[0]


def truth(kind: str, layer: Any, x: Tensor, hx: tuple[Tensor, ...]) -> list[Tensor]:
    """Of one step, [B, I] or [I]."""
    rows, states = (x, hx) if x.dim() == 2 else (x[None], tuple(h[None] for h in hx))
    final = [h[0] for h in loop(kind, layer, rows[None], tuple(h[None] for h in states))[1]]
    return final if x.dim() == 2 else [h[0] for h in final]


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_is_one_step_of_the_loop(kind: str, bias: bool, backend: str) -> None:
    cell, layer = twins(kind, bias=bias)
    for rows, given, chosen in ((B, True, backend), (None, True, backend), (1, False, backend), (B, True, None)):
        batch = () if rows is None else (rows,)
        for module in (cell, layer):
            module.train(rows == B)  # batch norm of one row has no variance
        x, hx = draw(*batch, I), states_of(cell, *batch)
        hx = hx if given else tuple(torch.zeros_like(h) for h in hx)
        with rnnkern.use_backend(chosen):
            ours = flat(cell(x, bare(hx) if given else None))
        assert rnnkern.dispatch.last() == (chosen or "reference")  # of which autograd follows the equations
        theirs = truth(kind, layer, x, hx)
        check(ours, theirs, theirs, f"{kind} {rows=}")
        for one, other in zip(cell.buffers(), layer.buffers(), strict=True):
            other.copy_(one)
        leaves = [x, *hx] if given else [x]
        exact = gradients(theirs, [*leaves, *layer.parameters()])
        check_grad(gradients(ours, [*leaves, *cell.parameters()]), exact, exact, f"{kind} {rows=}")


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_as_near_as_the_loop(kind: str, dtype: torch.dtype) -> None:
    cell, layer = twins(kind, 16, 42, dtype=dtype)
    exact, x, hx = copy.deepcopy(layer).double(), draw(B, 16, dtype=dtype), states_of(cell, B, dtype=dtype)
    yardstick, wide = truth(kind, layer, x, hx), truth(kind, exact, x.double(), tuple(h.double() for h in hx))
    ours = flat(cell(x, bare(hx)))
    assert all(v.dtype == dtype for v in ours)
    check(ours, yardstick, wide, kind)


@each_kind
def test_steps_are_the_sequence(kind: str) -> None:
    cell, layer = (module.eval() for module in twins(kind))
    x, state, outputs = draw(5, B, I), None, []
    for row in x:
        state = cell(row, state)
        outputs.append(flat(state)[0])
    y, final = layer(x)
    ours, theirs = [torch.stack(outputs), *flat(state)], [y, *(h[0] for h in flat(final))]
    check(ours, theirs, theirs, kind)
    wrt = [[x, *module.parameters()] for module in (cell, layer)]
    check_grad(gradients(ours, wrt[0]), (exact := gradients(theirs, wrt[1])), exact, kind)


@each_kind
def test_derivatives_of_any_order(kind: str) -> None:
    cell, _ = twins(kind, 2, 3)
    x, hx = draw(2, 2), states_of(cell, 2)
    names, weights = zip(*cell.named_parameters(), strict=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, params = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        return tuple(flat(torch.func.functional_call(cell, params, (x, bare(states)))))

    assert torch.autograd.gradcheck(run, (x, *hx, *weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, *hx, *weights))


@each_kind
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_vmap(kind: str, chosen: str | None) -> None:
    """Over rows of the batch without a gradient and of every one's gradient; over weights."""
    (cell, _), (other, _) = twins(kind), twins(kind)
    x, hx, params = torch.randn(B, I, dtype=D), states_of(cell, B), dict(cell.named_parameters())
    cell.eval(), other.eval()

    def run(params: dict[str, Tensor], x: Tensor, *hx: Tensor) -> Any:
        return torch.func.functional_call(cell, params, (x, bare(hx)))

    def loss(*arguments: Any) -> Tensor:
        return sum(h.square().sum() for h in flat(run(*arguments)))

    with rnnkern.use_backend(chosen):
        theirs = flat(cell(x, bare(hx)))
        with torch.no_grad():
            check(flat(torch.func.vmap(run, (None, *(0,) * (1 + len(hx))))(params, x, *hx)), theirs, theirs, kind)
            both, estimates = torch.func.stack_module_state([cell, other])
            ours = flat(torch.func.vmap(run, (0, None, *(None,) * len(hx)))(both | estimates, x, *hx))
            expected = [torch.stack(v) for v in zip(theirs, flat(other(x, bare(hx))), strict=True)]
            check(ours, expected, expected, kind)
        found = torch.func.vmap(torch.func.grad(loss), (None, *(0,) * (1 + len(hx))))(params, x, *hx)
        for b in range(B):
            exact = torch.autograd.grad(loss(params, x[b], *(h[b] for h in hx)), list(params.values()))
            check_grad([found[name][b] for name in params], exact, exact, kind)


@pytest.mark.parametrize("kind", ["MGU", "IndRNN", "LiGRU", "SLSTM"])
def test_is_one_graph(kind: str) -> None:
    cell, _ = twins(kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell.eval(), fullgraph=True, backend=counter)
    for rows, gradient in ((7, True), (2, True), (7, False), (2, False), (9, True)):
        x = draw(rows, I)
        with torch.set_grad_enabled(gradient):
            ours = flat(compiled(x))
        theirs = flat(cell(x))
        check(ours, theirs, theirs, kind)
        if gradient:
            exact = gradients(theirs, [x, *cell.parameters()])
            with torch._functorch.config.patch(donated_buffer=False):
                check_grad(gradients(ours, [x, *cell.parameters()]), exact, exact, kind)
    assert counter.frame_count <= 4  # with a gradient and without, the first batch size and all others


@each_kind
def test_has_torchs_form(kind: str) -> None:
    cell, layer = twins(kind)
    named = list(torch.nn.GRUCell(I, H).state_dict())
    assert [name for name in cell.state_dict() if not name.startswith("bn_")] == named
    assert repr(cell).startswith(f"{KINDS[kind][0]}Cell(3, 6") and "bias=False" in repr(twins(kind, bias=False)[0])
    assert twins(kind, bias=False)[0].bias_hh is None
    x = torch.randn(B, I, dtype=D)
    for copied in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert type(copied) is type(cell) and repr(copied) == repr(cell)
        assert all(torch.equal(a, b) for a, b in zip(flat(copied.eval()(x)), flat(cell.eval()(x)), strict=True))
    assert not isinstance(cell, torch.nn.RNNCellBase)  # nothing gives it to torch's kernels
    for module in (cell, layer):
        torch.manual_seed(3)
        module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(cell.state_dict().values(), layer.state_dict().values(), strict=True))


@each_kind
@pytest.mark.parametrize("args, kwargs", [((3, -4), {}), ((3, 4.0), {}), (("3", 6), {}), ((3, 6), {"colour": 1})])
def test_bad_arguments_are_refused_as_torch_refuses_them(kind: str, args: Any, kwargs: Any) -> None:
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        torch.nn.GRUCell(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        twins(kind, *args, **kwargs)
    if "colour" not in kwargs:
        assert str(ours.value) == str(theirs.value)


@each_kind
@pytest.mark.parametrize("gradient", [True, False])
def test_weights_that_do_not_fit(kind: str, gradient: bool) -> None:
    """Replaced by hand: a kernel would read beyond them."""
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        cell, _ = twins(kind)
        wrong = getattr(cell, name).detach()[..., :-1]
        setattr(cell, name, torch.nn.Parameter(wrong.clone()))
        words = "inconsistent input_size" if name == "weight_ih" else f"{name}: expected shape"
        if name == "weight_hh" and kind.startswith("IndRNN"):
            words = "weight_ih: expected shape"  # weight_hh says how many units there are
        elif name == "weight_hh":
            words = "weight_(ih|hh): expected shape"
        with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match=words):
            cell.eval()(torch.randn(B, I, dtype=D))


@each_kind
def test_parametrized_weights(kind: str) -> None:
    cell, layer = (module.eval() for module in twins(kind))
    for module, name in ((cell, "weight_hh"), (layer, "weight_hh_l0")):
        torch.nn.utils.parametrizations.weight_norm(module, name)
    x, hx = torch.randn(B, I, dtype=D), states_of(cell, B)
    theirs = truth(kind, layer, x, hx)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            check(flat(cell(x, bare(hx))), theirs, theirs, kind)


@each_kind
def test_who_expects_torchs_modules_says_so(kind: str) -> None:
    cell, x = twins(kind)[0].eval(), torch.randn(B, I, dtype=D)
    name, expected = type(cell).__name__, flat(cell(x))
    with rnnkern.use_backend("torch"), pytest.raises(RuntimeError, match=f"torch has no {cell._cell}_cell"):
        cell(x)
    with pytest.raises(ValueError, match=f"torch.nn has no {name}"):
        rnnkern.restore(torch.nn.Sequential(cell))
    assert rnnkern.accelerate(torch.nn.Sequential(cell))[0] is cell and not rnnkern.convert.left(cell)
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile rnnkern.{name}; torch.export can"):
        torch.jit.script(cell)
    with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot follow {cell._cell}_cell.* torch.export can"):
        torch.jit.trace(cell, (x,))
    check(flat(torch.export.export(cell, (x,)).module()(x)), expected, expected, kind)
    with rnnkern.override():
        check(flat(cell(x)), expected, expected, kind)
    with torch.autocast("cpu"):
        theirs = torch.nn.GRUCell(I, H)(x.float())
        assert {h.dtype for h in flat(copy.deepcopy(cell).float()(x.float()))} == {theirs.dtype}


@each_kind
def test_streams(kind: str) -> None:
    cell, x = twins(kind)[0].eval(), torch.randn(5, B, I, dtype=D)
    stream, state = rnnkern.Stream(cell, B), None
    with torch.no_grad():
        for row in x:
            state = cell(row, state)
            h = state[0] if isinstance(state, tuple) else state
            check(stream.step(row), h, h, kind)
    check(flat(stream.state), flat(state), flat(state), kind)


def test_batch_norm_of_a_step_is_batch_norms() -> None:
    cell, theirs = rnnkern.LiGRUCell(I, H, dtype=D), torch.nn.BatchNorm1d(2 * H, dtype=D)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            x = torch.randn(B, I, dtype=D)
            cell(x)
            theirs(x @ cell.weight_ih.T)
        found, expected = [cell.bn_mean, cell.bn_var], [theirs.running_mean, theirs.running_var]
        check(found, expected, expected)
    for one_row in (x[:1], x[0]):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            cell(one_row)


def test_states_of_slstm() -> None:
    cell, x = rnnkern.SLSTMCell(I, H, num_heads=2), torch.randn(B, I)
    zeros = torch.zeros(B, H)
    for hx, words in ((zeros, "got a Tensor"), ((zeros, zeros), "got a tuple of 2")):
        with pytest.raises(ValueError, match=re.escape("hx: expected the four states (h, c, n, m), ") + words):
            cell(x, hx)
    assert torch.equal(cell(x, [zeros] * 4)[0], cell(x)[0])
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size 6, got 4"):
        rnnkern.SLSTMCell(I, H, num_heads=4)
