"""What is measured, as data: every case is a cell, a shape, a mode and a dtype; suites are lists of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

MODES = ("inference", "training")  # training: forward and backward with the gradients of x and of every parameter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; the input size I equals H. Packed: T bounds the lengths, which are uniform in 1..T."""

    T: int
    B: int
    H: int
    layers: int = 1
    directions: int = 1
    layout: str = "dense"  # "dense" | "packed" | "cell": one call of RNNCell, LSTMCell or GRUCell

    @property
    def name(self) -> str:
        parts = [f"T{self.T}", f"B{self.B}", f"H{self.H}"]
        if self.layers > 1:
            parts.append(f"{self.layers}layers")
        if self.directions == 2:
            parts.append("bidirectional")
        if self.layout != "dense":
            parts.append(self.layout)
        return "-".join(parts)

    def lengths(self) -> Tensor:
        """The lengths of a packed shape, in no order; the same at every run."""
        return torch.randint(1, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(1))

    @property
    def steps(self) -> int:
        return int(self.lengths().max()) if self.layout == "packed" else self.T

    @property
    def rows(self) -> int:
        """Rows of (time, batch) that are computed: padding is none."""
        return int(self.lengths().sum()) if self.layout == "packed" else self.T * self.B


@dataclass(frozen=True)
class Case:
    cell: str
    shape: Shape
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.cell} {self.shape.name} {self.mode} {self.dtype}"

    def with_dtype(self, dtype: str) -> Case:
        return replace(self, dtype=dtype)


def cells() -> tuple[str, ...]:
    """Every cell that rnnkern has a module for and torch.nn too: a new one joins without an edit here."""
    import rnnkern

    found = [name for name in dir(rnnkern) if isinstance(getattr(rnnkern, name), type)]
    return tuple(name.lower() for name in found if issubclass(getattr(torch.nn, name, object), torch.nn.RNNBase))


@cache
def module_name(cell: str, layout: str) -> str:
    return cell.upper() + ("Cell" if layout == "cell" else "")


PACKED = Shape(200, 32, 256, layout="packed")

# The sizes that the speed floors in floors.py speak of.
TABLE = (
    Shape(1, 1, 128),
    Shape(1, 1, 128, layout="cell"),
    *(Shape(100, B, H) for B, H in product((1, 4, 16, 64), (128, 256, 512))),
    PACKED,
)
# The general set: latency, streams, batches, sizes beyond the cache, stacks.
CPU = (
    *(Shape(*sizes) for sizes in ((1, 1, 128), (1, 1, 512), (50, 1, 128), (100, 1, 256), (100, 1, 512), (50, 1, 1024))),
    *(Shape(*sizes) for sizes in ((100, 4, 256), (50, 32, 128), (100, 16, 256), (100, 64, 256), (100, 64, 512))),
    Shape(50, 16, 1024),
    Shape(100, 16, 256, layers=2, directions=2),
    PACKED,
)
QUICK = (Shape(1, 1, 128), Shape(50, 1, 128), Shape(50, 16, 128), Shape(100, 16, 256))

SUITES: dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]] = {
    "table": (TABLE, ("fp32", "bf16")),
    "cpu": (CPU, ("fp32", "bf16")),
    "quick": (QUICK, ("fp32",)),
}


def suite(names: list[str]) -> list[Case]:
    """The cases of the named suites, each once."""
    found: dict[Case, None] = {}
    for name in names:
        shapes, dtypes = SUITES[name]
        for dtype, shape, cell, mode in product(dtypes, shapes, cells(), MODES):
            found[Case(cell, shape, mode, dtype)] = None
    return list(found)
