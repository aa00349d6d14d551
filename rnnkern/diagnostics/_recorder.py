"""Runs a model with its recurrent networks step by step, so that the states of every step are tensors of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern import _call
from rnnkern import nn as recurrent
from rnnkern._options import PLAIN

NETWORKS = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
FORWARDS = {getattr(home, kind.__name__).forward for home in (nn, recurrent) for kind in NETWORKS}


@dataclass
class Track:
    """The states of one layer and direction, or of one cell, in the order of its steps."""

    name: str
    reverse: bool = False
    states: list[tuple[Tensor, ...]] = field(default_factory=list)  # of every step: (h,) or (h, c), each [N, H]

    def by_time(self) -> list[tuple[Tensor, ...]]:
        return self.states[::-1] if self.reverse else self.states


@contextmanager
def recording(title: str, model: nn.Module) -> Iterator[list[Track]]:
    """The tracks of all recurrent networks and cells in `model`, filled by calls of it inside.

    Raises:
        TypeError: not a module, or one whose forward is not torch.nn's or rnnkern's.
        ValueError: a module without recurrent networks, or with one whose states are drawn at random in training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{title}: expected a module, got {type(model).__name__}")
    tracks: list[Track] = []
    with ExitStack() as undo:
        for path, module in model.named_modules():
            if isinstance(module, NETWORKS):
                own = _tracks(path or type(module).__name__, module)
                _certain(title, path, module)
                undo.enter_context(_replaced(module, _stepwise(title, module, own)))
                tracks += own
            elif isinstance(module, CELLS):
                track = Track(path or type(module).__name__)
                hook = module.register_forward_hook(_noting(track))
                undo.callback(hook.remove)
                tracks.append(track)
        if not tracks:
            raise ValueError(f"{title}: {type(model).__name__} has no RNN, LSTM or GRU, nor a cell of these, in it")
        yield tracks


def call(model: nn.Module, x: Any) -> Any:
    return model(*x) if type(x) is tuple else model(x)  # a PackedSequence is a tuple too


def _tracks(path: str, module: Any) -> list[Track]:
    found = []
    for layer in range(module.num_layers):
        name = f"{path} layer {layer}" if module.num_layers > 1 else path
        found.append(Track(name))
        if module.bidirectional:
            found.append(Track(f"{name} reverse", reverse=True))
    return found


def _certain(title: str, path: str, module: Any) -> None:
    if type(module).forward not in FORWARDS:
        raise TypeError(f"{title}: {path or 'the module'}: {type(module).__name__} has a forward of its own")
    options = getattr(module, "options", PLAIN)
    zoneout = options.zoneout if isinstance(options.zoneout, tuple) else (options.zoneout,)
    if module.training and (module.dropout or options.recurrent_dropout or options.weight_dropout or any(zoneout)):
        raise ValueError(f"{title}: {path or 'the module'}: dropout and zoneout change from call to call: use eval()")


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _noting(track: Track) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, tuple) else (output,)
        track.states.append(states)

    return note


def _stepwise(title: str, module: Any, tracks: list[Track]) -> Callable[..., Any]:
    """A forward for `module`: the same numbers from one call for every step, layer and direction."""

    def forward(input: Any, hx: Any = None, **given: Any) -> Any:
        more = [name for name, value in given.items() if value is not None and value is not False]
        if more or not isinstance(input, Tensor):
            what = f"{', '.join(more)}=" if more else type(input).__name__
            raise ValueError(f"{title}: {what} is not supported here: expected sequences of one length, as a tensor")
        cell, two, D = module.mode.lower(), module.mode == "LSTM", 1 + module.bidirectional
        names = module._flat_weights_names
        plain = not hasattr(module, "_weights")
        weights = [getattr(module, name) for name in names] if plain else module._weights()
        per = len(weights) // (module.num_layers * D)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if module.batch_first and batched else x
        if hx is not None:
            hx = hx if two else (hx,)
            hx = hx if batched else tuple(h.unsqueeze(1) for h in hx)
        finals = []
        for k in range(module.num_layers):
            sides = []
            for d in range(D):
                n = k * D + d
                state = None if hx is None else tuple(h[n : n + 1] for h in hx)
                found = []
                for t in reversed(range(len(x))) if d else range(len(x)):
                    _, state, _ = _call.run(
                        cell, x[t : t + 1], state, weights[n * per : (n + 1) * per], module.bias, 1, 0.0,
                        module.training, False, False, options=getattr(module, "options", PLAIN),
                    )  # fmt: skip
                    found.append(state)
                tracks[n].states += found
                finals.append(state)
                sides.append(torch.cat([h for h, *_ in (reversed(found) if d else found)]))
            x = torch.cat(sides, -1)
        y = x.transpose(0, 1) if module.batch_first and batched else x
        ends = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        if not batched:
            y, ends = y.squeeze(1), tuple(h.squeeze(1) for h in ends)
        return y, ends if two else ends[0]

    return forward
