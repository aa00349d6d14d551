"""What the Gluon kernels have of their own, in the interpreter: with stand-ins for Gluon's words that forget where
elements lie, which no result depends on. How a GPU's compiler takes the layouts tests/test_triton_gluon.py sees.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cooperative import together
from scans import Case, agree, gradients_of, inputs_of, references, run

from rnnkern import dispatch
from rnnkern.backends.triton import config, persistent_kernels
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import VARIABLE
from rnnkern.backends.triton.gluon_shim import unavailable
from rnnkern.backends.triton.lost import LOST

pytest.importorskip("triton.experimental.gluon", reason="a Triton without Gluon")
from rnnkern.backends.triton import gluon_kernels
from rnnkern.cells import CELLS

DENSE = [cell for cell in STEPS if CELLS[cell].dense and len(CELLS[cell].states) <= 2]
SCAN = dispatch.backend("triton")


class Shared:
    def __init__(self, value: Any) -> None:
        self.value = value

    def load(self, layout: None) -> Any:
        return self.value


LAYOUTS = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "SwizzledSharedLayout")
UNLIKE: dict[str, Any] = {name: lambda *args, **named: None for name in LAYOUTS} | {
    "arange": lambda start, end, layout: tl.arange(start, end),
    "zeros": lambda shape, dtype, layout: tl.zeros(shape, dtype),
    "convert_layout": lambda x, layout, assert_trivial=False: x,
    "allocate_shared_memory": lambda dtype, shape, layout, value: Shared(value),
}


class Words:
    def __getattr__(self, name: str) -> Any:
        """The interpreter replaces Triton's own words while a kernel runs: looked up when they are used."""
        return UNLIKE.get(name) or getattr(tl, name)


@pytest.fixture
def gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_kernels, "gl", Words())
    monkeypatch.setattr(gluon_kernels, "multiply", lambda a, b, sums, precision: tl.dot(a, b, sums))
    monkeypatch.setattr(gluon_kernels, "tl", tl, raising=False)  # where the interpreter looks for it
    for name in ("_layout_of_tile", "_layout_of_sums", "_layout_of_operand"):
        monkeypatch.setattr(gluon_kernels, name, lambda *args: None)
    monkeypatch.setattr(gluon_kernels, "_neighbours", lambda storage, word: 4)
    for name in ("tile", "weights", "products", "_along", "_at_words"):
        monkeypatch.setattr(gluon_kernels, name, triton.jit(getattr(gluon_kernels, name).fn))
    for name in ("forward_together", "backward_together"):
        monkeypatch.setattr(gluon_kernels, name, getattr(persistent_kernels, name))
    monkeypatch.setattr(config, "unavailable", str)
    LOST.flags.clear()


@pytest.mark.parametrize(("dtype", "H"), [(torch.float32, 33), (torch.bfloat16, 72)], ids=str)
@pytest.mark.parametrize("cell", DENSE)
def test_equals_the_reference(
    cell: str, dtype: torch.dtype, H: int, gluon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warp's slice in one part and in several, and the last of them past the end; words of every width."""
    case = Case(cell, dtype, T=3, B=6, H=H, layout="packed", reset="learned")
    asked = inputs_of(case)
    inputs = dataclasses.replace(asked, spec=dataclasses.replace(asked.spec, precision="tf32"))
    monkeypatch.setenv(VARIABLE, "driver=gluon,block_b=4,block_h=16,block_k=64,warps=2")
    assert SCAN.unsupported(inputs) == []
    grads = gradients_of(case, inputs)
    yardstick, truth, saved = references(asked, grads)
    with together(case.seed):
        agree(run(SCAN, inputs, grads, saved), yardstick, truth, asked)  # products of fp32 are exact here
    LOST.check(inputs.gx.device)


def test_is_refused_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "driver=gluon")
    (reason,) = SCAN.unsupported(inputs_of(Case("gru", torch.bfloat16, T=2, B=3, H=64)))
    assert reason.startswith(unavailable()) and "interpreter" in reason and "by name" in reason
