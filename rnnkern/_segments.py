"""A layer's scan and its backward, segment of time by segment of time, so that one segment's memory serves all.

Two uses. A cell with `split` gates writes gate gradients twice, dgx and dgh: 6 of the 12 units of T*B*H that a GRU's
training step would hold; they live only for the GEMMs that read them, so its backward runs in a few segments where it
can. And ``memory="recompute"`` (_recompute.py) makes each segment's forward anew before its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern._plan import Plan
from rnnkern._weights import layer_gradients
from rnnkern.backends.base import Backend, ScanInputs, ScanOutputs, accumulation_dtype

SEGMENTS = 3  # enough to need no more memory than torch.nn; each packs the weights anew
SMALLEST = 2**20  # bytes of gate gradients; with less there is nothing to save


class Segment(NamedTuple):
    """Steps `begin` to `end` of a scan, and the rows that they are."""

    number: int
    begin: int
    end: int
    rows: slice


def edges_of_backward(plan: Plan, inputs: ScanInputs, width: int) -> list[int]:
    """Where the backward of a scan is cut; [0, T] where the sequence is better taken whole. `width` is that of x.

    All groups must walk the same way, over rows that all exist, and what one segment leaves to the next must not be
    rounded on the way. Each segment makes weight gradients to add up: with few rows they outweigh what is saved.
    """
    spec, (S, N, columns) = plan.spec, inputs.gx.shape
    one_way = all(reverse == spec.reverse[0] for reverse in spec.reverse)
    dense = inputs.offsets is None and inputs.lengths is None
    exact = inputs.gx.dtype == accumulation_dtype(inputs.gx.dtype)
    able = one_way and dense and exact and not spec.noise and not plan.samples and inputs.gx.device.type == "cpu"
    large = 2 * S * N * columns * inputs.gx.element_size() >= SMALLEST
    saves = 2 * S * (SEGMENTS - 1) > SEGMENTS * (width + inputs.states[0].shape[-1])
    return evenly(inputs.T, min(SEGMENTS, inputs.T) if plan.cell.split and able and large and saves else 1)


def evenly(T: int, count: int) -> list[int]:
    """Edges of `count` segments whose lengths differ by one step at most: a short one would run by other kernels."""
    return [T * k // count for k in range(count + 1)]


def in_order(inputs: ScanInputs, edges: Sequence[int]) -> list[Segment]:
    """The segments of a scan whose groups all walk the same way, in the order of their walk."""
    if inputs.offsets is None:
        rows = [t * inputs.B for t in edges]
    else:
        rows = [*inputs.offsets[list(edges[:-1])].tolist(), inputs.gx.shape[0]]
    steps = zip(edges, edges[1:], rows, rows[1:], strict=False)
    found = [Segment(k, begin, end, slice(first, last)) for k, (begin, end, first, last) in enumerate(steps)]
    return found[::-1] if inputs.spec.reverse[0] else found


def part(inputs: ScanInputs, segment: Segment, states: tuple[Tensor, ...]) -> ScanInputs:
    """The scan of one segment, entered with `states`."""
    _, begin, end, rows = segment
    offsets, lengths, reset = inputs.offsets, inputs.lengths, inputs.reset
    return replace(
        inputs,
        T=end - begin,
        gx=inputs.gx[rows],
        states=states,
        offsets=None if offsets is None else offsets[begin:end] - rows.start,
        lengths=None if lengths is None else (lengths - begin).clamp(0, end - begin),
        reset=None if reset is None else reset[rows],
        noise=tuple(m if name == "h" else m[rows] for name, m in zip(inputs.spec.noise, inputs.noise, strict=True)),
    )


def saved(inputs: ScanInputs, outputs: ScanOutputs) -> Callable[[Segment], tuple[ScanInputs, ScanOutputs]]:
    """What `backward_in_segments` asks for, cut from the scan of a dense whole."""
    B, reverse = inputs.B, inputs.spec.reverse[0]

    def cut(segment: Segment) -> tuple[ScanInputs, ScanOutputs]:
        rows, states = segment.rows, inputs.states
        before = segment.end if reverse else segment.begin - 1
        if 0 <= before < inputs.T:
            left = slice(before * B, (before + 1) * B)
            states = tuple(v[left].transpose(0, 1) for v in (outputs.y, *outputs.seq))
        return part(inputs, segment, states), ScanOutputs(
            outputs.y[rows],
            (),
            tuple(v[rows] for v in outputs.seq),
            outputs.planes[rows] if outputs.planes.numel() else outputs.planes,
            outputs.hidden[rows] if outputs.hidden.numel() else outputs.hidden,
        )

    return cut


def backward_in_segments(
    plan: Plan,
    backend: Backend,
    segments: Sequence[Segment],
    scan_of: Callable[[Segment], tuple[ScanInputs, ScanOutputs]],
    d: Sequence[Tensor],
    x: Tensor,
    w_ih: Sequence[Tensor],
    wanted: Sequence[bool],
    dx: Tensor | None = None,
) -> list[Tensor | None]:
    """What `layer_gradients` gives for the whole. Where `dx` is given, the gradient of x is added to it."""
    K = len(plan.cell.states)
    dy, dfinal, dseq = d[0], tuple(d[1 : 1 + K]), tuple(d[1 + K :])
    add, dx = dx is not None, torch.empty_like(x) if dx is None and wanted[0] else dx
    total: list[Tensor | None] = [None] * len(wanted)
    state_at, weight_at = 1 + plan.first_state, 1 + plan.first_weight
    summed = [*range(state_at + K, state_at + K + plan.resets), *range(weight_at, len(wanted))]
    wide = accumulation_dtype(x.dtype)  # many small terms would be lost in a sum of 16 bits
    for segment in reversed(segments):
        inputs, kept = scan_of(segment)
        rows = segment.rows
        dseq_part = tuple(v[rows] if v.dim() > 1 else v for v in dseq)
        grads = backend.backward(inputs, kept, dy[rows], dfinal, dseq_part)
        dfinal = grads.dstates
        found = layer_gradients(plan, inputs, x[rows], w_ih, kept.y, kept.hidden, grads, wanted, in_place=True)
        if dx is not None and found[0] is not None:
            if add:
                dx[rows].add_(found[0])
            else:
                dx[rows] = found[0]
        total[state_at : state_at + K] = found[state_at : state_at + K]
        for at in summed:
            new, sum_so_far = found[at], total[at]
            if new is not None:
                total[at] = new.to(wide) if sum_so_far is None else sum_so_far.add_(new)
        dtypes = [None if v is None else v.dtype for v in found]
        del grads, found, inputs, kept  # before the next segment's are made
    for at in summed:
        whole = total[at]
        total[at] = None if whole is None else whole.to(dtypes[at])
    total[0] = dx
    return total
