"""Derivatives, masks and normalisation shared by the reference steps.

Derivatives take the activation's output, not its argument: a step saves what it computed, and no kernel needs more.
A name that begins with t is a tangent: t_d_sigmoid is how d_sigmoid moves when y moves by t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern.cells.spec import Aux


def d_sigmoid(y: Tensor) -> Tensor:
    return y * (1 - y)


def t_d_sigmoid(y: Tensor, t: Tensor) -> Tensor:
    return (1 - 2 * y) * t


def d_tanh(y: Tensor) -> Tensor:
    return 1 - y * y


def t_d_tanh(y: Tensor, t: Tensor) -> Tensor:
    return -2 * y * t


def d_relu(d: Tensor, y: Tensor) -> Tensor:
    """The gradient at v of ``y = relu(v)``. As in torch, a NaN in d ends at a dead unit, and one in y is not dead."""
    return torch.where(y <= 0, 0, d)


def clip(v: Tensor, bound: float) -> Tensor:
    """v within [-bound, bound]; a bound of 0 is none."""
    return v.clamp(-bound, bound) if bound else v


def d_clip(d: Tensor, v: Tensor, bound: float) -> Tensor:
    """The gradient at v of ``clip(v, bound)``."""
    return torch.where(v.abs() <= bound, d, 0) if bound else d


def kept(v: Tensor, aux: Aux) -> Tensor:
    """A candidate, or what a mask leaves of it."""
    keep = aux.noise.get("candidate")
    return v if keep is None else v * keep


def normalise(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm without its gain (Ba et al. 2016, population variance), and the reciprocal deviation it divided by."""
    centred = v - v.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale


def d_normalise(d: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient at v of ``y, scale = normalise(v)``."""
    return scale * (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True))
