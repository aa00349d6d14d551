"""torch.compile as users call it: graphs, breaks, recompilations; numbers and gradients as without it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, flat, gradients, pair
from tolerance import check, check_grad
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import _ops

FUNCTIONS = {"RNN": "rnn_tanh", "RNN relu": "rnn_relu", "GRU": "gru", "LSTM": "lstm", "LSTM proj": "lstm"}
SIZES = ((7, 4), (11, 6), (13, 5), (9, 10))  # no two sizes equal, or Dynamo would take them for one
D = torch.float64


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # gradients are taken twice
        yield
    torch._dynamo.reset()


def same(ours: Any, theirs: Any, wrt: list[Tensor], what: str) -> None:
    ours, theirs = flat(ours), flat(theirs)
    check(ours, theirs, theirs, what)
    expected = gradients(theirs, wrt)
    check_grad(gradients(ours, wrt), expected, expected, f"{what}, gradients")


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_one_graph(kind: str) -> None:
    """One graph for the first batch size, one for all others; none more without a gradient."""
    cell, counter = pair(kind, 3, 5).ours, CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    for B in (7, 2, 9, 4):
        x = torch.randn(B, 3, dtype=D, requires_grad=True)
        same(compiled(x), cell(x), [x, *cell.parameters()], f"B={B}")
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind, dynamic", [*((kind, None) for kind in KINDS), ("LSTM", True)])
def test_functions_are_one_graph(kind: str, dynamic: bool | None) -> None:
    module, counter = pair(kind, 3, 5, 2, bidirectional=True).ours, CompileCounterWithBackend("aot_eager")
    function, weights = getattr(rnnkern.functional, FUNCTIONS[kind]), list(module.parameters())

    def run(x: Tensor, weights: list[Tensor]) -> Any:
        return function(x, None, weights, num_layers=2, bidirectional=True)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    for T, B in SIZES:
        x = torch.randn(T, B, 3, dtype=D, requires_grad=True)
        same(compiled(x, weights), run(x, weights), [x, *weights], f"{T=} {B=}")
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.skipif(bool(rnnkern.backends()["cpp"]), reason="the C++ extension is what makes the input product itself")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_input_product_is_left_to_the_backend(kind: str, gradient: bool) -> None:
    """No product in the forward's graph, and so the same bits as without a graph."""
    module, graphs = pair(kind, 3, 5, bidirectional=True).ours, []
    function, weights = getattr(rnnkern.functional, FUNCTIONS[kind]), list(module.parameters())

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    def run(x: Tensor) -> list[Tensor]:
        return flat(function(x, None, weights, bidirectional=True))

    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=keep, inference_compiler=keep))
    x = torch.randn(7, 4, 3, dtype=D)
    with torch.set_grad_enabled(gradient):
        assert all(map(torch.equal, compiled(x), run(x)))
    aten = torch.ops.aten
    assert (_ops.layer_forward if gradient else _ops.inference) in graphs[0] and not graphs[0] & {
        aten.mm.default,
        aten.addmm.default,
    }


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = rnnkern.LSTM(6, 5, 2, bidirectional=True, batch_first=True, dropout=0.5)
        self.second = rnnkern.GRU(10, 4, batch_first=True)
        self.cell = rnnkern.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        y = torch.relu(self.first(self.embed(tokens), **options)[0])
        y = self.second(y)[0].tanh()
        return self.head(self.cell(y[:, 0]))


@pytest.mark.parametrize("allowed", [True, False], ids=["allow_rnn", "default"])
def test_a_model(allowed: bool) -> None:
    """One graph where Dynamo takes modules derived from nn.LSTM; else breaks around them, and none recompiles."""
    model, counter = Tagger().double(), CompileCounterWithBackend("aot_eager")
    graphs = []
    with torch._dynamo.config.patch(allow_rnn=allowed):
        compiled = torch.compile(model, fullgraph=allowed, backend=counter)
        for T, B in (*SIZES, (20, 3)):
            tokens, results = torch.randint(0, 11, (B, T)), []
            for run in (compiled, model):
                torch.manual_seed(3)
                results.append(run(tokens))
            same(*results, list(model.parameters()), f"{T=} {B=}")
            graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 4 and (graphs[:2] == [1, 2]) == allowed


def ours_guarded(forward: Any) -> int:
    """How many guards of the newest graph are on globals, which is code and constants and not what a call is given."""
    (entry, *_) = torch._dynamo.eval_frame._debug_get_cache_entry_list(forward.__code__)

    def count(manager: Any) -> int:
        return len(manager.get_leaf_guards()) + sum(map(count, manager.get_child_managers()))

    root = entry.guard_manager.root
    sources = [manager.get_source() for manager in root.get_child_managers()]
    return sum(count(m) for m, source in zip(root.get_child_managers(), sources, strict=True) if source == "G")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_few_guards_are_on_the_library(kind: str, gradient: bool) -> None:
    """Each is checked at every call. There were 130 of them when Dynamo followed a call to its layers."""
    module = getattr(rnnkern, kind)(3, 5)
    with torch._dynamo.config.patch(allow_rnn=True), torch.set_grad_enabled(gradient):
        torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(4, 2, 3))
    assert 0 < ours_guarded(type(module).forward) <= 30


def test_a_backend_chosen_later_is_honoured() -> None:
    module, x = rnnkern.LSTM(3, 5, dtype=D), torch.randn(4, 2, 3, dtype=D)
    counter, ran = CompileCounterWithBackend("aot_eager"), []
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for name in (None, "reference", None, "reference"):
            with rnnkern.use_backend(name):
                same(compiled(x), module(x), list(module.parameters()), f"{name}")
                with torch.no_grad():
                    check(flat(compiled(x)), flat(module(x)), flat(module(x)), f"{name}, no gradient")
                ran.append(counter.frame_count)
        assert ran == [2, 4, 4, 4]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_one_op(kind: str, layers: int, bidirectional: bool, batch_first: bool) -> None:
    """... in one graph for the first sizes and one for all others, whatever is in between: transposes, or nothing."""
    module, graphs = pair(kind, 3, 5, layers, bidirectional=bidirectional, batch_first=batch_first).ours, []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        compiled = torch.compile(
            module, fullgraph=True, backend=aot_autograd(fw_compiler=keep, inference_compiler=keep)
        )
        for T, B in SIZES:
            x = torch.randn(*((B, T) if batch_first else (T, B)), 3, dtype=D)
            hx = module(x)[1]
            for given in ((x,), (x, hx)):
                expected = flat(module(*given))
                check(flat(compiled(*given)), expected, expected, f"{T=} {B=}")
    assert len(graphs) <= 4 and all(graph.count(_ops.inference) == 1 for graph in graphs)
    others = {op for graph in graphs for op in graph} - {_ops.inference, operator.getitem}
    assert {op for op in others if isinstance(op, torch._ops.OpOverload)} <= {torch.ops.aten.permute.default,
        torch.ops.aten.transpose.int, torch.ops.aten.sym_size.int}  # fmt: skip


def test_options_of_functions_within_a_graph() -> None:
    """Numbers among them may change, and are then other numbers."""
    module = rnnkern.LSTM(3, 5, dtype=D)
    weights = list(module.parameters())

    def run(x: Tensor, p: float) -> Any:
        return rnnkern.functional.lstm(x, None, weights, zoneout=(p, 0.5 * p), cell_clip=2 * p)

    compiled, x = torch.compile(run, fullgraph=True, backend="aot_eager"), torch.randn(4, 2, 3, dtype=D)
    for p in (0.1, 0.25, 0.5):
        same(compiled(x, p), run(x, p), weights, f"{p=}")


@pytest.mark.parametrize("option", ["lengths", "reset", "return_states"])
def test_what_torch_lacks(option: str) -> None:
    module, counter = rnnkern.LSTM(3, 5, dtype=D), CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for T, B in SIZES:
            x = torch.randn(T, B, 3, dtype=D, requires_grad=True)
            values = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3, "return_states": True}
            given = {option: values[option]}
            same(compiled(x, **given), module(x, **given), [x, *module.parameters()], f"{T=} {B=}")
        assert counter.frame_count == 2
        if option == "lengths":  # no graph can check them, so the op does
            with pytest.raises(ValueError, match=r"lengths must lie in \[0, 9\]"):
                compiled(torch.randn(9, 2, 3, dtype=D), lengths=torch.tensor([9, 1000]))


def test_packed_input_is_left_out_of_graphs() -> None:
    module, counter = rnnkern.LSTM(3, 5, dtype=D), CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, lengths: Tensor) -> Any:
        y, states = module(pack_padded_sequence(x * 2, lengths, enforce_sorted=False))
        return y.data * 2, states

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled, graphs = torch.compile(run, backend=counter), []
        for T, B in SIZES:
            x, lengths = torch.randn(T, B, 3, dtype=D, requires_grad=True), torch.randint(1, T + 1, (B,))
            same(compiled(x, lengths), run(x, lengths), [x, *module.parameters()], f"{T=} {B=}")
            graphs.append(counter.frame_count)
        assert graphs[2] == graphs[1]
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="padded input with lengths= it does"):
            torch.compile(module, fullgraph=True, backend="eager")(packed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_inductor(kind: str) -> None:
    module = pair(kind, 3, 5).ours
    x = torch.randn(*((4, 3) if "Cell" in kind else (6, 4, 3)), dtype=D, requires_grad=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x: [2 * t.relu() for t in flat(module(x.tanh()))], fullgraph=True)
        expected = [2 * t.relu() for t in flat(module(x.tanh()))]
        same(compiled(x), expected, [x, *module.parameters()], kind)
        with torch.no_grad():
            check(compiled(x), expected, expected, "no gradient")


WEIGHTS = [p.detach() for p in rnnkern.LSTM(3, 5, dtype=D).parameters()]
TRANSFORMS = {
    "vmap": lambda f, x: vmap(f)(x),
    "grad": lambda f, x: grad(lambda v: f(v).square().sum())(x[0]),
    "per sample": lambda f, x: vmap(grad(lambda v: f(v).square().sum()))(x),
    "jacrev": lambda f, x: jacrev(lambda v: f(v).sum((0, 1)))(x[0]),
    "jvp": lambda f, x: jvp(f, (x[0].clone(),), (x[1].clone(),))[1],  # torch fails on views of one tensor
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_within_a_graph(name: str) -> None:
    """They run on the reference, which the graph can look into."""
    transform = TRANSFORMS[name]

    def run(x: Tensor) -> Tensor:
        return transform(lambda v: rnnkern.functional.lstm(v, None, WEIGHTS)[0], x)

    x = torch.randn(3, 4, 2, 3, dtype=D)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    check_grad([found], [run(x)], [run(x)], name)
