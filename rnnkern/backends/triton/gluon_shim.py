"""Gluon, Triton's language for kernels that say where every element lies, as far as this backend uses it.

It is experimental, and its names come and go: the kernels take them from here, and `unavailable` says why there are no
kernels. Barriers and asynchronous copies, which have other names in Triton 3.6 than in 3.7, they do without: between a
store to shared memory and a load the compiler puts a barrier of its own.
"""

from __future__ import annotations

import triton

from rnnkern.backends.triton.interpreter import INTERPRETED

__all__ = ["constexpr_function", "gl", "jit", "multiply", "unavailable"]

_MISSING = ""
try:
    from triton.experimental.gluon import constexpr_function, jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2 as multiply
except ImportError as error:
    _MISSING = str(error)
else:
    _USED = (
        "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "SwizzledSharedLayout",
        "allocate_shared_memory", "arange", "constexpr", "convert_layout", "int64", "load", "pointer_type",
        "static_range", "sum", "where", "zeros",
    )  # fmt: skip
    _MISSING = ", ".join(name for name in _USED if not hasattr(gl, name))


def unavailable() -> str:
    """Why there are no kernels in Gluon here, or nothing."""
    if INTERPRETED:
        return "Triton's interpreter (it does not run Gluon; the driver persistent walks in the same way)"
    return f"Triton {triton.__version__} (its Gluon is not the one that rnnkern knows: {_MISSING})" if _MISSING else ""
