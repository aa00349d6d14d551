"""Products of whole matrices: torch's, or the extension's on processors where those are slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnnkern import dispatch
from rnnkern._dynamo import constant
from rnnkern._run import real, unwatched

_DTYPES = {torch.float64: 0, torch.float32: 1}  # as csrc/api.h has them
_THREAD = 1 << 20  # multiplications that are worth a thread of its own

_found: str | None = None


@constant  # a trace must not enter imports
def isa() -> str:
    """The instruction set whose products are faster than torch's here; empty where there is none."""
    global _found
    if _found is None:
        _found = ""
        if dispatch.unavailable("cpp") is None:
            from rnnkern import _cpu
            from rnnkern.backends.cpp import BACKEND

            _found = BACKEND.isa if _cpu.gemm_pays(BACKEND.isa) else ""
    return _found


def mm(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a b, or `total`, made here, with that added to it in place. Plain tensors only: no transform sees this."""
    (M, K), N = a.shape, b.shape[1]
    fits = a.is_cpu and b.is_cpu and a.dtype in _DTYPES and a.dtype == b.dtype and b.shape[0] == K
    if not (fits and isa() and M and N and K):
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    from rnnkern import _cpu

    a = a if 1 in a.stride() else a.contiguous()
    b = b if b.stride(1) == 1 else b.contiguous()
    out = torch.empty(M, N, dtype=a.dtype) if total is None else total
    threads = min(torch.get_num_threads(), 1 + M * N * K // _THREAD)
    _cpu.gemm(
        isa(), _DTYPES[a.dtype], M, N, K, a.data_ptr(), *a.stride(), b.data_ptr(), b.stride(0), out.data_ptr(),
        out.stride(0), total is not None, threads,
    )  # fmt: skip
    return out


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x w^T [S, G], differentiable to any order, and by every transform."""
    small = x.shape[0] * w.numel() < _THREAD  # a custom function costs as much
    if small or not (x.is_cpu and x.dtype in _DTYPES and unwatched() and isa() and real((x, w))):
        return functional.linear(x, w)
    return functional.linear(x, w) if torch.is_autocast_enabled("cpu") else _Linear.apply(x, w)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return mm(x, w.t())

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(d)  # is_grads_batched, of which `real` knows nothing
        plain = not (torch.is_grad_enabled() or batched) and unwatched() and real((d, x, w))
        product = mm if plain else torch.mm
        to_x, to_w = ctx.needs_input_grad
        return product(d, w) if to_x else None, product(d.t(), x) if to_w else None
