"""One case made concrete: the weights and data that every side gets, and how a torch-like module runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import DTYPES, Case, module_name


class Unavailable(Exception):
    """This peer cannot run this case; the text says why."""


def imported(name: str) -> Any:
    """A peer's module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        whole, part = name.split(".")[0], missing.split(".")[0]
        reason = f"{whole} is not installed" if part == whole else f"{whole} cannot be imported: {error}"
        raise Unavailable(reason) from error


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
    memory = {"memory": "recompute"} if shape.layout == "recompute" and library is not torch.nn else {}
    return cls(shape.H, shape.H, num_layers=shape.layers, bidirectional=shape.directions == 2, **memory)


def module_side(name: str, library: Any, problem: Problem, dtype: torch.dtype) -> Side:
    """A side that calls a module of `library`, on the problem's data in `dtype`."""
    module = build(library, problem.case).to(problem.case.device, dtype)
    module.load_state_dict(problem.weights)
    return side_of(name, module, problem, dtype, _called(module, library, problem))


def _called(module: torch.nn.Module, library: Any, problem: Problem) -> Callable[..., Any]:
    """The module with the arguments of the case's layout, or for torch.nn, which lacks them, what gives the same."""
    shape, on = problem.case.shape, problem.x.device
    if shape.layout == "resets":
        reset = shape.resets()
        return Segments(module, reset) if library is torch.nn else partial(module, reset=reset.to(on))
    if shape.layout == "lengths":
        lengths = shape.lengths()
        return partial(padded, module, lengths) if library is torch.nn else partial(module, lengths=lengths.to(on))
    if shape.layout == "states" and library is not torch.nn:
        return lambda x: module(x, return_states=True)[:2]
    return module


def padded(module: torch.nn.Module, lengths: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    y, final = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y)[0], final


class Segments:
    """A torch.nn layer where sequences start anew: it has no such argument, so every stretch between two resets becomes
    a sequence of its own in one packed batch. Which row goes where is worked out once, moving the rows is timed."""

    def __init__(self, module: torch.nn.Module, reset: Tensor) -> None:
        T, B = reset.shape
        first = reset.clone()
        first[0] = True
        found = []  # (column, first step, steps)
        for column in range(B):
            starts = [*torch.nonzero(first[:, column]).flatten().tolist(), T]
            found += [(column, start, end - start) for start, end in zip(starts, starts[1:], strict=False)]
        found.sort(key=lambda segment: -segment[2])
        # Packed rows lie step by step, the longest sequence first.
        rows = [(start + k) * B + column for k in range(T) for column, start, steps in found if k < steps]
        sizes = [sum(k < steps for _, _, steps in found) for k in range(found[0][2])]
        last = {column: index for index, (column, start, steps) in enumerate(found) if start + steps == T}
        on = next(module.parameters()).device
        self.module, self.sizes = module, torch.tensor(sizes)
        self.order = torch.tensor(rows, device=on)
        self.back = torch.argsort(self.order)
        self.last = torch.tensor([last[column] for column in range(B)], device=on)

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        packed = PackedSequence(x.flatten(0, 1).index_select(0, self.order), self.sizes)
        y, final = self.module(packed)
        y = y.data.index_select(0, self.back).view(*x.shape[:2], -1)
        states = final if isinstance(final, tuple) else (final,)
        states = tuple(state.index_select(1, self.last) for state in states)
        return y, states if len(states) > 1 else states[0]


def side_of(
    name: str, module: torch.nn.Module, problem: Problem, dtype: torch.dtype, called: Callable[..., Any] | None = None
) -> Side:
    """A side that calls a module which holds the problem's weights under torch.nn's names, or a form of it."""
    called = module if called is None else called
    case, training = problem.case, problem.case.mode != "inference"
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
        y = y.data if isinstance(y, PackedSequence) else y
        if case.mode == "penalty":
            (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
            dx.square().sum().backward()
        else:
            y.backward(dy)
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
