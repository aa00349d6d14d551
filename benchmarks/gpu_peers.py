"""Peers that exist for GPUs: TorchRL's Triton kernels, FlashRNN and Haste, in the terms of torch.nn's weights.

Each is called as its documentation says to, in the layout that it likes best: transposing the input lies outside what
is timed, as packing does. Each says by `Unavailable` which cases it does not have. Their signatures are those of
torchrl 0.14, flashrnn 1.0 and haste_pytorch 0.5; the check against the fp64 truth would find a changed convention.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import DTYPES, Case
from benchmarks.problem import Problem, Side, Unavailable, imported

Tensors = dict[str, Tensor]


@dataclass
class Foreign:
    """A layer that is no torch.nn.RNNBase: its input and parameters as it holds them, and how to read its results."""

    x: Tensor
    dy: Tensor
    parameters: Sequence[Tensor]
    forward: Callable[[], tuple[Tensor, Callable[[], Tensors]]]  # the output, and all results under torch.nn's names
    gradients: Callable[[], Tensors]  # after a backward call, under torch.nn's names

    def side(self, name: str, algorithm: str, training: bool) -> Side:
        for value in (self.x, *self.parameters):
            value.requires_grad_(training)

        def call() -> Callable[[], Tensors]:
            if not training:
                return self.forward()[1]
            for value in (self.x, *self.parameters):
                value.grad = None
            y, found = self.forward()
            y.backward(self.dy)
            return found

        def results() -> Tensors:
            try:
                found = call()()
            except Exception as error:  # its compilers fail in many ways, and none of them is ours
                line = (str(error).splitlines() or [""])[0][:120]
                raise Unavailable(f"does not run: {type(error).__name__}: {line}") from error
            return {key: value.detach() for key, value in (found | (self.gradients() if training else {})).items()}

        return Side(name, algorithm, call, results)


def _refuse(case: Case, cells: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str] = ("dense",)) -> None:
    """Raises with the first reason why a peer that has only these does not have the case."""
    shape = case.shape
    for what, has, wants in (
        ("cell", cells, case.cell),
        ("dtype", dtypes, case.dtype),
        ("layout", layouts, shape.layout),
    ):
        if wants not in has:
            raise Unavailable(f"has no {what} {wants}")
    if shape.directions > 1:
        raise Unavailable("has one direction only")


def torchrl(problem: Problem, threads: int) -> Side:
    """LSTMModule and GRUModule with recurrent_backend="triton". It keeps everything in fp32; in bf16 its products are.

    The module takes and gives a TensorDict with the batch first, and a mask of where sequences start anew.
    """
    case = problem.case
    _refuse(case, ("lstm", "gru"), ("fp32", "bf16"), ("dense", "resets"))
    modules, tensordict = imported("torchrl.modules"), imported("tensordict")
    shape, states = case.shape, ("h", "c") if case.cell == "lstm" else ("h",)
    options = {"recurrent_compute_dtype": DTYPES[case.dtype]}
    if case.dtype == "fp32":
        options["recurrent_matmul_precision"] = case.precision
    module = getattr(modules, f"{case.cell.upper()}Module")(
        shape.H,
        shape.H,
        num_layers=shape.layers,
        in_keys=["x", *states],
        out_keys=["y", *(("next", state) for state in states)],
        recurrent_backend="triton",
        default_recurrent_mode=True,
        device=problem.x.device,
        **options,
    )
    return _torchrl_side(problem, module, states, tensordict.TensorDict)


def _torchrl_side(problem: Problem, module: Any, states: Sequence[str], container: Any) -> Side:
    case, shape = problem.case, problem.case.shape
    layer = getattr(module, case.cell)  # a torch.nn module whose weights the kernels read
    layer.load_state_dict(problem.weights)
    x = problem.x.transpose(0, 1).contiguous()
    reset = shape.resets() if shape.layout == "resets" else torch.zeros(shape.T, shape.B, dtype=torch.bool)
    reset = reset.t().contiguous().unsqueeze(-1).to(x.device)

    def forward() -> tuple[Tensor, Callable[[], Tensors]]:
        found = module(container({"x": x, "is_init": reset}, [shape.B, shape.T]))

        def named() -> Tensors:
            last = {state: found["next", state][:, -1].transpose(0, 1) for state in states}
            return {"y": found["y"].transpose(0, 1), **last}

        return found["y"], named

    def gradients() -> Tensors:
        return {"dx": x.grad.transpose(0, 1), **{f"d{name}": value.grad for name, value in layer.named_parameters()}}

    foreign = Foreign(x, problem.dy.transpose(0, 1).contiguous(), list(layer.parameters()), forward, gradients)
    return foreign.side("torchrl", f"Triton, {case.dtype} products of fp32", case.mode == "training")


def haste(problem: Problem, threads: int) -> Side:
    """haste_pytorch's LSTM and GRU, with its own conversion of torch.nn's weights."""
    case, shape = problem.case, problem.case.shape
    _refuse(case, ("lstm", "gru"), ("fp32", "fp16") if case.cell == "gru" else ("fp32",))
    if shape.layers > 1:
        raise Unavailable("has one layer only")
    if case.capture:
        raise Unavailable("cannot be captured: it makes and waits for streams of its own in every call")
    library = imported("haste_pytorch")
    dtype = DTYPES[case.dtype]
    layer = getattr(library, case.cell.upper())(shape.H, shape.H)
    names = [f"{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    layer.from_native_weights(*(problem.weights[name] for name in names))
    layer.to(problem.x.device, dtype).train(case.mode == "training")
    x = problem.x.to(dtype, copy=True)

    def forward() -> tuple[Tensor, Callable[[], Tensors]]:
        y, final = layer(x)
        return y, lambda: {
            "y": y,
            **dict(zip(("h", "c"), final if isinstance(final, tuple) else (final,), strict=False)),
        }

    def gradients() -> Tensors:
        # Its gates stand in the order z, r, n and i, g, f, o, in columns; one bias of an LSTM is both of torch's.
        def ours(gradient: Tensor) -> Tensor:
            parts = gradient.chunk(3 if case.cell == "gru" else 4, -1)
            order = (1, 0, 2) if case.cell == "gru" else (0, 2, 1, 3)
            return (
                torch.cat([parts[k] for k in order], -1).t()
                if gradient.dim() == 2
                else torch.cat([parts[k] for k in order])
            )

        biases = (layer.bias, layer.recurrent_bias if case.cell == "gru" else layer.bias)
        held = (layer.kernel, layer.recurrent_kernel, *biases)
        return {"dx": x.grad, **{f"d{name}": ours(value.grad) for name, value in zip(names, held, strict=True)}}

    foreign = Foreign(x, problem.dy.to(dtype), list(layer.parameters()), forward, gradients)
    return foreign.side("haste", "cuBLAS and a pointwise kernel for each step", case.mode == "training")


FLASH = {"lstm": "lstm", "gru": "gru", "rnn": "elman"}
FLASH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def flashrnn(problem: Problem, threads: int) -> Side:
    """FlashRNN's fused CUDA kernels (for GRU its alternating ones), one head; the input's product is its caller's task.

    It builds its kernels for each batch and width, with nvcc, when they are first called: minutes.
    """
    case = problem.case
    _refuse(case, tuple(FLASH), tuple(FLASH_DTYPES))
    if case.shape.layers > 1:
        raise Unavailable("has one layer only")
    if case.dtype == "fp32" and case.precision == "ieee":
        raise Unavailable("its products of fp32 are TF32")
    library = imported("flashrnn")
    if not shutil.which("nvcc"):
        raise Unavailable("it builds its kernels with nvcc, which is not on the path")
    return _flash_side(problem, library.flashrnn, "cuda" if case.cell == "gru" else "cuda_fused")


def _axes(held: str, wanted: str) -> tuple[int, ...]:
    return tuple(held.index(axis) for axis in wanted)


def _flash_side(problem: Problem, run: Callable[..., Any], backend: str) -> Side:
    """Letters as in its documentation: B batch, T time, G gates, H heads, D units, P units before; S states.

    Inputs and weights lie as its backend wants them inside, and are passed as views of the layout that it documents.
    """
    case, H = problem.case, problem.case.shape.H
    gates, dtype = {"lstm": 4, "gru": 3, "rnn": 1}[case.cell], DTYPES[case.dtype]
    inside, recurrent = ("TBHDG", "HDGP") if backend == "cuda_fused" else ("TBHGD", "HPGD")
    units_first = inside.endswith("DG")

    def taken(name: str) -> Tensor:
        return problem.weights[name].detach()

    x = problem.x.to(dtype, copy=True)
    w_ih = taken("weight_ih_l0").view(gates, H, H)
    w_ih = (w_ih.transpose(0, 1) if units_first else w_ih).reshape(gates * H, H).to(dtype, copy=True)
    # Its GRU has the recurrent gates in the order n, r, z, the input's in r, z, n, and a bias for each of n r z and n.
    order = [2, 0, 1] if case.cell == "gru" else list(range(gates))
    w_hh = taken("weight_hh_l0").view(gates, 1, H, H)[order].permute(_axes("GHDP", recurrent)).to(dtype).clone()
    w_hh = w_hh.contiguous()
    b_ih, b_hh = (taken(f"bias_{kind}_l0").view(gates, H) for kind in ("ih", "hh"))
    if case.cell == "gru":
        bias = torch.stack([b_hh[2], b_ih[0] + b_hh[0], b_ih[1] + b_hh[1], b_ih[2]])
    else:
        bias = b_ih + b_hh
    bias = bias.unsqueeze(1).to(dtype).contiguous()
    sizes = {"T": case.shape.T, "B": case.shape.B, "H": 1, "G": gates, "D": H}

    def forward() -> tuple[Tensor, Callable[[], Tensors]]:
        wx = F.linear(x, w_ih).view([sizes[axis] for axis in inside]).permute(_axes(inside, "BTGHD"))
        r = w_hh.permute(_axes(recurrent, "GHDP"))
        states, last = run(wx, r, bias, function=FLASH[case.cell], backend=backend, dtype=FLASH_DTYPES[case.dtype])
        y = states[0].squeeze(-2).transpose(0, 1)  # from SBTHD
        return y, lambda: {"y": y, **dict(zip(("h", "c"), last[:, :, -1, 0].unsqueeze(1), strict=False))}

    def gradients() -> Tensors:
        dw_ih = w_ih.grad.view(H, gates, H).transpose(0, 1).reshape(-1, H) if units_first else w_ih.grad
        inverse = [order.index(k) for k in range(gates)]
        dw_hh = w_hh.grad.permute(_axes(recurrent, "GHDP"))[inverse].reshape(gates * H, H)
        db = bias.grad.squeeze(1)
        db_ih, db_hh = (db[[1, 2, 3]], db[[1, 2, 0]]) if case.cell == "gru" else (db, db)
        named = {"weight_ih": dw_ih, "weight_hh": dw_hh, "bias_ih": db_ih.reshape(-1), "bias_hh": db_hh.reshape(-1)}
        return {"dx": x.grad, **{f"d{kind}_l0": value for kind, value in named.items()}}

    foreign = Foreign(x, problem.dy.to(dtype), [w_ih, w_hh, bias], forward, gradients)
    return foreign.side("flashrnn", backend, case.mode == "training")
