"""What Dynamo is told about functions of ours, without importing it: that takes seconds, and few programs need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """A trace takes what the function gives as a constant, and does not enter it.

    torch.compiler.assume_constant_result does this.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def left_to_python(function: F, reason: str = "") -> F:
    """A graph ends where the function is called, and nothing inside of it becomes one.

    torch.compiler.disable does this.
    """
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))  # its callees as well
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return function
