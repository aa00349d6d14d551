"""What the options of _options.py do to the layers of a call: masks, dropped weights, normalised projections.

Masks are drawn here, from torch's generator, so that every backend is given the same: first the dropped recurrent
weights of all layers and directions, then, layer by layer and before the dropout between layers, the mask of
recurrent_dropout and those of zoneout for h and c. Each is ``torch.rand(size, device=...)``, compared with its
probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from rnnkern import dispatch
from rnnkern._options import Options
from rnnkern._products import linear
from rnnkern._run import real, unwatched
from rnnkern.autograd import Group
from rnnkern.backends.base import ScanSpec
from rnnkern.cells import CELLS


def dropped(params: Sequence[Tensor], per: int, p: float) -> list[Tensor]:
    """The flat list with dropout on every w_hh (Merity et al. 2018): one mask for all steps and rows."""
    return [torch.dropout(w, p, True) if at % per == 1 else w for at, w in enumerate(params)]


def scan_options(
    options: Options, cell: str, training: bool, S: int, B: int, groups: int, widths: Sequence[int], x: Tensor
) -> dict[str, Any]:
    """Arguments of :func:`rnnkern.autograd.layer` for one layer of S rows; `widths` are those of its states."""
    shares = options.shares[: len(widths)]
    found: dict[str, Any] = {name: getattr(options, name) for name in ("cell_clip", "proj_clip", "grad_clip")}
    if not training:
        return found | {"zoneout": (*shares, 0.0)[:2]}
    masks: dict[str, tuple[Tensor, float]] = {}
    p = options.recurrent_dropout
    if p:
        name, size = {
            "sequence": ("h", (groups, B, widths[0])),
            "step": ("h_step", (S, groups, widths[0])),
            "candidate": ("candidate", (S, groups, widths[-1])),
        }[options.recurrent_dropout_mode]
        masks[name] = torch.rand(size, device=x.device) >= p, 1 / (1 - p)
    for name, p, width in zip(("zoneout_h", "zoneout_c"), shares, widths, strict=False):
        if p:
            masks[name] = torch.rand(S, groups, width, device=x.device) < p, 1.0
    return found | {
        "noise": [mask for mask, _ in masks.values()],
        "noise_names": tuple(masks),
        "scales": tuple(scale for _, scale in masks.values()),
    }


def normed_in_scan(x: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the scan itself normalises the products of its input, by ln_ih among a group's params: the C++ one does,
    as it makes them, where no gradient is to come, for which they would have to be kept.
    """
    if torch.is_grad_enabled() or not x.is_cpu or dispatch.requested() not in (None, "cpp"):
        return False
    return dispatch.unavailable("cpp") is None and unwatched() and real((x, *params))


def normalised(cell: str, x: Tensor, groups: Sequence[Group], at: int) -> tuple[Tensor, tuple[Group, ...]]:
    """A layer under layer norm: its pre-activations in place of rows x [S, I], and groups that have no projection.

    ``LN(x W_ih^T) * ln_ih + b_ih``, as the scan does with h; `at` is where ln_ih stands in a group's params.
    """
    spec = CELLS[cell]
    columns, rest = [], []
    for w_ih, b_ih, params in groups:
        assert w_ih is not None
        sizes = [count * w_ih.shape[0] // len(spec.gates) for count in spec.norm]
        biases = [None] * len(sizes) if b_ih is None else b_ih.split(sizes)
        parts = zip(w_ih.split(sizes), params[at].split(sizes), biases, strict=True)
        gx = [layer_norm(linear(x, w), w.shape[:1], gain, b, ScanSpec.eps) for w, gain, b in parts]
        columns.append(gx[0] if len(gx) == 1 else torch.cat(gx, -1))
        rest.append(Group(None, None, (*params[:at], *params[at + 1 :])))
    return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, 1), tuple(rest)


def rows_that_exist(x: Tensor, T: int, B: int, lengths: Tensor) -> Tensor:
    """Padded rows [T*B, I] with zeros for padding: nothing is known of it, and normalising NaN gives NaN gradients."""
    padding = torch.arange(T, device=x.device).unsqueeze(1) >= lengths
    return x.masked_fill(padding.reshape(T * B, 1), 0)
