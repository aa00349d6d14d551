"""What makes another program of a model: torch.export, AOTInductor, ONNX, FX, TorchScript, quantization.

Each works, or is refused with a sentence that says a way round, and the way round works.
"""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import flat
from tolerance import check
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import _ops, dispatch

TOKENS = [torch.randint(0, 11, size, generator=torch.Generator().manual_seed(0)) for size in ((4, 7), (5, 9))]
DYNAMIC = ({0: Dim("B", min=2, max=64), 1: Dim("T", min=2, max=4096)},)
EVERY = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = rnnkern.LSTM(6, 5, 2, bidirectional=True, batch_first=True)
        self.second = rnnkern.GRU(10, 4, batch_first=True)
        self.cell = rnnkern.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        y = torch.relu(self.first(self.embed(tokens))[0])
        return self.head(self.cell(self.second(y)[0][:, -1]))


class Around(nn.Module):
    """A model with one module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.fixture
def model() -> nn.Module:
    return Tagger().eval()


def agrees(found: Any, model: nn.Module, tokens: Tensor, what: str) -> None:
    expected, truth = flat(model(tokens)), flat(copy.deepcopy(model).double()(tokens))
    check(flat(found), expected, truth, what)


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: nn.Module, strict: bool) -> None:
    """Any batch and length; the program is saved, loaded and run, keeps nothing for a backward, and has none."""
    program = torch.export.export(model, (TOKENS[0],), strict=strict, dynamic_shapes=DYNAMIC)
    op = _ops.scan_forward if dispatch.unavailable("cpp") else _ops.layer_forward
    ops = [n for n in program.graph.nodes if n.target in (op, _ops.inference)]
    assert [n.target for n in ops] == [_ops.inference, _ops.inference, op]  # two modules and a cell
    assert ops[2].args[0].split("|")[4] == "none"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for one in (program, program.run_decompositions(), torch.export.load(file)):
        for tokens in TOKENS:
            agrees(one.module()(tokens), model, tokens, "exported")
    with pytest.raises(RuntimeError, match=r"to train an exported program, export rnnkern.restore\(model\)"):
        program.module()(TOKENS[0]).sum().backward()


def test_export_refuses_packed_input() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, 6), [3, 2])
    with pytest.raises(ValueError, match="torch.export: .* of padded input with lengths= it does"):
        torch.export.export(rnnkern.GRU(6, 5), (packed,))


def test_export_of_lengths() -> None:
    module, x, lengths = rnnkern.GRU(6, 5), torch.randn(4, 3, 6), torch.tensor([4, 0, 2])
    program = torch.export.export(module, (x,), {"lengths": lengths}, strict=False)
    other = torch.tensor([1, 4, 3])
    expected = flat(module(x, lengths=other))
    check(flat(program.module()(x, lengths=other)), expected, expected, "lengths")


@pytest.mark.slow
def test_aot_inductor_package(model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(model, (TOKENS[0],), dynamic_shapes=DYNAMIC)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for tokens in TOKENS:
            agrees(packaged(tokens), model, tokens, "packaged")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(model: nn.Module, dynamo: bool) -> None:
    """ONNX's own nodes for recurrent networks, as of torch.nn's modules."""
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(model, (TOKENS[0],), file, dynamo=dynamo, input_names=["tokens"])
    session = runtime.InferenceSession(file.getvalue())
    found = session.run(None, {"tokens": TOKENS[0].numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), model(TOKENS[0]), atol=1e-5)  # ONNX Runtime's kernels, not ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "module, keywords, reason",
    [
        (rnnkern.GRU(6, 5), {"lengths": torch.tensor([4, 2])}, "torch.nn does, and that has no lengths="),
        (rnnkern.LSTM(6, 5, layer_norm=True).eval(), {}, "torch.nn does, and that has no layer_norm="),
        (rnnkern.MGU(6, 5), {}, "torch.onnx.export cannot follow mgu, which torch does not have"),
    ],
    ids=["lengths", "layer_norm", "mgu"],
)
def test_onnx_has_torchs_networks_only(module: nn.Module, keywords: dict[str, Any], reason: str) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=reason):
        torch.onnx.export(module, (torch.randn(4, 2, 6),), io.BytesIO(), kwargs=keywords, dynamo=True)


@pytest.mark.parametrize("kind", EVERY)
def test_fx(kind: str) -> None:
    model, x = Around(getattr(rnnkern, kind)(3, 4)), torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"accelerate\(torch.fx.symbolic_trace\(rnnkern.restore\(model\)\)\)"):
        torch.fx.symbolic_trace(model)
    expected = flat(model(x))
    traced = rnnkern.accelerate(torch.fx.symbolic_trace(rnnkern.restore(model)))
    assert type(traced.inner) is getattr(rnnkern, kind)
    check(flat(traced(x)), expected, expected, kind)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", EVERY)
def test_script(kind: str) -> None:
    model, x = Around(getattr(rnnkern, kind)(3, 4)), torch.randn(5, 3)
    for refused in (model, model.inner):
        with pytest.raises(
            RuntimeError, match=rf"cannot compile rnnkern.{kind}\. .*script\(rnnkern.restore\(model\)\)"
        ):
            torch.jit.script(refused)
    expected = flat(model(x))
    scripted = torch.jit.script(rnnkern.restore(model))
    with rnnkern.override():
        check(flat(scripted(x)), expected, expected, kind)


@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic(model: nn.Module) -> None:
    """It knows torch.nn's classes only and leaves ours in floating point, without a word; restored ones it takes."""
    left = torch.ao.quantization.quantize_dynamic(model)
    assert type(left.first) is rnnkern.LSTM and "quantized" in type(left.head).__module__
    taken = torch.ao.quantization.quantize_dynamic(rnnkern.restore(model))
    assert all("quantized" in type(m).__module__ for m in (taken.first, taken.second, taken.cell))
    assert (taken(TOKENS[0]) - left(TOKENS[0])).abs().max() < 0.1


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout, grad: bool) -> None:
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    module = rnnkern.LSTM(6, 4, batch_first=True)
    with torch.set_grad_enabled(grad):
        for one in (module, rnnkern.GRU(6, 4), rnnkern.RNN(6, 4), rnnkern.GRUCell(6, 4), rnnkern.LSTMCell(6, 4)):
            with pytest.raises(TypeError, match=re.escape("module(x.to_padded_tensor(0.0), lengths=...)")):
                one(x)
        y = module(x.to_padded_tensor(0.0), lengths=[3, 5])[0]
        for row, part in zip(y, parts, strict=True):
            expected = [module(part)[0]]
            check([row[: len(part)]], expected, expected, "padded")
