"""What a scan does beyond the plain one: masks, zoneout, bounds, elementwise parameters, layer norm.

Which of it, kernels are told as bits of one constant, so that without any they compile to the plain ones; how much of
it, as numbers at run time: a probability that changes from call to call must not compile anything anew.

A mask is made a tensor of 0 and 1 in the storage dtype: what is narrower than h would have Triton lay out h's product
for its width.
"""

# mypy: disable-error-code="assignment"
# Tuples grow in kernels, and Triton takes no annotation of them.

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnkern._weights import Entering
from rnnkern.backends.base import ScanInputs, ScanSpec, accumulation_dtype
from rnnkern.cells import CELLS
from rnnkern.cells.functions import normalise

BITS = (
    "keep_h", "keep_step", "candidate", "stay_h", "stay_c", "share_h", "share_c", "cell_clip", "proj_clip", "grad_clip",
    "small", "norm_h", "norm_c",
)  # fmt: skip
(
    KEEP_H, KEEP_STEP, CANDIDATE, STAY_H, STAY_C, SHARE_H, SHARE_C, CELL_CLIP, PROJ_CLIP, GRAD_CLIP, SMALL,
    NORM_H, NORM_C,
) = (tl.constexpr(1 << k) for k in range(len(BITS)))  # fmt: skip
DROPS = tl.constexpr(KEEP_H.value | KEEP_STEP.value)
ZONES_H = tl.constexpr(STAY_H.value | SHARE_H.value)
ZONES_C = tl.constexpr(STAY_C.value | SHARE_C.value)
NORMS = tl.constexpr(NORM_H.value | NORM_C.value)  # what needs whole rows

MASKS = {"h": "keep_h", "h_step": "keep_step", "candidate": "candidate", "zoneout_h": "stay_h", "zoneout_c": "stay_c"}
NUMBERS = ("scale_h", "scale_candidate", "share_h", "share_c", "cell_clip", "proj_clip", "grad_clip", "eps")


def small_of(spec: ScanSpec) -> tuple[str, ...]:
    """The elementwise parameters of the scan's cell that it has, in the cell's order."""
    return tuple(name for name in CELLS[spec.cell].small if name in spec.params)


def options_of(spec: ScanSpec) -> int:
    """Which options a scan has; 0: it is a plain one."""
    share_h, share_c = spec.zoneout
    found = {MASKS[name] for name in spec.noise}
    given = {
        "share_h": share_h and "stay_h" not in found,
        "share_c": share_c and "stay_c" not in found,
        "cell_clip": spec.cell_clip,
        "proj_clip": spec.proj_clip and "w_hr" in spec.params,
        "grad_clip": spec.grad_clip,
        "small": small_of(spec),
        "norm_h": "ln_hh" in spec.params,
        "norm_c": set(small_of(spec)) & set(CELLS[spec.cell].row),
    }
    found |= {name for name, there in given.items() if there}
    return sum(1 << k for k, name in enumerate(BITS) if name in found)


def has(options: int, bits: tl.constexpr) -> bool:
    return bool(options & bits.value)


def refusals(spec: ScanSpec) -> list[str]:
    """What of a scan's options no driver has."""
    cell = CELLS[spec.cell]
    known = {"h", "h_step", "zoneout_h", *(("zoneout_c",) if cell.has_c else ()), *cell.masks}
    reasons = [f"mask {name}" for name in spec.noise if name not in known]
    known = {"w_hh", "b_hh", "w_hr", "ln_hh", *cell.small}
    reasons += [f"parameter {name}" for name in spec.params if name not in known]
    for together in (cell.row, tuple(name for name in cell.small if name not in cell.row)):
        given = [name for name in together if name in spec.params]
        if 0 < len(given) < len(together):
            missing = (name for name in together if name not in given)
            reasons.append(f"parameter {given[0]} without {', '.join(missing)}")
    if not cell.has_c and (spec.cell_clip or spec.zoneout[1]):
        reasons.append(f"{cell.name} has no state c to clip or zone out")
    return reasons


def word(value: float) -> int:
    """A positive number as an integer that never fits 32 bits, so that launches do not differ in its type; with 50 of
    the 52 bits of its fraction, for a table's word has room for no more."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0]) >> 2


def arguments(inputs: ScanInputs, options: int) -> dict[str, Any]:
    """Masks [N, B, P] and [S, N, ...], elementwise parameters [N, K, H], and numbers."""
    spec, dtype = inputs.spec, inputs.gx.dtype
    found: dict[str, Any] = dict.fromkeys((*MASKS.values(), *NUMBERS, "small", "dsmall"))
    scale_h = 1.0
    for name, scale, mask in zip(spec.noise, spec.scales, inputs.noise, strict=True):
        numbers = mask.to(dtype).contiguous()
        if name in ("h", "h_step"):
            scale_h *= scale
        elif name == "candidate":
            found["scale_candidate"] = word(scale)
        elif scale != 1.0:
            numbers = numbers * scale
        found[MASKS[name]] = numbers
    if has(options, DROPS):
        found["scale_h"] = word(scale_h)
    numbers_of = {
        SHARE_H: ("share_h", spec.zoneout[0]),
        SHARE_C: ("share_c", spec.zoneout[1]),
        CELL_CLIP: ("cell_clip", spec.cell_clip),
        PROJ_CLIP: ("proj_clip", spec.proj_clip),
        GRAD_CLIP: ("grad_clip", spec.grad_clip),
        NORMS: ("eps", spec.eps),
    }
    found |= {name: word(value) for bit, (name, value) in numbers_of.items() if has(options, bit)}
    if has(options, SMALL):
        at = [spec.params.index(name) for name in small_of(spec)]
        found["small"] = torch.stack([torch.stack([group[k] for k in at]) for group in inputs.params])
    return found


def within_projection(inputs: ScanInputs, hidden: Tensor, weights: Tensor) -> Tensor:
    """[S, N, P] 1 where proj_clip did not bound the projection, else 0: what a backward multiplies dh by."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    raw = torch.einsum("snh,nph->snp", hidden.to(wide), weights.to(wide).view(-1, *weights.shape[-2:]))
    return (raw.abs() <= inputs.spec.proj_clip).to(hidden.dtype).contiguous()


def norms_of_products(inputs: ScanInputs, y: Tensor, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """What layer norm made of every step's product, without its gain [S, N, G*H], and what it multiplied by [S, N, K]:
    a backward reads them, and h is known by then."""
    cell, wide = CELLS[spec.cell], accumulation_dtype(y.dtype)
    entering = Entering(inputs, y, in_place=True)
    normed, scales = [], []
    for n, group in enumerate(inputs.params):
        h, w_hh = entering(n).to(wide), group[0].to(wide)
        product = torch.mm(h, w_hh.t()) if cell.dense else h.repeat(1, len(cell.gates)) * w_hh
        parts = product.split([count * product.shape[1] // len(cell.gates) for count in cell.norm], 1)
        found = [normalise(part, spec.eps) for part in parts]
        normed.append(torch.cat([values for values, _ in found], 1).to(y.dtype))
        scales.append(torch.cat([scale for _, scale in found], 1))
    return torch.stack(normed, 1), torch.stack(scales, 1)


# ---- on the device: `at` are rows [BLOCK_B], `j` columns [BLOCK_H] of tensors that are `WIDTH` wide ------------------


@triton.jit
def number(word, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    return (word.to(tl.int64) << 2).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def dropped(  # type: ignore[no-untyped-def]
    h, keep_h, keep_step, own, at, j, mask,
    WIDTH: tl.constexpr, ACC: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """h, or a gradient of it, times 0 and 1, in ACC."""
    h = h.to(ACC)
    if KEEP_H & OPTIONS:
        h = h * tl.load(keep_h + (own * WIDTH)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
    if KEEP_STEP & OPTIONS:
        h = h * tl.load(keep_step + (at * WIDTH)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
    return h


@triton.jit
def staying(  # type: ignore[no-untyped-def]
    stay, share, at, j, mask,
    WIDTH: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """The share of a state's entering value that stays: of each unit, by its mask, or of all."""
    if MASKED & OPTIONS:
        return tl.load(stay + (at * WIDTH)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
    else:
        return number(share, ACC)


@triton.jit
def mixed(stay, old, new):  # type: ignore[no-untyped-def]
    return stay * old + (1.0 - stay) * new


@triton.jit
def normalised(tiles, inside, eps, FIRST: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Layer norm, without its gain, of COUNT tiles together."""
    mean = 0.0
    for g in tl.static_range(COUNT):
        mean += tl.sum(tl.where(inside, tiles[FIRST + g], 0.0), 1)[:, None]
    mean = mean / (COUNT * H)
    square = 0.0
    centred = ()
    for g in tl.static_range(COUNT):
        centred = centred + (tl.where(inside, tiles[FIRST + g] - mean, 0.0),)
        square += tl.sum(centred[g] * centred[g], 1)[:, None]
    scale = tl.rsqrt(square / (COUNT * H) + eps)
    found = ()
    for g in tl.static_range(COUNT):
        found = found + (centred[g] * scale,)
    return found


@triton.jit
def d_normalised(d, normed, scale, FIRST: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradients at COUNT tiles from those at `normed`; columns that do not exist are 0 in `d`."""
    mean = 0.0
    slope = 0.0
    for g in tl.static_range(COUNT):
        mean += tl.sum(d[FIRST + g], 1)[:, None]
        slope += tl.sum(d[FIRST + g] * normed[FIRST + g], 1)[:, None]
    mean = mean / (COUNT * H)
    slope = slope / (COUNT * H)
    found = ()
    for g in tl.static_range(COUNT):
        found = found + (scale * (d[FIRST + g] - mean - normed[FIRST + g] * slope),)
    return found


@triton.jit
def auxiliary(  # type: ignore[no-untyped-def]
    candidate, scale_candidate, small, cell_clip, eps, n, at, j, mask,
    SMALLS: tl.constexpr, PEEPS: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """What a cell's step takes besides gates and states (triton_math.py)."""
    keep = ()
    parameters = ()
    bound = ()
    norm = ()
    if CANDIDATE & OPTIONS:
        kept = tl.load(candidate + (at * H)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
        keep = (kept * number(scale_candidate, ACC),)
    if SMALL & OPTIONS:
        for k in tl.static_range(SMALLS):
            values = tl.load(small + (n * SMALLS + k) * H + j, mask=j < H, other=0.0).to(ACC)
            if k < PEEPS:
                parameters = parameters + (values[None, :],)
            else:
                norm = norm + (values[None, :],)
    if NORM_C & OPTIONS:
        norm = norm + ((j < H)[None, :], H, number(eps, ACC))
    if CELL_CLIP & OPTIONS:
        bound = (number(cell_clip, ACC),)
    return keep, parameters, bound, norm
