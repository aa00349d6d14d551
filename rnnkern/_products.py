"""Products of whole matrices: torch's, or the extension's on processors where those are slow."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern import dispatch
from rnnkern._dynamo import constant

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
