"""Calls inside graphs of torch.compile: one node each, which Dynamo does not follow.

Dynamo guards whatever it follows, every function and constant of ours, and checks that at every call. A node is
followed by AOTAutograd alone, under fake tensors, and what comes out are the ops of _ops.py. What may change from call
to call are arguments of the node, which Dynamo guards.
"""

from __future__ import annotations

from typing import Any

import torch

from rnnkern import _call, dispatch
from rnnkern._dynamo import constant, left_to_python
from rnnkern._options import PLAIN, Options

PACKED = "a graph does not know how long the sequences of a packed input are; of padded input with lengths= it does"


def call(*arguments: Any) -> Any:
    """What Dynamo sees of :func:`rnnkern._call.run`."""
    _allow_nodes()
    *others, options, heads = arguments
    return _node(dispatch.requested(), None if options is PLAIN else options.values(), heads, *others)


def step(*arguments: Any) -> Any:
    """The same for :func:`rnnkern._call.run_cell`."""
    _allow_nodes()
    return _step_node(dispatch.requested(), *arguments)


def outside(*arguments: Any) -> Any:
    """The same with packed input: the end of a graph."""
    if torch.compiler.is_exporting():
        raise ValueError(f"torch.export: {PACKED}")
    return _call.run(*arguments)


left_to_python(outside, f"rnnkern: {PACKED}")


def _node(requested: str | None, options: tuple[Any, ...] | None, heads: int, *arguments: Any) -> Any:
    # The backend that was asked for is read further down: it is an argument so that Dynamo guards it.
    chosen = PLAIN if options is None else Options(*map(_static, options))
    given: list[Any] = [*map(_static, arguments), chosen, None, heads]
    return _call.run(*given)


def _step_node(requested: str | None, *arguments: Any) -> Any:
    return _call.run_cell(*arguments)


def _static(value: Any) -> Any:
    """A probability or bound that Dynamo would have vary from call to call, as the number that it is in this one."""
    if isinstance(value, tuple):
        return tuple(map(_static, value))
    return float(value) if isinstance(value, torch.SymFloat) else value


@constant
def _allow_nodes() -> None:
    """Called while a trace is made, before Dynamo looks at the functions; earlier would import Dynamo for nothing."""
    for function in (_node, _step_node):
        torch.compiler.allow_in_graph(function)
