"""The cells that torch.nn does not have, as loops in plain torch that spell their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

States = tuple[Tensor, ...]


def mgu(gx: Tensor, w: dict[str, Any], h: Tensor) -> States:
    xf, xn = gx.chunk(2, -1)
    hf, hn = linear(h, w["weight_hh"], w["bias_hh"]).chunk(2, -1)
    f = torch.sigmoid(xf + hf)
    n = torch.tanh(xn + f * hn)
    return ((1 - f) * h + f * n,)


def indrnn_relu(gx: Tensor, w: dict[str, Any], h: Tensor) -> States:
    b = 0 if w["bias_hh"] is None else w["bias_hh"]
    return (torch.relu(gx + w["weight_hh"] * h + b),)


def indrnn_tanh(gx: Tensor, w: dict[str, Any], h: Tensor) -> States:
    b = 0 if w["bias_hh"] is None else w["bias_hh"]
    return (torch.tanh(gx + w["weight_hh"] * h + b),)


def ligru(gx: Tensor, w: dict[str, Any], h: Tensor) -> States:
    az, an = (gx + linear(h, w["weight_hh"], w["bias_hh"])).chunk(2, -1)
    z = torch.sigmoid(az)
    n = torch.relu(an)
    return ((1 - z) * n + z * h,)


def slstm(gx: Tensor, w: dict[str, Any], h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> States:
    """Head by head, as the paper has it but for units of no past, where it divides by 0."""
    new = []
    for k, w_hh in enumerate(w["weight_hh"]):
        own = slice(k * w_hh.shape[1], (k + 1) * w_hh.shape[1])
        b = None if w["bias_hh"] is None else w["bias_hh"][k]
        i, f, z, o = (gx.chunk(len(w["weight_hh"]), -1)[k] + linear(h[:, own], w_hh, b)).chunk(4, -1)
        kept = torch.where(n[:, own] == 0, -torch.inf, torch.nn.functional.logsigmoid(f) + m[:, own])
        m_new = torch.where(kept > i, kept, i)
        i, f = (i - m_new).exp(), (kept - m_new).exp()
        c_new, n_new = f * c[:, own] + i * z.tanh(), f * n[:, own] + i
        new.append((o.sigmoid() * c_new / n_new, c_new, n_new, m_new))
    return tuple(torch.cat(parts, -1) for parts in zip(*new, strict=True))


def normalised(module: Any, end: str, product: Tensor, exist: Tensor) -> Tensor:
    """Batch normalisation over the rows that exist, or by running estimates."""
    mean, var = getattr(module, "bn_mean" + end), getattr(module, "bn_var" + end)
    if module.training:
        mean = product[exist].mean(0)
        var = (product[exist] - mean).square().mean(0)
    return (product - mean) / (var + 1e-5).sqrt() * getattr(module, "bn_ih" + end)


# Class, its further arguments, the step.
KINDS: dict[str, tuple[str, dict[str, Any], Callable[..., States]]] = {
    "MGU": ("MGU", {}, mgu),
    "IndRNN": ("IndRNN", {}, indrnn_relu),
    "LiGRU": ("LiGRU", {}, ligru),
    "LiGRU bare": ("LiGRU", {"batch_norm": False}, ligru),
    "SLSTM": ("SLSTM", {"num_heads": 3}, slstm),
    "IndRNN tanh": ("IndRNN", {"nonlinearity": "tanh"}, indrnn_tanh),
}


def loop(
    kind: str, module: Any, x: Tensor, hx: States, lengths: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, States]:
    """(output, final states) of a stack over x [T, B, I]; hx are [layers * directions, B, H]."""
    T, B, step = *x.shape[:2], KINDS[kind][2]
    lengths = torch.full((B,), T) if lengths is None else lengths
    reset = torch.zeros(T + 1, B, dtype=torch.bool) if reset is None else torch.cat((reset, reset[:1] & False))
    finals: list[States] = []
    for k in range(module.num_layers):
        sides = []
        for end in ("", "_reverse")[: 1 + module.bidirectional]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w = {name: getattr(module, f"{name}_l{k}{end}", None) for name in names}
            if w["weight_ih"].dim() == 3:  # heads
                w["weight_ih"], bias = w["weight_ih"].flatten(0, 1), w["bias_ih"]
                w["bias_ih"] = None if bias is None else bias.flatten()
            gx = linear(x, w["weight_ih"])
            if getattr(module, "batch_norm", False):
                gx = normalised(module, f"_l{k}{end}", gx, torch.arange(T).unsqueeze(1) < lengths)
            gx = gx if w["bias_ih"] is None else gx + w["bias_ih"]
            states: States = tuple(h[len(finals)] for h in hx)
            out = [gx.new_zeros(B, module.hidden_size)] * T
            for t in range(T)[:: -1 if end else 1]:
                alive = (t < lengths).unsqueeze(1)
                # Nothing crosses between t-1 and t: the reverse direction enters anew one step before.
                fresh = (reset[t + 1] & (t + 1 < lengths) if end else reset[t]).unsqueeze(1)
                new = step(gx[t], w, *(torch.where(fresh, 0, s) for s in states))
                states = tuple(torch.where(alive, a, b) for a, b in zip(new, states, strict=True))
                out[t] = torch.where(alive, new[0], 0)
            sides.append(torch.stack(out))
            finals.append(states)
        x = torch.cat(sides, -1)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
