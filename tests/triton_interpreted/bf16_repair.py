"""bf16 in Triton's interpreter, which keeps it as bit patterns: products of it made in fp32, and fp32 rounded to it.

Without this the interpreter multiplies the patterns as integers and cuts the lower half of fp32 off. What a GPU does,
and what this does, is exact products summed in fp32, and rounding to the nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(handle: TensorHandle) -> TensorHandle:
    """The same numbers in fp32, if they are bf16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 as patterns of bf16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(values.shape)
    upper = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), upper).astype(np.uint16)  # the sum could carry out of a NaN


def install() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, widened(a), widened(b), d, *rest)

    InterpreterBuilder.create_dot = create_dot
    for name in ("cast_impl", "create_fp_trunc", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _rounding(getattr(InterpreterBuilder, name)))


def _rounding(cast: Any) -> Any:
    def converted(self: Any, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        return cast(self, source, target, *rest)

    return converted
