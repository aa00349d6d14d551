"""Layer calls as data: made from a torch.nn module or at random, run by rnnkern's layer or written out in torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from states import natural
from torch import Tensor, nn
from torch.nn.functional import linear

from rnnkern import dispatch
from rnnkern.autograd import Group, layer
from rnnkern.backends.base import ScanInputs, ScanSpec
from rnnkern.cells import CELLS

# Module, its arguments, and the cell that it computes.
MODULES: dict[str, tuple[type[nn.RNNBase], dict[str, Any], str]] = {
    "rnn_tanh": (nn.RNN, {}, "rnn_tanh"),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}, "rnn_relu"),
    "gru": (nn.GRU, {}, "gru"),
    "lstm": (nn.LSTM, {}, "lstm"),
    "lstm_projected": (nn.LSTM, {"proj_size": 2}, "lstm"),
}
D = torch.float64


@dataclass(frozen=True)
class Call:
    """One layer call. `tensors` and `with_tensors` make it a function of its floating-point arguments."""

    cell: str
    x: Tensor
    states: tuple[Tensor, ...]
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    reverse: tuple[bool, ...]
    T: int
    B: int
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_states: tuple[Tensor, ...] = ()
    noise: dict[str, tuple[Tensor, float]] = field(default_factory=dict)  # mask and scale
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        weights = [v for g in self.groups for v in (g.w_ih, g.b_ih, *g.params) if v is not None]
        return [self.x, *self.states, *self.reset_states, *weights]

    def with_tensors(self, *values: Tensor) -> Call:
        rest = list(values)

        def take(count: int) -> tuple[Tensor, ...]:
            taken, rest[:] = tuple(rest[:count]), rest[count:]
            return taken

        (x,), states, resets = take(1), take(len(self.states)), take(len(self.reset_states))
        groups = []
        for g in self.groups:
            (w_ih,), (b_ih,) = take(1), take(1) if g.b_ih is not None else (None,)
            groups.append(Group(w_ih, b_ih, take(len(self.names))))
        return replace(self, x=x, states=states, reset_states=resets, groups=tuple(groups))

    def detached(self) -> Call:
        return self.with_tensors(*(t.detach() for t in self.tensors))

    def run(self, backend: str | None = "reference") -> tuple[Tensor, ...]:
        """y, final states, and every state but h after every step, by rnnkern's layer."""
        y, final, seq = layer(
            self.cell,
            self.x,
            self.states,
            self.groups,
            self.reverse,
            self.T,
            self.B,
            param_names=self.names,
            offsets=self.offsets,
            lengths=self.lengths,
            reset=self.reset,
            reset_states=self.reset_states,
            noise=[mask for mask, _ in self.noise.values()],
            noise_names=tuple(self.noise),
            scales=tuple(scale for _, scale in self.noise.values()),
            keep_states=True,
            backend=backend,
            **self.options,
        )
        return (y, *final, *seq)

    def inputs(self, save: str = "all") -> ScanInputs:
        scales = tuple(scale for _, scale in self.noise.values())
        spec = ScanSpec(self.cell, self.reverse, self.names, tuple(self.noise), save, scales=scales, **self.options)
        directions = len(self.groups) // self.x.shape[1]
        gx = [linear(self.x[:, n // directions], g.w_ih, g.b_ih) for n, g in enumerate(self.groups)]
        return ScanInputs(
            spec,
            self.T,
            self.B,
            torch.stack(gx, 1),
            self.states,
            tuple(g.params for g in self.groups),
            self.offsets,
            self.lengths,
            self.reset,
            tuple(r.expand(s.shape) for r, s in zip(self.reset_states, self.states, strict=False)),
            tuple(mask for mask, _ in self.noise.values()),
        )

    def written_out(self) -> tuple[Tensor, ...]:
        """The same by the reference's forward and torch's own autograd: no Function, no hand-written derivative."""
        out = dispatch.backend("reference").forward(self.inputs())
        return (out.y, *out.final, *out.seq)

    def skip_if_refused(self, backend: str) -> Call:
        reasons = dispatch.backend(backend).unsupported(self.inputs())
        if reasons:
            pytest.skip(f"backend {backend}: {'; '.join(reasons)}")
        return self


def gradients(outputs: tuple[Tensor, ...], wrt: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Of a fixed random projection of all outputs, so that no part of any of them goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o in outputs]
    found = torch.autograd.grad(outputs, wrt, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if d is None else d for d, w in zip(found, wrt, strict=True)]


def module_groups(m: nn.RNNBase, k: int) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Layer k of a torch.nn module as groups, one per direction, and the names of their parameters."""
    names = ("w_hh", *(("b_hh",) if m.bias else ()), *(("w_hr",) if m.proj_size else ()))
    torch_names = {"w_hh": "weight_hh", "b_hh": "bias_hh", "w_hr": "weight_hr"}
    groups = []
    for suffix in ("", "_reverse")[: 1 + m.bidirectional]:
        get = {name: getattr(m, f"{torch_names[name]}_l{k}{suffix}") for name in names}
        b_ih = getattr(m, f"bias_ih_l{k}{suffix}") if m.bias else None
        groups.append(Group(getattr(m, f"weight_ih_l{k}{suffix}"), b_ih, tuple(get.values())))
    return tuple(groups), names


def module_calls(m: nn.RNNBase, cell: str, rows: Tensor, hx: tuple[Tensor, ...], T: int, B: int, **kw: Any):  # type: ignore[no-untyped-def]
    """A torch.nn module's whole stack over rows [S, I]: (y [S, D*P], final states as the module gives them)."""
    backend = kw.pop("backend", "reference")
    n, finals = 1 + m.bidirectional, []
    for k in range(m.num_layers):
        groups, names = module_groups(m, k)
        states = tuple(h[k * n : (k + 1) * n] for h in hx)
        call = Call(cell, rows.unsqueeze(1), states, groups, names, (False, True)[:n], T, B, **kw)
        y, *rest = call.run(backend)
        rows = y.flatten(1)
        finals.append(rest[: len(hx)])
    return rows, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))


def random_call(
    cell: str,
    *,
    T: int = 4,
    B: int = 3,
    I: int = 2,
    H: int = 4,
    P: int | None = None,
    reverse: tuple[bool, ...] = (False, True),
    extra: tuple[str, ...] = (),
    dtype: torch.dtype = D,
) -> Call:
    """A call with random weights and states that all ask for gradients; `extra` names further parameters."""
    spec, N = CELLS[cell], len(reverse)
    G, width = len(spec.gates), P or H

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, dtype=D) * 0.6).to(dtype).requires_grad_()

    names = ("w_hh", "b_hh", *(("w_hr",) if P else ()), *extra)
    sizes = {"w_hh": spec.recurrent_shape(H, width), "b_hh": (G * H,), "w_hr": (width, H), "ln_hh": (G * H,)}
    groups = tuple(
        Group(draw(G * H, I), draw(G * H), tuple(draw(*sizes.get(name, (H,))) for name in names)) for _ in reverse
    )
    states = natural(spec, [draw(N, B, width if k == 0 else H) for k in range(len(spec.states))])
    return Call(cell, draw(T * B, 1, I), states, groups, names, reverse, T, B)


def everything(cell: str, P: int | None = None, **sizes: Any) -> Call:
    """Every option of the contract that the cell has, at once."""
    spec = CELLS[cell]
    call = random_call(cell, P=P, extra=("ln_hh", *spec.small), **sizes)
    S, N, H = call.T * call.B, len(call.groups), call.groups[0].w_ih.shape[0] // len(spec.gates)
    W = call.states[0].shape[-1]

    def mask(*size: int) -> Tensor:
        return torch.rand(*size) > 0.35

    noise = {"h": (mask(N, call.B, W), 1.4), "h_step": (mask(S, N, W), 1.3), "zoneout_h": (~mask(S, N, W), 1.0)}
    noise |= {name: (mask(S, N, H), 1.2) for name in spec.masks}
    options: dict[str, Any] = {"proj_clip": 0.8 if P else 0.0}
    if spec.has_c:
        noise["zoneout_c"] = (~mask(S, N, H), 1.0)
        options["cell_clip"] = 0.7
    lengths = torch.tensor([call.T, 0, *[call.T - 1] * (call.B - 2)])[: call.B]
    restart = natural(spec, [torch.randn_like(s).mul_(0.6).requires_grad_() for s in call.states])
    return replace(
        call,
        lengths=lengths,
        reset=torch.rand(S, N) < 0.3,
        reset_states=restart,
        noise=noise,
        options=options,
    )


def own_direction(reset: Tensor) -> Tensor:
    """A mask [T, B] where segments begin, as [S, 2] in each direction's own sense: the reverse one restarts at the last
    step of the segment before."""
    back = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
    return torch.stack((reset.reshape(-1), back.reshape(-1)), 1)
