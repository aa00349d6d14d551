"""What is under :class:`rnnkern.Stream`: its snapshot of a module's weights, and steps where there is no extension."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rnnkern import _call, dispatch
from rnnkern._options import PLAIN, Extended, Options
from rnnkern._stack import BatchNormed, Beyond, Heads, Step
from rnnkern.backends.base import accumulation_dtype
from rnnkern.beyond import MGU, SLSTM, IndRNN, LiGRU
from rnnkern.beyond_cells import IndRNNCell, LiGRUCell, MGUCell, SLSTMCell
from rnnkern.cells import CELLS
from rnnkern.convert import PAIRS

_BEYOND = (MGU, IndRNN, LiGRU, SLSTM, MGUCell, IndRNNCell, LiGRUCell, SLSTMCell)
KINDS = (*(theirs for theirs, _ in PAIRS), *_BEYOND)
FORWARDS = [kind.forward for kind in (*KINDS, *(ours for _, ours in PAIRS))]
FORMS = {None: 0, "bf16": 1, "int8": 2}  # how weights are kept; the numbers are csrc/api.h's
WIDEST = 1 << 16  # along a sum of int8: more might not fit the 32 bits that csrc/generic/forms-inl.h adds them up in


@dataclass(frozen=True)
class Shape:
    """What a stream is a stream of."""

    cell: str
    layers: int
    I: int
    H: int
    P: int
    is_cell: bool  # a module of one step: states without layers
    batch_first: bool
    options: Options = PLAIN  # those that count in evaluation
    heads: int = 0  # the first dimension of every weight; 0: they have none

    @property
    def suffix(self) -> str:
        """Of the first layer's weights."""
        return "" if self.is_cell else "_l0"

    @property
    def projected(self) -> bool:
        return self.P != self.H

    @classmethod
    def of(cls, module: torch.nn.Module) -> Shape:
        """Raises where steps of a stream would not be what the module computes."""
        kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if kind is None:
            names = ", ".join(kind.__name__ for kind in KINDS)
            raise TypeError(f"Stream: expected a module of torch.nn or rnnkern ({names}), got {type(module).__name__}")
        if type(module).forward not in FORWARDS or "forward" in module.__dict__:
            raise TypeError(f"Stream: {type(module).__name__} has a forward of its own, which a stream would not run")
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(f"Stream: the {kind.__name__} has forward hooks, which a stream would not run")
        m: Any = module
        if getattr(m, "bidirectional", False):
            raise ValueError(
                "Stream: the module is bidirectional: its backward direction begins at the end of the sequence, which "
                "a stream has not seen"
            )
        options = PLAIN
        if isinstance(m, Extended):
            options = replace(
                m.options, recurrent_dropout=0.0, recurrent_dropout_mode="sequence", weight_dropout=0.0, grad_clip=0.0
            )
        is_cell = isinstance(m, (torch.nn.RNNCellBase, Step))
        if isinstance(m, (torch.nn.RNN, torch.nn.RNNCell)):
            relu = m.mode == "RNN_RELU" if isinstance(m, torch.nn.RNN) else m.nonlinearity == "relu"
            cell = "rnn_relu" if relu else "rnn_tanh"
        elif isinstance(m, Beyond):
            cell = m._cell
        else:
            cell = "lstm" if kind.__name__.startswith("LSTM") else "gru"
        P = 0 if is_cell else m.proj_size
        layers, batch_first = (1, False) if is_cell else (m.num_layers, m.batch_first)
        sizes = m.input_size, m.hidden_size, P or m.hidden_size
        heads = m.num_heads if isinstance(m, Heads) else 0
        return cls(cell, layers, *sizes, is_cell, batch_first, options, heads)

    def sizes(self, B: int) -> tuple[tuple[int, int, int], ...]:
        """Of the states."""
        widths = self.P, *[self.H] * (len(CELLS[self.cell].states) - 1)
        return tuple((self.layers, B, width) for width in widths)

    def native(self, B: int, I: int) -> tuple[int, ...]:
        """As csrc/stream.cpp takes them; `I` of the first layer."""
        return self.layers, B, I, self.H, self.P, self.heads or 1, self.projected


def quantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in [-127, 127] and the scale of every row."""
    w = w.float()
    scale = w.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def snapshot(
    module: torch.nn.Module, shape: Shape, dtype: torch.dtype, form: str | None, *, copy: bool = True
) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh, w_hr and the weights' scales of every layer, as csrc/stream.cpp packs them: one head's
    below the other's.

    After those of a layer come the parameters of its options. Without `copy` they may be the module's own.
    """
    spec, extra, heads = CELLS[shape.cell], shape.options.extra(shape.cell), shape.heads
    wide, flat = accumulation_dtype(dtype), []
    kept = torch.bfloat16 if form == "bf16" or dtype == torch.bfloat16 else wide
    for k in range(shape.layers):
        suffix = "" if shape.is_cell else f"_l{k}"

        def get(name: str, suffix: str = suffix) -> Tensor | None:
            found = getattr(module, name + suffix, None)
            return None if found is None else found.detach().to(dtype)

        w_hr = get("weight_hr") if shape.projected else None
        weights: list[Tensor | None] = [get("weight_ih"), get("weight_hh"), w_hr]
        biases = [get("bias_ih"), get("bias_hh")]
        found = [None if w is None else tuple(w.shape) for w in (*weights, *biases)]
        tall = len(spec.gates) * shape.H
        recurrent = spec.recurrent_shape(shape.H, shape.P // (heads or 1))
        sizes = [(tall, shape.P if k else shape.I), recurrent, (shape.P, shape.H), (tall,), (tall,)]
        if heads:
            sizes = [(heads, rows // heads, *rest) for rows, *rest in sizes]
        if None in found[:2] or any(f not in (None, size) for f, size in zip(found, sizes, strict=True)):
            raise RuntimeError(f"Stream: expected weights of shapes {sizes} in layer {k}, got {found}")
        if heads:
            weights, biases = ([t if t is None else t.flatten(0, 1) for t in part] for part in (weights, biases))
        if isinstance(module, BatchNormed) and module.batch_norm:
            weights[0], biases[0] = module._folded(suffix, wide)
        scales: list[Tensor | None] = [None, None, None]
        for i, w in enumerate(weights):
            if w is None:
                continue
            if w.dim() == 1:  # of a diagonal recurrence: kept as the biases are
                weights[i] = w.to(wide, copy=copy)
            elif form == "int8":
                if not w.isfinite().all():
                    raise ValueError(f"Stream: weights='int8' needs finite weights; those of layer {k} have NaN or Inf")
                weights[i], scales[i] = quantized(w)
            else:
                weights[i] = w.to(kept, copy=copy)
        wide_biases = (None if b is None else b.to(wide, copy=copy) for b in biases)
        flat += [*weights[:2], *wide_biases, weights[2], *scales]
        flat += [getattr(module, name + suffix).detach().to(dtype, copy=copy) for name in extra]
    return [None if t is None else t.contiguous() for t in flat]


class Functional:
    """Steps by the functional call, with the methods of the extension's Stream: right everywhere, but slower.

    As there, what does not fit gets None or False with nothing done. A step of some rows computes all of them and keeps
    the others' states.
    """

    def __init__(self, shape: Shape, B: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.B, self.dtype, self.device = shape, B, dtype, device
        self.backend = dispatch.requested()
        self.weights: list[Tensor] = []
        self.states = self._zeros()
        self._busy = threading.Lock()

    def _zeros(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(size, dtype=self.dtype, device=self.device) for size in self.shape.sizes(self.B))

    def __enter__(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "this Stream is in use by another thread: give every thread a Stream of its own, or let them take turns"
            )

    def __exit__(self, *error: object) -> None:
        self._busy.release()

    def pack(self, *flat: Tensor | None) -> bool:
        weights: list[Tensor] = []
        per = len(flat) // self.shape.layers
        for k in range(0, len(flat), per):
            w_ih, w_hh, b_ih, b_hh, w_hr = flat[k : k + 5]
            scales, extra = flat[k + 5 : k + 8], flat[k + 8 : k + per]
            matrices = []
            for w, scale in zip((w_ih, w_hh, w_hr), scales, strict=True):
                if w is not None:
                    w = w.to(self.dtype) if scale is None else (w.float() * scale.unsqueeze(1)).to(self.dtype)
                matrices.append(w)
            if (b_ih is None) != (b_hh is None):  # as in torch, a bias set to None is zero
                zero = torch.zeros_like(b_hh if b_ih is None else b_ih)  # type: ignore[arg-type]
                b_ih, b_hh = (zero if b is None else b for b in (b_ih, b_hh))
            biases = [None if b is None else b.to(self.dtype) for b in (b_ih, b_hh)]
            found = [w for w in (*matrices[:2], *biases, matrices[2], *extra) if w is not None]
            weights += [w.unflatten(0, (self.shape.heads, -1)) for w in found] if self.shape.heads else found
        with self:
            self.weights = weights
        return True

    def step(self, x: Any, rows: Any, out: Tensor | None) -> Tensor | None:
        if type(x) is not Tensor or not x.is_contiguous() or x.shape != (self.B, self.shape.I):
            return None
        if x.dtype != self.dtype or x.device != self.device:
            return None
        if rows is not None and (type(rows) is not Tensor or rows.dtype != torch.bool or rows.shape != (self.B,)):
            return None
        with self:
            y, states = self._call(x.unsqueeze(0))
            y = y[0].clone()  # the caller may write to it, and a backend may have made h of the same memory
            if rows is not None:
                keep = rows.to(self.device).unsqueeze(1)
                y = torch.where(keep, y, 0)
                states = tuple(torch.where(keep, new, old) for new, old in zip(states, self.states, strict=True))
            self.states = states
            return y if out is None else out.copy_(y)

    def run(self, x: Tensor, y: Tensor, batch_first: bool) -> bool:
        with self:
            found, self.states = self._call(x.transpose(0, 1) if batch_first else x)
            y.copy_(found.transpose(0, 1) if batch_first else found)
        return True

    def read(self, *to: Tensor) -> bool:
        with self:
            for tensor, state in zip(to, self.states, strict=True):
                tensor.copy_(state)
        return True

    def write(self, rows: Tensor | None, *states: Tensor) -> bool:
        new = tuple(s.clone() for s in states) or self._zeros()
        with self:
            if rows is not None:
                keep = rows.to(self.device).unsqueeze(1)
                new = tuple(torch.where(keep, s, old) for s, old in zip(new, self.states, strict=True))
            self.states = new
        return True

    def _call(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        s = self.shape
        bias = len(self.weights) // s.layers - len(s.options.extra(s.cell)) >= 4
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), dispatch.use_backend(self.backend):
            y, states, _ = _call.run(
                s.cell, x, self.states, self.weights, bias, s.layers, 0.0, False, False, False, None, None, None, None,
                False, "save", s.options, None, s.heads,
            )  # fmt: skip
        return y, states
