"""What is measured, as data: a case is a cell, a shape, a mode and a dtype on a device; suites are lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

# training: forward and backward with the gradients of x and of every parameter. penalty: those of the squared norm of
# the gradient of x, which are second derivatives.
MODES = ("inference", "training", "penalty")
RAGGED = ("packed", "lengths")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; the input size I equals H. Packed: T bounds the lengths, which are uniform in 1..T."""

    T: int
    B: int
    H: int
    layers: int = 1
    directions: int = 1
    # "dense" | "packed" | "lengths": the same padded | "resets": the state starts anew in 3 % of the steps | "states":
    # all returned | "recompute": memory="recompute" | "cell": one call of a cell's module
    layout: str = "dense"

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
        """The lengths of a packed or padded shape, in no order; the same at every run."""
        return torch.randint(1, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(1))

    def resets(self) -> Tensor:
        """[T, B]: in which steps a sequence starts anew; the same at every run."""
        return torch.rand(self.T, self.B, generator=torch.Generator().manual_seed(1)) < 0.03

    @property
    def steps(self) -> int:
        return int(self.lengths().max()) if self.layout in RAGGED else self.T

    @property
    def rows(self) -> int:
        """Rows of (time, batch) that are computed: padding is none."""
        return int(self.lengths().sum()) if self.layout in RAGGED else self.T * self.B

    @property
    def plain(self) -> Shape:
        """The dense call with as many rows."""
        return replace(self, T=self.rows // self.B, layout="dense")


@dataclass(frozen=True)
class Case:
    cell: str
    shape: Shape
    mode: str
    dtype: str
    device: str = "cpu"
    precision: str = "ieee"  # "tf32": what torch's switches allow products of fp32 to be
    capture: str = ""  # "graph": replayed from a CUDA graph

    def __str__(self) -> str:
        extras = [part for part in (self.precision, self.capture) if part not in ("ieee", "")]
        return " ".join([self.cell, self.shape.name, self.mode, self.dtype, *extras])

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
SECOND = (Shape(50, 16, 128),)
# What torch.nn has no argument for, beside the same call without it.
OPTIONS = (
    *(Shape(*sizes, layout=layout) for sizes in ((128, 8, 64), (200, 32, 256)) for layout in ("resets", "states")),
    *(Shape(200, 32, H, layout="lengths") for H in (64, 256)),
)
LONG = (Shape(4096, 16, 128, layout="recompute"),)
QUICK = (Shape(1, 1, 128), Shape(50, 1, 128), Shape(50, 16, 128), Shape(100, 16, 256))
# Most telling first: a run may end early.
GPU = (
    *(Shape(*sizes) for sizes in ((1024, 16, 768), (512, 64, 512), (1024, 16, 256), (128, 1, 1024), (256, 256, 1024))),
    *(Shape(*sizes) for sizes in ((1024, 16, 512), (1024, 16, 1024), (512, 64, 1024), (512, 64, 256), (512, 64, 128))),
    *(Shape(*sizes) for sizes in ((256, 16, 128), (128, 1, 256), (1, 1, 512), (256, 256, 512), (128, 16, 2048))),
    Shape(512, 64, 512, layers=2, directions=2),
    *(Shape(512, 64, H) for H in (200, 650)),
    Shape(512, 64, 512, layout="packed"),
    Shape(128, 128, 256, layout="resets"),
)


@dataclass(frozen=True)
class Suite:
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    device: str = "cpu"
    precisions: tuple[str, ...] = ("ieee",)  # of fp32
    captures: tuple[str, ...] = ("",)
    modes: tuple[str, ...] = MODES[:2]

    def cases(self) -> Iterator[Case]:
        for shape, dtype, cell, mode in product(self.shapes, self.dtypes, cells(), self.modes):
            for precision, capture in product(self.precisions if dtype == "fp32" else ("ieee",), self.captures):
                yield Case(cell, shape, mode, dtype, self.device, precision, capture)


HERE = ("torch.nn", "rnnkern-fp32", "onnxruntime")
EVERY = (*HERE, "openvino", "torch.compile", "compiled-loop")
SUITES: dict[str, Suite] = {
    "quick": Suite(QUICK, ("fp32",), ("torch.nn", "onnxruntime")),
    "table": Suite(TABLE, ("fp32", "bf16"), HERE),
    "cpu": Suite(CPU, ("fp32", "bf16"), EVERY),
    "second": Suite(SECOND, ("fp32",), ("torch.nn",), modes=("penalty",)),
    "options": Suite(OPTIONS, ("fp32",), ("rnnkern-plain",)),
    "long": Suite(LONG, ("fp32",), ("torch.nn", "rnnkern-plain"), modes=("training",)),
    "gpu": Suite(
        GPU,
        ("fp16", "fp32", "bf16"),
        ("torch.nn", "compiled-loop", "torchrl", "flashrnn", "haste"),
        "cuda",
        ("tf32", "ieee"),
        ("", "graph"),
    ),
}


def suite(name: str, wanted: Sequence[str] | None = None) -> list[tuple[Case, str]]:
    """Cases and peers of a suite, a case's peers together, each pair once; "full" is all that this machine can run.
    `wanted` are peers in place of the suite's own."""
    names = [name] if name != "full" else ["table", "cpu", *(["gpu"] if torch.cuda.is_available() else [])]
    found: dict[tuple[Case, str], None] = {}
    for case in dict.fromkeys(case for each in names for case in SUITES[each].cases()):
        peers = dict.fromkeys(
            peer for each in names if SUITES[each].device == case.device for peer in SUITES[each].peers
        )
        found |= dict.fromkeys((case, peer) for peer in wanted or peers)
    return list(found)
