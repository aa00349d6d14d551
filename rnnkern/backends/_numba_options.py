"""What the Numba loops do beyond a plain scan: masks, fixed mixtures, bounds, layer norm; the order is base.py's.

The loops take an `Options`, or None: Numba compiles each of the two by itself and leaves out what the other has, so
that a plain scan neither runs nor compiles any of this. Which of the options there are is asked once per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from rnnkern.cells.numba_math import CALLED, EXACT, FAST, clip, d_normalise, moments


class Aux(NamedTuple):
    """What a cell's step may need besides its inputs and states."""

    keep: np.ndarray  # [H] the factors of the row's candidate
    cell_clip: np.floating  # 0: off
    eps: np.floating  # of layer norm
    peeps: bool  # whether there are peepholes, and layer norm of c
    norms: bool
    small: np.ndarray  # [5, H] peepholes of i, f, o; gain and shift of c
    dsmall: np.ndarray  # their gradients, added up in a backward
    work: np.ndarray  # [3, H]


class Options(NamedTuple):
    """Of one group. Masks are bytes, the rest is of the compute dtype; what is absent has no rows."""

    aux: Aux
    keep_h: np.ndarray  # [B, P], of work rows
    keep_step: np.ndarray  # [S, N, P]
    candidate: np.ndarray  # [S, N, H]
    zoneout_h: np.ndarray  # [S, N, P]
    zoneout_c: np.ndarray  # [S, N, H]
    scale_h: np.floating  # what each of the first three keeps is multiplied by it
    scale_step: np.floating
    scale_candidate: np.floating
    share_h: np.floating  # zoneout's fixed mixture; 0: off, as for the bounds
    share_c: np.floating
    proj_clip: np.floating
    grad_clip: np.floating
    edges: np.ndarray  # [parts + 1] columns of gh between which layer norm is taken
    gain: np.ndarray  # [G*H] ln_hh
    left: np.ndarray  # [B, P] h as it meets w_hh, then as it entered; in a backward the gradient of the former
    entered: np.ndarray  # [H] the row's c as it entered; in a backward what of its gradient goes past the step
    # In a backward:
    product: np.ndarray  # [S, G*H] what layer norm was taken of
    projected: np.ndarray  # [S, P] h before the clip of its projection
    past: np.ndarray  # [B, P] the gradient of h that goes past the step
    dprod: np.ndarray  # [S, N, G*H]
    dgain: np.ndarray


@njit(**FAST)
def _keep(row, mask, scale):  # type: ignore[no-untyped-def]
    for j in range(row.shape[0]):
        row[j] *= row.dtype.type(mask[j]) * scale  # not a choice: NaN and Inf times 0 are NaN, as in torch


@njit(**FAST)
def _keep_left(r, n, i, left, keep_h, scale_h, keep_step, scale_step):  # type: ignore[no-untyped-def]
    if keep_h.shape[0] > 0:
        _keep(left[i], keep_h[i], scale_h)
    if keep_step.shape[0] > 0:
        _keep(left[i], keep_step[r, n], scale_step)


@njit(**CALLED)
def drop(t, n, alive, offsets, order, h, o):  # type: ignore[no-untyped-def]
    """o.left of step t."""
    for i in range(alive[t]):
        for j in range(h.shape[1]):
            o.left[i, j] = h[i, j]
        _keep_left(offsets[t] + order[i], n, i, o.left, o.keep_h, o.scale_h, o.keep_step, o.scale_step)


@njit(**CALLED)
def carry(t, n, alive, offsets, order, dh, o):  # type: ignore[no-untyped-def]
    """Adds to dh what comes through o.left and what went past the step."""
    for i in range(alive[t]):
        _keep_left(offsets[t] + order[i], n, i, o.left, o.keep_h, o.scale_h, o.keep_step, o.scale_step)
        for j in range(dh.shape[1]):
            dh[i, j] += o.left[i, j] + o.past[i, j]


@njit(**CALLED)
def bound(t, alive, dh, drest, limit):  # type: ignore[no-untyped-def]
    """Clips the gradients that leave step t."""
    if limit > 0:
        for i in range(alive[t]):
            clip(dh[i], limit)
            for k in range(drest.shape[1]):
                clip(drest[i, k], limit)


@njit(**FAST)
def pre_activation(gh, bias, edges, gain, eps):  # type: ignore[no-untyped-def]
    """From a row of products to gh, in place."""
    for k in range(edges.shape[0] - 1):
        part, part_gain = gh[edges[k] : edges[k + 1]], gain[edges[k] : edges[k + 1]]
        mean, scale = moments(part, eps)
        for j in range(part.shape[0]):
            part[j] = (part[j] - mean) * scale * part_gain[j]
    for j in range(gh.shape[0]):
        gh[j] += bias[j]


@njit(**FAST)
def d_pre_activation(d, product, edges, gain, dgain, eps):  # type: ignore[no-untyped-def]
    """From the gradients of gh to those of the product, in place."""
    for k in range(edges.shape[0] - 1):
        first, last = edges[k], edges[k + 1]
        d_normalise(d[first:last], product[first:last], gain[first:last], dgain[first:last], eps)


@njit(**FAST)
def keep_candidate(r, n, keep, masks, scale):  # type: ignore[no-untyped-def]
    """The factors of a row; without a mask they stay what they are."""
    if masks.shape[0] > 0:
        for j in range(keep.shape[0]):
            keep[j] = 1
        _keep(keep, masks[r, n], scale)


# Not FAST: old and now would meet in one difference, which of two infinities is NaN.
@njit(**EXACT)
def mix(r, n, old, now, masks, share):  # type: ignore[no-untyped-def]
    """Zoneout of a row: now becomes old where it stays, or a share of it."""
    if masks.shape[0] > 0:
        mask = masks[r, n]
        for j in range(now.shape[0]):
            stay = now.dtype.type(mask[j])
            now[j] = stay * old[j] + (now.dtype.type(1) - stay) * now[j]
    elif share != 0:
        for j in range(now.shape[0]):
            now[j] = share * old[j] + (now.dtype.type(1) - share) * now[j]


@njit(**FAST)
def d_mix(r, n, d, past, masks, share):  # type: ignore[no-untyped-def]
    """Divides d between `past`, which goes to the state that entered, and the step, which d then holds."""
    if masks.shape[0] > 0:
        mask = masks[r, n]
        for j in range(d.shape[0]):
            stay = d.dtype.type(mask[j])
            past[j] = stay * d[j]
            d[j] *= d.dtype.type(1) - stay
    elif share != 0:
        for j in range(d.shape[0]):
            past[j] = share * d[j]
            d[j] *= d.dtype.type(1) - share
    else:
        for j in range(d.shape[0]):
            past[j] = 0
