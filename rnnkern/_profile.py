"""rnnkern's kernels by name in traces of torch.profiler, which sees torch's operations only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rnnkern.backends.base import Backend

active: Callable[[], bool] = torch._C._autograd._profiler_enabled


def label(backend: str, cell: str, what: str) -> str:
    return f"rnnkern::{backend} {cell} {what}"


class Recorded:
    """A backend whose work is an event of its own: forward, backward, or layer_forward with the projection in it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backend, name)
        if name not in ("forward", "backward", "layer_forward"):
            return found

        def recorded(inputs: Any, *args: Any) -> Any:
            with torch.profiler.record_function(label(self.backend.name, inputs.spec.cell, name)):
                return found(inputs, *args)

        return recorded
