"""PyTorch's recurrent networks, drop-in and fast. Importing this loads no Triton, Numba or native code."""

from rnnkern.dispatch import backends, use_backend

__version__ = "0.1.0"

__all__ = ["backends", "use_backend"]
