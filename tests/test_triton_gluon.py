"""The driver gluon as far as a machine without a GPU shows it: what it refuses, and what its kernels compile to."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton")

from compile_guard import TARGETS, source
from triton.compiler import compile as compile_kernel

from rnnkern.backends.triton import config, drivers, gluon_shim, shipped
from rnnkern.backends.triton.config import Config, Question, choose, fits_together, model

pytestmark = pytest.mark.skipif(bool(gluon_shim.unavailable()), reason=gluon_shim.unavailable() or "there is Gluon")
H200 = shipped.TARGETS["sm_90"]


def ask(dtype: torch.dtype = torch.bfloat16, direction: str = "forward", **changes: Any) -> Question:
    given = {"B": 16, "H": 512, "P": 512, "N": 1, "project": False, "target": H200} | changes
    return Question("lstm", 4, dtype, direction, **given)


def test_it_is_chosen_by_name_or_by_the_table_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(ask()).driver not in config.TOGETHER
    monkeypatch.setenv(config.VARIABLE, "driver=gluon")
    assert choose(ask()).driver == "gluon"
    monkeypatch.delenv(config.VARIABLE)
    measured = Config("gluon", 16, 8, 512, 8, 1)
    words = {"target": "sm_90", "processors": 132, "cell": "lstm", "dtype": "bfloat16", "direction": "forward"}
    entry = words | {"exact": False, "H": 512, "B": 16, "config": vars(measured)}
    monkeypatch.setattr(config, "shipped_table", lambda: config.read_table([entry]))
    assert choose(ask()) == measured
    assert choose(ask(B=17)).driver == "per_step"
    monkeypatch.setattr(config, "unavailable", lambda: "another Triton")
    assert choose(ask()).driver == "per_step"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"dtype": torch.float32, "exact": True}, "float32 without TF32"),
        ({"project": True, "P": 128}, "projection"),
        ({"target": shipped.TARGETS["gfx942"]}, "gfx942"),
        ({"target": replace(H200, arch=75)}, "sm_75"),
        ({"H": 4096}, "H=4096 in tiles of"),
        ({"B": 600, "H": 256}, "programs at once on 132 processors"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    asked = ask(**changes)
    assert word in fits_together(asked, model(asked, "gluon"))


def test_a_triton_without_gluon_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton.experimental.gluon", None)
            importlib.reload(gluon_shim)
            assert re.search(r"^Triton \S+ \(its Gluon .*triton.experimental.gluon", gluon_shim.unavailable())
    finally:
        importlib.reload(gluon_shim)
    assert gluon_shim.unavailable() == ""


@pytest.mark.parametrize("H", [512, 650, 201])  # words of eight, four and two bytes
@pytest.mark.parametrize("direction", config.PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_but_sums_goes_through_shared_memory(dtype: torch.dtype, direction: str, H: int) -> None:
    """With everything that a scan can have: weights and rows are multiplied where they were read to."""
    inputs = shipped._inputs("gru", dtype, H, 5, "rich", "all", "tf32")
    if direction == "forward":
        _, program = drivers.plan_forward(inputs, H200, "gluon")
    else:
        outputs, _ = drivers.plan_forward(inputs, H200, "per_step")
        given = outputs.y, outputs.final, outputs.seq
        _, program = drivers.plan_backward(inputs, outputs, *given, H200, "gluon")
    (one,) = program.launches
    assert one.kernel.is_gluon() and one.options["launch_cooperative_grid"] is True
    compiled = compile_kernel(
        source(one.kernel, one.signature(), one.compiled_constants()), target=TARGETS["sm_90"].gpu, options=one.options
    )
    stored = re.findall(r"ttg\.local_alloc %\S+ : \(tensor<(\S+), #\w+>\)", compiled.asm["ttgir"])
    constants = one.constants
    sums = f"{constants['SLICES']}x{constants['BLOCK_B']}x{constants['BLOCK_H']}xf32"
    assert stored and set(stored) == {sums}
    assert "mma.sync" in compiled.asm["ptx"] and "wgmma" not in compiled.asm["ptx"]
    handed = r"ld\.relaxed\.gpu\.global" if H != 201 or dtype == torch.float32 else r"ld\.volatile\.global"
    assert re.search(handed, compiled.asm["ptx"]) and "st.relaxed.gpu.global" in compiled.asm["ptx"]
