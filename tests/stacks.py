"""Whole calls as data: a torch.nn module, rnnkern's twin with the same weights, an input in every container."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from conftest import scan_backends
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern

D = torch.float64
KINDS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "GRU": {},
    "LSTM": {},
    "LSTM proj": {"proj_size": 2},
}
CELLS = {"RNNCell": {}, "RNNCell relu": {"nonlinearity": "relu"}, "GRUCell": {}, "LSTMCell": {}}
LAYOUTS = ("dense", "packed", "unsorted", "unbatched")


def call_backends() -> list[Any]:
    """Every name of use_backend for pytest.mark.parametrize; one that cannot be loaded is skipped with its reason."""
    return [*scan_backends(), pytest.param("torch", id="torch")]


@cache
def torch_has_lstm(dtype: torch.dtype) -> bool:
    """Whether oneDNN has an LSTM of that dtype, which torch does not ask under autocast: bf16 needs AVX-512."""
    try:
        with torch.autocast("cpu", dtype=dtype):
            torch.nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


@dataclass
class Pair:
    """torch.nn's module and rnnkern's, with the same weights."""

    theirs: Any
    ours: Any
    backend: str | None = "reference"

    def run_ours(self, *args: Any, **kwargs: Any) -> Any:
        with rnnkern.use_backend(self.backend):
            return self.ours(*args, **kwargs)

    def compare(
        self, input: Any, hx: Any, leaves: Sequence[Tensor], what: str, seed: int = 5, params: bool = True
    ) -> None:
        """Outputs, final states and gradients of leaves and weights, in fp64 or by the one rule against fp64."""
        torch.manual_seed(seed)
        theirs = flat(self.theirs(input, hx))
        torch.manual_seed(seed)
        ours = flat(self.run_ours(input, hx))
        assert [o.dtype for o in ours] == [t.dtype for t in theirs], what
        check(ours, theirs, theirs, what)
        wrt = [list(leaves), list(leaves)]
        if params:
            wrt = [[*leaves, *m.parameters()] for m in (self.ours, self.theirs)]
        check_grad(gradients(ours, wrt[0]), (t := gradients(theirs, wrt[1])), t, f"{what}, gradient")


def pair(kind: str, *args: Any, backend: str | None = "reference", dtype: torch.dtype = D, **kwargs: Any) -> Pair:
    name = kind.split()[0]
    kwargs = {**{**KINDS, **CELLS}[kind], **kwargs}
    theirs = getattr(torch.nn, name)(*args, dtype=dtype, **kwargs)
    ours = getattr(rnnkern, name)(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return Pair(theirs, ours, backend)


def example(module: Any, layout: str, T: int = 4, B: int = 3) -> tuple[Any, Any, list[Tensor]]:
    """(input, hx, the leaves behind them) for a module, time steps drawn for packed layouts."""
    dtype = next(module.parameters()).dtype
    N, P = module.num_layers * (1 + module.bidirectional), module.proj_size or module.hidden_size
    shape = (B, T, module.input_size) if module.batch_first else (T, B, module.input_size)
    if layout == "unbatched":
        shape, B = (T, module.input_size), 0
    widths = (P, module.hidden_size) if "LSTM" in module.mode else (P,)
    leaves = [draw(*shape, dtype=dtype), *(draw(*((N, B, w) if B else (N, w)), dtype=dtype) for w in widths)]
    x: Tensor | PackedSequence = leaves[0]
    if layout in ("packed", "unsorted"):
        lengths = torch.randint(1, T + 1, (B,))
        lengths[B // 2] = T
        lengths = lengths.sort(descending=True).values if layout == "packed" else lengths
        x = pack_padded_sequence(leaves[0], lengths, module.batch_first, enforce_sorted=layout == "packed")
    return x, tuple(leaves[1:]) if len(widths) == 2 else leaves[1], leaves


def draw(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, dtype=D).to(dtype).requires_grad_()


def flat(result: Any) -> list[Tensor]:
    """All tensors of a result, packed ones as their rows, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def gradients(outputs: Sequence[Tensor], wrt: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Of a fixed random projection of all outputs; a tensor that has no part in them gets zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, dtype=D, generator=generator).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(list(outputs), list(wrt), weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True)]


def precise(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).double()
