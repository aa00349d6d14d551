"""Truncated back-propagation through time: a long sequence in chunks that hand their states on, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnnkern._stack import Stack

States = Tensor | tuple[Tensor, ...]


def tbptt(
    module: torch.nn.RNNBase | Stack, x: Tensor, chunk: int, hx: States | None = None
) -> Iterator[tuple[Tensor, States]]:
    r"""Run a recurrent network over a long sequence chunk by chunk, for training by truncated back-propagation through
    time (Williams and Peng 1990).

    Every chunk begins with the states that the one before ended with, as numbers: gradients stay within their chunk,
    and so does memory, however long the sequence is, if the caller lets go of a chunk's outputs and loss. Loss,
    backward and the optimizer's step are the caller's, in the body of the loop; the next chunk runs with the new
    weights.

    Args:
        module: an RNN, LSTM or GRU of torch.nn, or any of rnnkern's, in one direction: a reverse one begins at the end.
        x: the sequence, `(L, N, H_in)`, `(N, L, H_in)` with the module's `batch_first`, or `(L, H_in)`.
        chunk: steps in a chunk; the last one may be shorter.
        hx: states before the first step, as the module takes them; zeros if not given.

    Yields:
        ``output, hx`` of every chunk, as the module returns them. Both may be part of the loss.

    Raises:
        TypeError: a module of another kind, or an `x` that is no tensor.
        ValueError: a bidirectional module, or a chunk of no steps.

    Example::

        >>> for k, (output, hx) in enumerate(rnnkern.tbptt(lstm, x, 1000)):
        ...     optimizer.zero_grad()
        ...     loss_of(output, target[1000 * k : 1000 * (k + 1)]).backward()
        ...     optimizer.step()
    """
    if not isinstance(module, (torch.nn.RNNBase, Stack)):
        raise TypeError(f"tbptt: expected an RNN, LSTM, GRU or another of rnnkern's, got {type(module).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"tbptt: expected x to be a tensor, got {type(x).__name__}")
    if module.bidirectional:
        raise ValueError("tbptt: a bidirectional module's reverse direction begins at the end of the whole sequence")
    if chunk < 1:
        raise ValueError(f"tbptt: expected a chunk of one step or more, got {chunk}")
    return _chunks(module, x, chunk, hx)


def _chunks(module: torch.nn.RNNBase | Stack, x: Tensor, chunk: int, hx: Any) -> Iterator[tuple[Tensor, States]]:
    for part in x.split(chunk, 1 if module.batch_first and x.dim() == 3 else 0):
        y, hx = module(part, hx)
        yield y, hx
        hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
