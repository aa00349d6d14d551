"""``memory="recompute"`` gives what ``memory="save"`` gives and keeps no more than it says."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import scan_backends
from layers import Call, everything, gradients, random_call
from stacks import KINDS, LAYOUTS, call_backends, draw, example, flat, pair
from tolerance import check, check_grad
from torch import Tensor

import rnnkern
from rnnkern import _recompute, dispatch
from rnnkern.cells import CELLS

BACKENDS = [name for name in dispatch.ORDER if dispatch.unavailable(name) is None]
T = 7


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of sqrt(T) steps, however little there is in them."""
    monkeypatch.setattr(_recompute, "SMALLEST", 1)


def recomputed(call: Call, backend: str) -> tuple[Tensor, ...]:
    call = replace(call, options={**call.options, "memory": "recompute"})
    return call.run(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "padded", "packed", "reset", "learned"])
@pytest.mark.parametrize("cell, P", [*((cell, None) for cell in CELLS), ("lstm", 2)])
def test_layer(cell: str, P: int | None, layout: str, reverse: tuple[bool, ...], backend: str) -> None:
    call = random_call(cell, T=T, P=P, reverse=reverse)
    if layout == "padded":
        call = replace(call, lengths=torch.tensor([3, 0, T]))
    elif layout == "packed":
        lengths = torch.tensor([T, 3, 2])
        sizes = (torch.arange(T)[:, None] < lengths).sum(1)
        x = call.x[: int(sizes.sum())].detach().requires_grad_()
        call = replace(call, x=x, offsets=sizes.cumsum(0) - sizes, lengths=lengths)
    elif layout in ("reset", "learned"):
        restart = tuple(torch.randn_like(s).requires_grad_() for s in call.states)
        call = replace(call, reset=torch.rand(T * call.B, len(reverse)) < 0.4)
        call = replace(call, reset_states=restart if layout == "learned" else ())
    call.skip_if_refused(backend)
    truth, found = call.written_out(), recomputed(call, backend)
    check(found, truth, truth, layout)
    expected = gradients(truth, call.tensors)
    check_grad(gradients(found, call.tensors), expected, expected, layout)


@pytest.mark.parametrize("P", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_every_option_of_the_contract(cell: str, P: int | None) -> None:
    if P and len(CELLS[cell].states) == 1:
        pytest.skip(f"torch has no projection for {cell}")
    call = everything(cell, P, T=T)
    truth, found = call.written_out(), recomputed(call, "reference")
    check(found, truth, truth)
    expected = gradients(truth, call.tensors)
    check_grad(gradients(found, call.tensors), expected, expected)


def test_only_some_gradients() -> None:
    call = random_call("lstm", T=T)
    whole = gradients(call.written_out(), call.tensors)
    for k, tensor in enumerate(call.tensors):
        detached = [t.detach() for t in call.tensors]
        detached[k] = tensor.detach().clone().requires_grad_()
        (found,) = gradients(recomputed(call.with_tensors(*detached), "reference"), [detached[k]])
        check_grad(found, whole[k], whole[k], f"tensor {k}")


@pytest.mark.parametrize("backend", call_backends())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind: str, layout: str, backend: str) -> None:
    made = stack_of(kind, backend, batch_first=layout == "packed")
    input, hx, leaves = example(made.theirs, layout, T=T)
    if backend == "torch":
        with pytest.raises(RuntimeError, match='memory="recompute"'):
            made.run_ours(input, hx)
        return
    made.compare(input, hx, leaves, f"{kind} {layout}")


def stack_of(kind: str, backend: str | None = "reference", **options: Any) -> Any:
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, **options}
    made = pair(kind, 3, 6, backend=backend, **options)
    made.ours.memory = "recompute"
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_and_autocast(kind: str, dtype: torch.dtype) -> None:
    """Outputs and gradients by the one rule, with the saving way as the yardstick."""
    exact = stack_of(kind, None, dropout=0.0).ours
    kept = copy.deepcopy(exact).float()
    kept.memory = "save"
    less = copy.deepcopy(exact).float()
    x = torch.randn(T, 3, 3)
    results = []
    for module, given in ((less, x), (kept, x), (exact, x.double())):
        given = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and given.dtype == torch.float32):
            outputs = flat(module(given, return_states=True))
        results.append((outputs, gradients(tuple(outputs), [given, *module.parameters()])))
    (ours, dours), (theirs, dtheirs), (truth, dtruth) = results
    assert [v.dtype for v in ours] == [v.dtype for v in theirs]
    check(ours, theirs, truth, kind, dtype)
    check_grad(dours, dtheirs, dtruth, kind, dtype)


def test_return_states_and_lengths_on_modules() -> None:
    made = stack_of("LSTM", None, dropout=0.0)
    kept = copy.deepcopy(made.ours)
    kept.memory = "save"
    x, reset = draw(T, 3, 3), torch.rand(T, 3) < 0.3
    results = []
    for module in (made.ours, kept):
        outputs = flat(module(x, lengths=[2, T, 0], reset=reset, return_states=True))
        results.append((outputs, gradients(tuple(outputs), [x, *module.parameters()])))
    check(results[0][0], results[1][0], results[1][0])
    check_grad(results[0][1], results[1][1], results[1][1])


def test_functional() -> None:
    m = pair("GRU", 3, 6).ours
    x, seen = draw(T, 3, 3), []
    y, hn = rnnkern.functional.gru(x, None, list(m.parameters()), memory="recompute")
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.append(node.name())
        nodes += [below for below, _ in node.next_functions if below is not None]
    assert "RecomputedBackward" in seen
    expected = m(x)
    check([y, hn], expected, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_has_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where segments are as large as they are by themselves, they run by the same kernels."""
    monkeypatch.undo()
    less = pair(kind, 8, 64, dtype=torch.float32, bidirectional=True).ours
    kept = copy.deepcopy(less)
    less.memory = "recompute"
    x = torch.randn(600, 16, 8, requires_grad=True)
    for a, b in zip(flat(less(x)), flat(kept(x)), strict=True):
        assert torch.equal(a, b)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def kept_bytes(module: torch.nn.Module, x: Tensor) -> int:
    """Of the tensors that the graph of a forward holds, beyond input, outputs and weights."""
    held: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = module(x)
    for t in (x, y, *module.parameters()):
        held.pop(t.untyped_storage().data_ptr(), None)
    return sum(held.values())


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_the_states_of_sqrt_T_steps(kind: str) -> None:
    module = pair(kind, 3, 6, dtype=torch.float32, backend=None).ours
    module.memory = "recompute"
    x, B = torch.randn(400, 2, 3, requires_grad=True), 2
    widths = [module.proj_size or 6, *([6] if kind.startswith("LSTM") else [])]
    # One step of states for each of 20 segments, and what the first step of all is given.
    assert kept_bytes(module, x) <= (20 + 1) * B * sum(widths) * 4
    module.memory = "save"
    assert kept_bytes(module, x) > 400 * B * sum(widths[1:]) * 4 or kind.startswith("RNN")


@pytest.mark.parametrize(
    "steps, batch, expected",
    [(4096, 16, 64), (4096, 1, 8), (10, 16, 1), (1_000_000, 16, 1000), (0, 0, 1)],
)
def test_number_of_segments(steps: int, batch: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """About sqrt(T), each with a MiB of pre-activations at least."""
    monkeypatch.undo()
    inputs = random_call("lstm", T=1, B=1, H=128, reverse=(False,), dtype=torch.float32).inputs()
    inputs = replace(inputs, T=max(steps, 1), B=batch)
    assert len(_recompute.edges_of_layer(inputs)) - 1 == expected


# ---- derivatives of derivatives, transforms, traces ------------------------------------------------------------------


@pytest.mark.parametrize("backend", scan_backends())
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(kind: str, backend: str) -> None:
    made = pair(kind, 3, 6, backend=backend, bidirectional=True)
    kept = copy.deepcopy(made.ours)
    made.ours.memory = "recompute"
    results = []
    for module in (made.ours, kept):
        x = torch.randn(T, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with rnnkern.use_backend(backend):
            outputs = flat(module(x))
        first = torch.autograd.grad(outputs[0].square().sum(), [x, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), [x, *module.parameters()])
        results.append([*first, *second])
    check_grad(results[0], results[1], results[1], kind)


def test_gradcheck() -> None:
    call = random_call("lstm", T=5, B=2, I=2, H=3)
    assert torch.autograd.gradcheck(
        lambda *v: recomputed(call.with_tensors(*v), "reference"), tuple(call.tensors), check_batched_grad=True
    )


def test_transforms_and_graphs_take_the_saving_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pair("LSTM", 3, 6, dtype=torch.float64).ours
    module.memory = "recompute"
    kept = copy.deepcopy(module)
    kept.memory = "save"
    monkeypatch.setattr(_recompute.Recomputed, "forward", None)
    x, v = torch.randn(2, T, 1, 3, dtype=torch.float64), torch.randn(T, 1, 3, dtype=torch.float64)

    def loss(module: Any) -> Any:
        return lambda x: module(x)[0].square().sum()

    def all_of(m: Any) -> list[Tensor]:
        graph = torch.compile(m, backend="aot_eager")
        with torch._dynamo.config.patch(allow_rnn=True):
            y = graph(v.clone().requires_grad_())[0]
        return [
            y,
            torch.func.vmap(torch.func.grad(loss(m)))(x),
            *torch.func.jvp(lambda x: m(x)[0], (v,), (v,)),
            torch.func.jacrev(lambda x: m(x)[0])(v),
        ]

    found, expected = all_of(module), all_of(kept)
    check(found, expected, expected)


def test_no_gradient_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute.Recomputed, "forward", None)
    with torch.no_grad():
        rnnkern.GRU(3, 6, memory="recompute")(torch.randn(T, 2, 3), return_states=True)


# ---- the argument ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [rnnkern.RNN, rnnkern.LSTM, rnnkern.GRU])
def test_argument(cls: Any) -> None:
    module = cls(3, 6, 2, batch_first=True, memory="recompute")
    assert repr(module) == f"{cls.__name__}(3, 6, num_layers=2, batch_first=True, memory=recompute)"
    assert "memory" not in repr(cls(3, 6))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.memory == "recompute"
    assert vars(cls(3, 6, memory="save")).keys() == vars(getattr(torch.nn, cls.__name__)(3, 6)).keys()
    with pytest.raises(ValueError, match="memory: expected 'save' or 'recompute', got 'some'"):
        cls(3, 6, memory="some")
    module.memory = "less"
    with pytest.raises(ValueError, match="got 'less'"):
        module(torch.randn(2, T, 3))


def test_restore_names_it() -> None:
    model = torch.nn.Sequential(rnnkern.GRU(3, 6, memory="recompute"), rnnkern.GRU(6, 6))
    with pytest.raises(ValueError, match="0: memory='recompute'"):
        rnnkern.restore(model)
    assert type(model[1]) is rnnkern.GRU
    model[0].memory = "save"
    assert type(rnnkern.restore(model)[0]) is torch.nn.GRU
    accelerated = rnnkern.accelerate(model)[0]
    assert accelerated.memory == "save"
    accelerated.memory = "recompute"
    assert repr(accelerated) == "GRU(3, 6, memory=recompute)"
