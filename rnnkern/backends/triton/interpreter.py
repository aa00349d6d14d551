"""Whether Triton's interpreter runs the kernels, and whether it can be trusted with bf16."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def _square(x, y):  # type: ignore[no-untyped-def]
    k = tl.arange(0, 16)
    at = k[:, None] * 16 + k[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a).to(tl.bfloat16))


# The variable is read where a kernel is made, so what counts is what became of one.
INTERPRETED = not isinstance(_square, triton.runtime.JITFunction)


@lru_cache(maxsize=1)
def has_bf16() -> bool:
    """Some versions multiply the bit patterns of bf16 as integers and cut fp32 off instead of rounding: by trial."""
    x = torch.full((16, 16), 1.0703125, dtype=torch.bfloat16)  # 16 x^2 is nearer to the bf16 above it
    y = torch.empty_like(x)
    _square[(1,)](x, y)
    return bool((y == (x.float() @ x.float()).to(torch.bfloat16)).all())
