"""What a call's tensors become on their way to the layers: rows, offsets, boundary masks, the dtypes of autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

States = tuple[Tensor, ...]


def unflatten(
    y: Tensor, states: tuple[States, ...], T: int, B: int, batch_first: bool
) -> tuple[Tensor, tuple[States, ...]]:
    """Rows to (time, batch) or (batch, time); the last layer's h stays the very output tensor."""

    def shaped(rows: Tensor) -> Tensor:
        both = rows.view(T, B, rows.size(-1))
        return both.transpose(0, 1) if batch_first else both

    out = shaped(y)
    return out, tuple(tuple(out if s is y else shaped(s) for s in kept) for kept in states)


def packed(batch_sizes: Tensor, B: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First row of every step and length of every batch row, from a PackedSequence's batch sizes."""
    offsets = batch_sizes.cumsum(0) - batch_sizes
    ended = torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True)
    lengths = batch_sizes.size(0) - ended
    return (offsets, lengths) if device.type == "cpu" else (offsets.to(device), lengths.to(device))


def as_groups(
    heads: int,
    per: int,
    params: Sequence[Tensor],
    hx: States | None,
    reset: Tensor | None,
    reset_state: States | None,
) -> tuple[Sequence[Tensor], States | None, Tensor | None, States | None]:
    """What a call gives to its layers, with every head of a direction as a group of its own: `per` parameters of each
    direction, states as hx, and which of [S, D] are reset.
    """
    split = [w.unbind(0) for w in params]
    starts = range(0, len(params), per)
    flat = [split[at][head] for start in starts for head in range(heads) for at in range(start, start + per)]

    def each(states: States | None) -> States | None:
        return states and tuple(h.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1) for h in states)

    marks = None if reset is None else reset.unsqueeze(2).expand(-1, -1, heads).flatten(1)
    return flat, each(hx), marks, each(reset_state)


def from_groups(heads: int, states: States) -> States:
    return tuple(h.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2) for h in states)


def in_order(
    module: Any, states: tuple[Tensor, ...], order: Tensor, batch: int, name: str, shared: bool = False
) -> tuple[Tensor, ...]:
    """States in the order of a packed batch; index_select alone would cut a batch that is too large without a word.

    `shared`: each of them may have a batch of 1, for all rows.
    """
    sizes = (1, batch) if shared else (batch,)
    for index, state in enumerate(states):
        if state.dim() != 3 or state.size(1) not in sizes:
            groups = module.num_layers * (2 if module.bidirectional else 1)
            width = module.proj_size if index == 0 and module.proj_size else module.hidden_size
            which = f"{name}[{index}]" if len(states) > 1 else name
            raise RuntimeError(f"Expected {which} size {(groups, batch, width)}, got {list(state.shape)}")
    return tuple(state if state.size(1) == 1 else state.index_select(1, order) for state in states)


def packed_reset(input: Tensor | PackedSequence, reset: Tensor | PackedSequence) -> Tensor:
    """The rows of a packed mask, whose layout has to be the input's."""
    if not isinstance(input, PackedSequence) or not isinstance(reset, PackedSequence):
        kinds = [type(v).__name__ for v in (reset, input)]
        raise ValueError(f"reset: expected the container of the input, got a {kinds[0]} with a {kinds[1]} input")
    order, other = input.sorted_indices, reset.sorted_indices
    same_order = order is other or (order is not None and other is not None and torch.equal(order, other))
    if not torch.equal(input.batch_sizes, reset.batch_sizes) or not same_order:
        raise ValueError("reset: expected a PackedSequence with the batch sizes and indices of the input")
    return reset.data


def boundaries(reset: Tensor, D: int, batch_sizes: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The caller's mask (a segment begins at t) as [S, D], each direction in its own sense.

    A boundary lies between t-1 and t. Walking forward, the state entering t is replaced; walking back, the one entering
    t-1. A mark in the padding is no boundary of the sequence: the reverse direction enters at its last row from hx.
    """
    if D == 1:
        return reset.reshape(-1, 1)
    if batch_sizes is None:
        later = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        if lengths is not None:
            later = later & (torch.arange(1, reset.size(0) + 1, device=reset.device).unsqueeze(1) < lengths)
    else:
        step = torch.repeat_interleave(torch.arange(batch_sizes.size(0)), batch_sizes)
        row = torch.arange(step.size(0)) - (batch_sizes.cumsum(0) - batch_sizes)[step]
        below = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])[step]
        follows = torch.where(row < below, torch.arange(step.size(0)) + batch_sizes[step], step.size(0))
        later = torch.cat([reset, torch.zeros_like(reset[:1])])[follows.to(reset.device)]
    return torch.stack([reset.reshape(-1), later.reshape(-1)], 1)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast region that tensors of this device type are in; None: in none."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_dtypes(
    low: torch.dtype, cell: str, input: Tensor, hx: States | None, ragged: bool, proj: bool, step: bool = False
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of (h, c) that torch's networks give under autocast.

    float64 is left alone. On accelerators all is in the autocast dtype. On the CPU that holds for RNN, RNNCell and an
    LSTM without projection on dense input; elsewhere only the products are cast, and pointwise operations promote to
    the dtype of the states, which with the default states is the input's. A projection is a product: h is cast, c not.
    `ragged`: packed sequences of different lengths.
    """
    if input.dtype == torch.float64:
        return input.dtype, input.dtype
    if input.device.type != "cpu" or cell.startswith("rnn") or (cell == "lstm" and not (ragged or proj or step)):
        return low, low
    wide = torch.promote_types(low, (hx[-1] if hx else input).dtype)
    return (low, wide) if proj else (wide, wide)


def cast(
    dtype: torch.dtype, input: Tensor, hx: States | None, params: Sequence[Tensor], reset_state: States | None
) -> tuple[Tensor, States | None, Sequence[Tensor], States | None]:
    """All tensors in the dtype of h; c is left as it is, because it goes to the accumulation dtype next."""
    hx = hx and (hx[0].to(dtype), *hx[1:])
    reset_state = reset_state and (reset_state[0].to(dtype), *reset_state[1:])
    return input.to(dtype), hx, [w.to(dtype) for w in params], reset_state
