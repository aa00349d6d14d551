"""rnnkern.diagnostics: gradients are autograd's own through a loop of torch.nn's cells; growth is the Jacobian's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import D, draw
from tolerance import check, check_grad
from torch import Tensor, nn

import rnnkern
from rnnkern import diagnostics

KINDS = ("RNN", "LSTM", "GRU")
PNG = b"\x89PNG"


def cells_of(rnn: Any) -> list[list[Any]]:
    """torch.nn's cells on the weights of every layer and direction."""
    found = []
    for layer in range(rnn.num_layers):
        sides = []
        for end in ("", "_reverse")[: 1 + rnn.bidirectional]:
            cell = getattr(nn, f"{type(rnn).__name__}Cell")(1, rnn.hidden_size, dtype=D)
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, part, getattr(rnn, f"{part}_l{layer}{end}"))
            sides.append(cell)
        found.append(sides)
    return found


def loop(rnn: Any, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Outputs, and h of every step of each layer and direction, by time: every use of h is of that one tensor."""
    rows, tracks = list(x), []
    for sides in cells_of(rnn):
        outs = []
        for reverse, cell in enumerate(sides):
            state, found = None, []
            for row in reversed(rows) if reverse else rows:
                state = cell(row, state)
                found.append(state[0] if isinstance(state, tuple) else state)
            outs.append(found[::-1] if reverse else found)
        tracks += outs
        rows = [torch.cat(parts, -1) for parts in zip(*outs, strict=True)]
    return torch.stack(rows), tracks


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()


@pytest.mark.parametrize("library", [nn, rnnkern])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind: str, bidirectional: bool, library: Any) -> None:
    rnn = getattr(library, kind)(3, 5, 2, bidirectional=bidirectional, dtype=D)
    x = draw(6, 4, 3).detach()
    y, tracks = loop(rnn, x)
    loss = loss_of(y)
    flow = diagnostics.gradient_flow(rnn, x, lambda out: loss_of(out[0]))
    assert flow.loss == pytest.approx(loss.item(), rel=1e-12)
    assert len(flow.layers) == len(tracks)
    for layer, track in zip(flow.layers.values(), tracks, strict=True):
        truth = torch.stack(torch.autograd.grad(loss, track, retain_graph=True))
        check_grad(layer.gradient, truth, truth, layer.name)
        norms = torch.stack([g.norm() for g in truth])
        check(layer.norms, norms, norms, layer.name)
        assert (layer.cell_gradient is not None) == (kind == "LSTM")
    assert "forward" not in rnn.__dict__


@pytest.mark.parametrize("layout", ["batch_first", "unbatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_states(kind: str, layout: str) -> None:
    """Whatever the module takes; what it returns is what it always does."""
    rnn = getattr(rnnkern, kind)(3, 5, 2, batch_first=layout == "batch_first", bidirectional=True, dtype=D)
    x = draw(*((2, 6, 3) if layout == "batch_first" else (6, 3)))
    h = [draw(4, 2, 5) if layout == "batch_first" else draw(4, 5) for _ in range(1 + (kind == "LSTM"))]
    hx = tuple(h) if kind == "LSTM" else h[0]
    kept = []

    def loss(out: Any) -> Tensor:
        kept.append(out)
        return loss_of(out[0])

    flow = diagnostics.gradient_flow(rnn, (x, hx), loss)
    y, final = rnn(x, hx)
    check(kept[0][0], y, y)
    for ours, theirs in zip(*((f if isinstance(f, tuple) else (f,)) for f in (kept[0][1], final)), strict=True):
        check(ours, theirs, theirs)
    assert all(layer.gradient.shape[0] == 6 for layer in flow.layers.values())


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"peephole": True}, {"cell_clip": 0.3}, {"proj_size": 2}])
def test_options_of_the_network(options: dict[str, Any]) -> None:
    rnn = rnnkern.LSTM(3, 5, 2, dtype=D, **options)
    x, kept = draw(6, 4, 3), []
    diagnostics.gradient_flow(rnn, x, lambda out: kept.append(out[0]) or loss_of(out[0]))
    y, _ = rnn(x)
    check(kept[0], y, y)


class Model(nn.Module):
    """A cell in a loop, a network above it and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.rnn, self.head = nn.GRUCell(3, 4, dtype=D), nn.LSTM(4, 5, dtype=D), nn.Linear(5, 1, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        h, found = None, []
        for row in x:
            h = self.cell(row, h)
            found.append(h)
        self.found = found
        return self.head(self.rnn(torch.stack(found))[0][-1])


def test_cells_inside_a_model() -> None:
    model, x = Model(), draw(6, 4, 3)
    flow = diagnostics.gradient_flow(model, x, lambda y: y.square().sum())
    assert list(flow.layers) == ["cell", "rnn"]
    loss = model(x).square().sum()
    truth = torch.stack(torch.autograd.grad(loss, model.found))
    check_grad(flow.layers["cell"].gradient, truth, truth)
    assert not model.cell._forward_hooks


@pytest.mark.parametrize("scale, verdict", [(0.5, "vanishing"), (1.0, "flowing"), (2.0, "exploding")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_is_that_of_the_jacobian(scale: float, verdict: str, dtype: torch.dtype) -> None:
    """relu with positive states is linear, and its Jacobian W_hh: here a rotation times `scale`. In float32 0.5^300 is
    zero and 2^300 infinite; the rate is that of the steps before."""
    rnn = nn.RNN(1, 4, nonlinearity="relu", dtype=dtype)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(4).roll(1, 0) * scale)
        rnn.weight_ih_l0.fill_(1.0)
        rnn.bias_ih_l0.fill_(0.1 if scale < 2 else 1e-30)
        rnn.bias_hh_l0.zero_()
    x = torch.zeros(120 if scale > 1 else 301, 2, 1, dtype=dtype)
    layer = diagnostics.gradient_flow(rnn, x, lambda out: out[0][-1].sum()).layers["RNN"]
    assert layer.growth == pytest.approx(scale, rel=1e-4)
    assert layer.verdict == verdict and verdict in str(layer)


def test_the_sentence() -> None:
    rnn, x = rnnkern.RNN(3, 20), torch.randn(100, 8, 3)
    flow = diagnostics.gradient_flow(rnn, x, lambda out: out[0][-1].sum())
    assert str(flow).startswith("RNN: vanishing: over 99 steps back, a gradient shrinks to ")
    one = diagnostics.gradient_flow(rnn, x[:1], lambda out: out[0].sum())
    assert "one step" in str(one) and one.layers["RNN"].verdict == "flowing"


def test_nothing_is_left_behind() -> None:
    """Not after an error either; and no number that the caller draws changes."""
    rnn, x = rnnkern.RNN(3, 4), torch.randn(5, 2, 3)
    torch.manual_seed(3)
    wanted = torch.randn(3)
    torch.manual_seed(3)
    diagnostics.gradient_flow(rnn, x, lambda out: out[0].sum())
    assert torch.equal(torch.randn(3), wanted)
    assert all(p.grad is None for p in rnn.parameters())
    with pytest.raises(RuntimeError, match="mine"):
        diagnostics.gradient_flow(rnn, x, lambda out: (_ for _ in ()).throw(RuntimeError("mine")))
    assert "forward" not in rnn.__dict__
    with torch.no_grad():
        diagnostics.gradient_flow(rnn, x, lambda out: out[0].sum())


@pytest.mark.parametrize("library", [nn, rnnkern])
def test_state_map(library: Any) -> None:
    lstm, x = library.LSTM(3, 5, 2, bidirectional=True, dtype=D), draw(6, 4, 3)
    found = diagnostics.state_map(lstm, x, row=2).layers
    assert list(found) == ["LSTM layer 0", "LSTM layer 0 reverse", "LSTM layer 1", "LSTM layer 1 reverse"]
    top = torch.cat([found["LSTM layer 1"], found["LSTM layer 1 reverse"]], -1)
    check(top, lstm(x)[0][:, 2], lstm(x)[0][:, 2])


def test_unrolled() -> None:
    text = diagnostics.unrolled(rnnkern.GRU(3, 8), torch.randn(2, 4, 3))
    assert text in "\n".join(line[8:] for line in (diagnostics.unrolled.__doc__ or "").splitlines())
    text = diagnostics.unrolled(nn.LSTM(3, 8, 2, bidirectional=True, batch_first=True), torch.randn(16, 100, 3))
    for words in (
        "LSTM, 100 steps",
        "[16, 16]",
        "layer 1 reverse",
        "h of layer 0",
        "h [16, 8], c [16, 8]",
        "100",
        "...",
    ):
        assert words in text, words
    assert "[8]" in diagnostics.unrolled(nn.RNN(3, 8), torch.randn(5, 3))


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lstm, x = rnnkern.LSTM(3, 5, 2), torch.randn(6, 4, 3)
    flow, states = tmp_path / "new" / "flow.png", tmp_path / "states.png"
    diagnostics.gradient_flow(lstm, x, lambda out: out[0].sum()).draw(flow)
    diagnostics.state_map(lstm, x).draw(states, labels=list("letter"))
    assert flow.read_bytes().startswith(PNG) and states.read_bytes().startswith(PNG)


def test_matplotlib_is_imported_when_drawing() -> None:
    program = (
        "import sys, torch, rnnkern; rnn = rnnkern.GRU(2, 3); x = torch.zeros(4, 1, 2);"
        "print(rnnkern.diagnostics.gradient_flow(rnn, x, lambda o: o[0].sum()));"
        "rnnkern.diagnostics.state_map(rnn, x); rnnkern.diagnostics.unrolled(rnn, x);"
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Own(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: diagnostics.gradient_flow(X, X, torch.sum), TypeError, "expected a module, got Tensor"),  # type: ignore[arg-type]
        (lambda: diagnostics.gradient_flow(nn.Linear(3, 3), X, torch.sum), ValueError, "has no RNN, LSTM or GRU"),
        (
            lambda: diagnostics.gradient_flow(nn.GRU(3, 3), X, lambda y: y[0]),
            ValueError,
            r"scalar loss, got \[4, 2, 3\]",
        ),
        (lambda: diagnostics.gradient_flow(nn.GRU(3, 3), X, lambda y: 1.0), ValueError, "scalar loss, got float"),
        (lambda: diagnostics.gradient_flow(nn.GRU(3, 3), X, lambda y: torch.zeros(())), ValueError, "does not depend"),
        (
            lambda: diagnostics.gradient_flow(nn.GRU(3, 3), X[:, :0], lambda y: y[0].sum()),
            ValueError,
            "at least one sequence, got an empty batch",
        ),
        (lambda: diagnostics.gradient_flow(Own(3, 3), X, torch.sum), TypeError, "Own has a forward of its own"),
        (lambda: diagnostics.state_map(nn.GRU(3, 3, 2, dropout=0.5), X), ValueError, "use eval"),
        (lambda: diagnostics.state_map(rnnkern.GRU(3, 3, zoneout=0.5), X), ValueError, "use eval"),
        (lambda: diagnostics.state_map(nn.GRU(3, 3), X, row=2), IndexError, "row 2 of a batch of 2"),
        (
            lambda: diagnostics.state_map(nn.GRU(3, 3), nn.utils.rnn.pack_padded_sequence(X, [4, 2])),
            ValueError,
            "sequences of one length",
        ),
        (lambda: diagnostics.unrolled(nn.GRUCell(3, 3), X), TypeError, "got GRUCell"),  # type: ignore[arg-type]
        (lambda: diagnostics.unrolled(nn.GRU(3, 3), [1]), TypeError, "to be a tensor, got list"),  # type: ignore[arg-type]
        (lambda: diagnostics.unrolled(nn.GRU(5, 3), X), RuntimeError, "got 3"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
