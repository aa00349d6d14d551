"""A layer's backward, segment of time by segment of time, where gate gradients of the whole would be too much memory.

A cell with `split` gates writes them twice, dgx and dgh: 6 of the 12 units of T*B*H that a GRU's training step would
hold. They live only for the GEMMs that read them, so one segment's memory serves all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rnnkern._plan import Plan
from rnnkern._weights import layer_gradients
from rnnkern.backends.base import Backend, ScanInputs, ScanOutputs, accumulation_dtype

SEGMENTS = 3  # enough to need no more memory than torch.nn; each packs the weights anew
SMALLEST = 2**20  # bytes of gate gradients; with less there is nothing to save


def steps_of_a_segment(plan: Plan, inputs: ScanInputs, width: int) -> int:
    """How many; T where the sequence is better taken whole. `width` is that of x.

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
    if not (plan.cell.split and able and large and saves):
        return inputs.T
    return -(-inputs.T // SEGMENTS)


def backward_in_segments(
    plan: Plan,
    backend: Backend,
    inputs: ScanInputs,
    outputs: ScanOutputs,
    d: Sequence[Tensor],
    x: Tensor,
    w_ih: Sequence[Tensor],
    wanted: Sequence[bool],
    steps: int,
) -> list[Tensor | None]:
    """What `layer_gradients` gives for the whole."""
    K = len(plan.cell.states)
    dy, dfinal, dseq = d[0], tuple(d[1 : 1 + K]), tuple(d[1 + K :])
    dx = torch.empty_like(x) if wanted[0] else None
    total: list[Tensor | None] = [None] * len(wanted)
    state_at, weight_at = 1 + plan.first_state, 1 + plan.first_weight
    for begin, end in _walk_back(inputs.T, steps, plan.spec.reverse[0]):
        part, kept = _part(inputs, outputs, begin, end)
        rows = slice(begin * inputs.B, end * inputs.B)
        dseq_part = tuple(v[rows] if v.dim() > 1 else v for v in dseq)
        grads = backend.backward(part, kept, dy[rows], dfinal, dseq_part)
        dfinal = grads.dstates
        found = layer_gradients(plan, part, x[rows], w_ih, kept.y, kept.hidden, grads, wanted, in_place=True)
        if dx is not None and found[0] is not None:
            dx[rows] = found[0]
        total[state_at : state_at + K] = found[state_at : state_at + K]
        for at in (*range(state_at + K, state_at + K + plan.resets), *range(weight_at, len(wanted))):
            new, sum_so_far = found[at], total[at]
            total[at] = new if sum_so_far is None or new is None else sum_so_far.add_(new)
        del grads, found  # before the next segment's are made
    total[0] = dx
    return total


def _walk_back(T: int, steps: int, reverse: bool) -> Iterator[tuple[int, int]]:
    begins = range(0, T, steps)
    for begin in begins if reverse else reversed(begins):
        yield begin, min(begin + steps, T)


def _part(inputs: ScanInputs, outputs: ScanOutputs, begin: int, end: int) -> tuple[ScanInputs, ScanOutputs]:
    """The scan of the steps from `begin` to `end`, entered with what the steps before them left."""
    B, reverse = inputs.B, inputs.spec.reverse[0]
    rows = slice(begin * B, end * B)
    before = end if reverse else begin - 1
    states = inputs.states
    if 0 <= before < inputs.T:
        left = slice(before * B, (before + 1) * B)
        states = tuple(v[left].transpose(0, 1) for v in (outputs.y, *outputs.seq))
    part = replace(
        inputs,
        T=end - begin,
        gx=inputs.gx[rows],
        states=states,
        reset=None if inputs.reset is None else inputs.reset[rows],
    )
    return part, ScanOutputs(
        outputs.y[rows],
        (),
        tuple(v[rows] for v in outputs.seq),
        outputs.planes[rows] if outputs.planes.numel() else outputs.planes,
        outputs.hidden[rows] if outputs.hidden.numel() else outputs.hidden,
    )
