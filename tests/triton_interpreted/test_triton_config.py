"""Choice of driver and tiles: the model, the table, the environment's word; and that what is shipped is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scans import Case, inputs_of

from rnnkern import dispatch
from rnnkern.backends.triton import config, drivers, shipped
from rnnkern.backends.triton.config import Config, Question, Target, choose, look_up, model, read_table

H200 = shipped.TARGETS["sm_90"]
ENTRY: dict[str, Any] = {
    "target": "sm_90", "processors": 132, "cell": "lstm", "dtype": "bfloat16", "exact": False, "direction": "forward",
    "H": 512, "B": 64,
    "config": {"driver": "per_step", "block_b": 32, "block_h": 16, "block_k": 64, "warps": 4, "stages": 4},
}  # fmt: skip


def ask(**changes: Any) -> Question:
    given: dict[str, Any] = {
        "cell": "lstm", "gates": 4, "dtype": torch.bfloat16, "direction": "forward", "B": 64, "H": 512, "P": 512,
        "N": 1, "project": False, "target": H200,
    }  # fmt: skip
    if "H" in changes and "P" not in changes:
        changes["P"] = changes["H"]
    return Question(**(given | changes))


def test_small_ones_are_batch_parallel_and_others_per_step() -> None:
    for dtype, most in ((torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 64), (torch.float64, 16)):
        assert model(ask(dtype=dtype, H=most)).driver == "batch_parallel"
        assert model(ask(dtype=dtype, H=most + 1)).driver == "per_step"
    assert model(ask(H=64, P=16, project=True)).driver == "per_step"
    assert model(ask(cell="slstm", H=16)).driver == "per_step"


@pytest.mark.parametrize("target", shipped.TARGETS.values(), ids=shipped.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", config.PASSES)
def test_the_model_has_a_configuration_for_everything(direction: str, dtype: torch.dtype, target: Target) -> None:
    for B in (1, 5, 64, 4096):
        for H in (1, 16, 17, 200, 650, 4096):
            for project in (False, True):
                P = max(1, H // 2) if project else H
                found = model(ask(B=B, H=H, P=P, project=project, dtype=dtype, direction=direction, target=target))
                width = P if project and direction == "backward" else H
                if found.driver == "batch_parallel":
                    assert found.block_h >= H
                else:
                    assert found.block_h <= max(16, 2 * width)


def test_more_processors_get_more_programs() -> None:
    few, many = (model(ask(B=256, H=1024, target=Target("cuda", 90, n))) for n in (16, 132))
    assert few.block_b * few.block_h >= many.block_b * many.block_h


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.VARIABLE, "driver=per_step, block_b=16,block_h=32,warps=8")
    found = choose(ask(H=64))
    assert (found.driver, found.block_b, found.block_h, found.warps) == ("per_step", 16, 32, 8)
    monkeypatch.setenv(config.VARIABLE, "stages=2")
    assert choose(ask()).stages == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("driver=persistant", "driver 'persistant': expected one of batch_parallel, per_step"),
        ("blocks=16", "got 'blocks=16', expected name=value with a name of driver, block_b"),
        ("block_b", "got 'block_b', expected name=value"),
        ("block_b=many", "block_b='many': expected an integer"),
        ("block_b=24", "block_b=24: expected a power of two from 4 to 256"),
        ("block_h=8", "block_h=8: expected a power of two from 16 to 256"),
        ("driver=persistent,block_h=4", "block_h=4: expected a power of two from 8 to 64"),
        ("warps=0", "warps=0: expected a power of two from 1 to 256"),
        ("stages=0", "stages=0: expected an integer from 1 to 256"),
        ("driver=batch_parallel,block_h=16", "block_h=16: batch_parallel takes all of H=32 in one tile"),
    ],
)
def test_what_the_environment_may_not_say(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.VARIABLE, text)
    with pytest.raises(ValueError, match=f"{config.VARIABLE}: .*{message}|{config.VARIABLE}: {message}"):
        choose(ask(H=32))


def test_a_driver_that_was_asked_for_is_not_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.VARIABLE, "driver=batch_parallel")
    scan = dispatch.backend("triton")
    assert any("projection" in reason for reason in scan.unsupported(inputs_of(Case(project=True, H=16))))
    for H in (65, 300):
        assert any(f"H={H} (batch" in reason for reason in scan.unsupported(inputs_of(Case(H=H))))
    assert scan.unsupported(inputs_of(Case("gru", H=64))) == []
    assert any("slstm, a cell of 4 states (batch" in why for why in scan.unsupported(inputs_of(Case("slstm", H=16))))


def test_the_shipped_table_is_well_formed() -> None:
    config.shipped_table.cache_clear()
    assert isinstance(config.shipped_table(), dict)


def test_the_table_is_looked_up_by_device_cell_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = ENTRY | {"B": 256, "config": ENTRY["config"] | {"block_b": 64}}
    table = read_table([larger, ENTRY])
    assert look_up(table, ask(B=64)) == Config(**ENTRY["config"])
    assert look_up(table, ask(B=65)).block_b == 64  # type: ignore[union-attr]
    for other in ({"B": 257}, {"H": 511}, {"dtype": torch.float16}, {"cell": "gru"}, {"direction": "backward"}):
        assert look_up(table, ask(**other)) is None
    assert look_up(table, ask(target=Target("cuda", 90, 114))) is None
    monkeypatch.setattr(config, "shipped_table", lambda: table)
    assert choose(ask()).stages == 4
    monkeypatch.setenv(config.VARIABLE, "stages=2")
    assert choose(ask()) == Config(**(ENTRY["config"] | {"stages": 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"H": "512"}, "entry 0: H='512', expected int"),
        ({"direction": "sideways"}, "entry 0: direction 'sideways'"),
        ({"speed": 3}, "entry 0: words .*'speed'"),
        ({"config": {"driver": "per_step"}}, "entry 0: config: .*missing"),
        ({"config": ENTRY["config"] | {"driver": "none"}}, "entry 0: config: driver 'none'"),
        ({"config": ENTRY["config"] | {"warps": 3}}, "entry 0: config: warps=3"),
    ],
)
def test_a_malformed_table_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table([ENTRY | change])


def test_parts_hold_a_width_with_little_padding() -> None:
    assert config.parts(768, 1024) == (512, 256)
    assert config.parts(200, 1024) == (128, 64, 16)
    assert config.parts(650, 256) == (256, 256, 128, 16)
    assert config.parts(3, 1024) == (16,)
    for width in range(1, 5000, 7):
        found = config.parts(width, 512)
        assert sum(found[:-1]) < width <= sum(found) < width + max(16, width / 8)
        assert all(size <= 512 and size & (size - 1) == 0 for size in found)


@pytest.mark.parametrize("target", [t for t in shipped.TARGETS.values() if t.kind == "cuda"], ids=lambda t: t.name)
@pytest.mark.parametrize("direction", config.PASSES)
def test_persistent_programs_all_run_at_once(direction: str, target: Target) -> None:
    """No more of them than processors, wherever it would be taken; and nothing takes it without being asked to."""
    offered = 0
    for B in (1, 4, 16, 64, 256):
        for H in (16, 200, 256, 512, 650, 768, 1024, 2048):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for N in (1, 2):
                    asked = ask(B=B, H=H, N=N, dtype=dtype, direction=direction, target=target)
                    assert model(asked).driver not in config.TOGETHER
                    found = model(asked, "persistent")
                    if config.fits_together(asked, found):
                        continue
                    offered += 1
                    assert dtype != torch.float64
                    assert -(-B // found.block_b) * -(-H // found.block_h) * N <= target.processors
    assert offered > 20
    assert "gfx942" in config.fits_together(ask(target=shipped.TARGETS["gfx942"]), model(ask(), "persistent"))


def test_a_persistent_launch_is_cooperative(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a driver of the GPU refuses what would wait for ever."""
    monkeypatch.setenv(config.VARIABLE, "driver=persistent")
    inputs = inputs_of(Case("lstm", torch.bfloat16, T=2, B=5, H=200, reverse=(False,)))
    outputs, program = drivers.plan_forward(inputs, H200)
    assert program.waits
    assert program.launches[0].options["launch_cooperative_grid"] is True
    assert outputs.y.view(torch.int16).eq(-1).all()


def test_tf32_only_where_it_was_allowed() -> None:
    assert config.precision("tf32", torch.float32, H200) == "tf32"
    assert config.precision("ieee", torch.float32, H200) == "tf32x3"
    assert config.precision("tf32", torch.bfloat16, H200) == "ieee"
    assert config.precision("tf32", torch.float64, H200) == "ieee"
    assert config.precision("ieee", torch.float32, shipped.TARGETS["gfx942"]) == "ieee"


def test_what_is_shipped_says_everything_that_a_compiler_asks() -> None:
    names = set()
    for kernel in shipped.shipped(H200, sizes=(32, 512), batches=(16,)):
        assert list(kernel.signature) == list(kernel.kernel.arg_names)
        missing = {name for name, kind in kernel.signature.items() if kind == "constexpr"} - set(kernel.constexprs)
        assert not missing, f"{kernel.name}: {missing}"
        names.add(kernel.kernel.__name__)
    assert names == {
        "forward_scan", "backward_scan", "forward_step", "project_step", "backward_step", "backward_cell_step",
        "product_step", "backward_row_step", "forward_together", "backward_together",
        "write_table", "advance",
    }  # fmt: skip


def test_a_real_scan_launches_what_is_shipped() -> None:
    """The same constants as for tensors without memory."""
    inputs = shipped._inputs("gru", torch.bfloat16, 200, 16, "plain", "all", "ieee")
    _, planned = drivers.plan_forward(inputs, H200)
    real = inputs_of(Case("gru", torch.bfloat16, T=2, B=16, H=200, reverse=(False,)))
    _, launched = drivers.plan_forward(real, H200)
    assert [one.constants for one in planned.launches] == [one.constants for one in launched.launches]
    assert [one.options for one in planned.launches] == [one.options for one in launched.launches]
