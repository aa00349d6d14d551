"""One case made concrete: the weights and data that every side gets, and how a torch-like module runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import DTYPES, Case, module_name


class Unavailable(Exception):
    """This peer cannot run this case; the text says why."""


@dataclass
class Side:
    """One competitor in one case. `call` is what is timed, `results` what it computed, by name, as tensors."""

    name: str
    algorithm: str
    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]
    module: torch.nn.Module | None = None


@dataclass
class Problem:
    """Weights, inputs and the gradient from above of a case, in fp32 that the case's dtype represents exactly."""

    case: Case
    weights: dict[str, Tensor]
    x: Tensor  # [T, B, I], or [B, I] for a cell
    hx: tuple[Tensor, ...]  # a cell's states; else empty: zeros
    dy: Tensor

    @classmethod
    def of(cls, case: Case) -> Problem:
        """torch.nn's own initial weights and normally distributed data, the same at every run."""
        torch.manual_seed(0)
        shape, dtype = case.shape, DTYPES[case.dtype]
        module = build(torch.nn, case)
        lead = (shape.B,) if shape.layout == "cell" else (shape.steps, shape.B)
        states = (2 if case.cell == "lstm" else 1) if shape.layout == "cell" else 0
        # .5: about the size that states have in a trained network
        drawn = [torch.randn(*lead, shape.H), torch.randn(*lead, shape.directions * shape.H)]
        drawn += [0.5 * torch.randn(shape.B, shape.H) for _ in range(states)]
        x, dy, *hx = (value.to(dtype).float() for value in drawn)
        weights = {name: value.to(dtype).float() for name, value in module.state_dict().items()}
        on = case.device
        weights = {name: value.to(on) for name, value in weights.items()}
        return cls(case, weights, x.to(on), tuple(h.to(on) for h in hx), dy.to(on))


def build(library: Any, case: Case) -> torch.nn.Module:
    """The case's module from torch.nn or rnnkern."""
    shape, cls = case.shape, getattr(library, module_name(case.cell, case.shape.layout))
    if shape.layout == "cell":
        return cls(shape.H, shape.H)
    return cls(shape.H, shape.H, num_layers=shape.layers, bidirectional=shape.directions == 2)


def module_side(name: str, library: Any, problem: Problem, dtype: torch.dtype) -> Side:
    """A side that calls a module of `library`, on the problem's data in `dtype`."""
    module = build(library, problem.case).to(problem.case.device, dtype)
    module.load_state_dict(problem.weights)
    return side_of(name, module, problem, dtype)


def side_of(
    name: str, module: torch.nn.Module, problem: Problem, dtype: torch.dtype, called: Callable[..., Any] | None = None
) -> Side:
    """A side that calls a module which holds the problem's weights under torch.nn's names, or a form of it."""
    called = module if called is None else called
    case, training = problem.case, problem.case.mode == "training"
    module.train(training)
    leaf = problem.x.to(dtype, copy=True)
    x: Any = leaf
    dy = problem.dy.to(dtype)
    if case.shape.layout == "packed":
        x = pack_padded_sequence(leaf, case.shape.lengths(), enforce_sorted=False)
        dy = pack_padded_sequence(dy, case.shape.lengths(), enforce_sorted=False).data
        leaf = x.data
    leaf.requires_grad_(training)
    states = tuple(h.to(dtype) for h in problem.hx)
    arguments = (x, states if len(states) > 1 else states[0]) if states else (x,)

    def forward() -> Any:
        return called(*arguments)

    parameters = list(module.parameters())

    def step() -> Any:
        leaf.grad = None
        for parameter in parameters:
            parameter.grad = None
        result = forward()
        y = result[0] if isinstance(result, tuple) else result
        (y.data if isinstance(y, PackedSequence) else y).backward(dy)
        return result

    call = step if training else forward

    def results() -> dict[str, Tensor]:
        found: dict[str, Tensor | None] = dict(named(case, call()))
        if training:
            found["dx"] = leaf.grad
            found |= {f"d{key}": value.grad for key, value in module.named_parameters()}
        return {key: value.detach() for key, value in found.items() if value is not None}

    return Side(name, "", call, results, module)


def named(case: Case, result: Any) -> dict[str, Tensor]:
    """What a module returned, by name; packed outputs padded."""
    if case.shape.layout == "cell":
        return dict(zip(("h", "c"), result if isinstance(result, tuple) else (result,), strict=False))
    y, final = result
    final = final if isinstance(final, tuple) else (final,)
    y = pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y
    return {"y": y, **dict(zip(("h", "c"), final, strict=False))}
