"""A kernel launch as data. What runs, what a graph records and what the compile check compiles are the same objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NAMES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # of run time: tensors, ints, and None for a tensor that is not there
    constants: dict[str, Any]
    options: dict[str, int]

    def __call__(self, **more: Any) -> None:
        self.kernel[self.grid](**self.arguments, **more, **self.constants, **self.options)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that one recorded graph can stand for, if their arguments come out of a table."""
        return self.kernel, self.grid, tuple(self.constants.items()), tuple(self.options.items())

    def signature(self) -> dict[str, str]:
        """Every parameter with its type, as triton.compiler.ASTSource takes it."""
        found = {}
        for name in self.kernel.arg_names:
            value = self.arguments.get(name)
            if name in self.constants or (name in self.arguments and value is None):
                found[name] = "constexpr"
            elif isinstance(value, Tensor):
                found[name] = _NAMES[value.dtype]
            else:
                large = type(value) is int and not -(1 << 31) <= value < 1 << 31
                found[name] = "*i64" if name == "table" else "i64" if large else "i32"
        return found

    def compiled_constants(self) -> dict[str, Any]:
        return self.constants | {name: None for name, value in self.arguments.items() if value is None}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    options: dict[str, int],
    constants: dict[str, Any],
    arguments: dict[str, Any] | None = None,
) -> Launch:
    """A launch with those of `constants` and `arguments` that the kernel has."""
    own = set(kernel.arg_names)
    given = {name: value for name, value in (arguments or {}).items() if name in own}
    return Launch(kernel, grid, given, {name: v for name, v in constants.items() if name in own}, options)
